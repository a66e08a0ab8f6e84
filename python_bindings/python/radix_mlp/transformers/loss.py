"""The loss of a folded model in training, on the trie: no logits of the whole batch."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from radix_mlp.torch.loss import Head, cross_entropy
from radix_mlp.transformers.batch import Batch, packed_values


def lm_head(model: PreTrainedModel) -> Head | None:
    """The head of `model` and what its forward does to the logits; None where that is more than is known here."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    config = model.config
    if type(head) is not nn.Linear or config.model_type in OWN_LOGITS or model.loss_type != "ForCausalLM":
        return None
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(head.weight, head.bias, scale, getattr(config, "final_logit_softcapping", None))


# Types whose forward changes the head's input or its logits in a way of their own.
OWN_LOGITS = {"minicpm3", "modernbert-decoder"}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def folded_loss(
    hidden: Tensor,
    head: Head,
    batch: Batch,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The loss that transformers' ForCausalLMLoss gives of `labels` [sequences, length].

    `hidden` is [1, rows, hidden]. Labels are those of the tokens themselves, `shift_labels` those of the tokens after
    them. The sum over all that count is divided by their number, or by `num_items_in_batch`.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    own = packed_values(batch.packed, shift_labels)
    if num_items_in_batch is None:
        return cross_entropy(hidden[0], head, batch.fold, own, ignore_index=ignore_index)
    total = cross_entropy(hidden[0], head, batch.fold, own, ignore_index=ignore_index, reduction="sum")
    return total / num_items_in_batch
