"""The loss of a folded model in training, on the trie: no logits of the whole batch."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from radix_mlp.torch.eager import eager
from radix_mlp.torch.logits import Head
from radix_mlp.torch.loss import Reduction, cross_entropy
from radix_mlp.transformers.batch import Batch, packed_values

# One thread at a time: others that train the same model would compute each other's loss.
HEAD_FORWARD = threading.Lock()

# Types whose forward changes the head's input or its logits in a way of their own.
OWN_LOGITS = {"minicpm3", "modernbert-decoder"}


def lm_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head of `model`; None where what makes logits, or the loss, is more than is known here."""
    if model.config.model_type in OWN_LOGITS or model.loss_function is not ForCausalLMLoss:
        return None
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    # FSDP2 makes a subclass; others, and who puts a forward on the module itself, have a forward of their own.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    with HEAD_FORWARD:
        if "forward" in vars(head):
            return None
    # Who looks at logits would be given the loss; FSDP2 looks at neither.
    known = all(hook.__module__.startswith("torch.distributed.") for hook in head._forward_hooks.values())
    return head if known else None


@eager
def labels_of_tokens(batch: Batch, labels: Tensor, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """What should follow each token, [N] on the host.

    `labels` [sequences, length] are those of the tokens themselves, `shift_labels` those of the tokens after them.
    """
    if shift_labels is None:
        return packed_values(batch.packed, labels, after=ignore_index)
    return packed_values(batch.packed, shift_labels)


@eager
def without_padding(batch: Batch, labels: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """`labels` and the `options` of a loss, in which nothing is left that padding would predict."""
    shifted = options.get("shift_labels")
    padding = torch.from_numpy(batch.index == batch.fold.num_rows)
    if shifted is None:
        # A label's logits are those of the place before; a row's first label has none.
        padding = padding.roll(1, -1)
    given = labels if shifted is None else shifted
    if given.numel() != padding.numel():
        raise ValueError(f"labels must be {list(padding.shape)} like input_ids, got shape {tuple(given.shape)}")
    kept = given.masked_fill(padding.to(given.device).view(given.shape), options.get("ignore_index", -100))
    return (kept, options) if shifted is None else (labels, options | {"shift_labels": kept})


@eager
def folded_loss(
    hidden: Tensor,
    head: nn.Linear,
    config: PreTrainedConfig,
    batch: Batch,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None,
    ignore_index: int,
) -> Tensor:
    """The loss that transformers' ForCausalLMLoss gives.

    `hidden` is [1, rows, hidden], `labels` are `labels_of_tokens`. The sum over all that count is divided by their
    number, or by `num_items_in_batch`.
    """
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    reduction: Reduction = "mean" if num_items_in_batch is None else "sum"

    def forward(states: Tensor) -> Tensor:
        parameters = Head(head.weight, head.bias, scale, softcap)
        return cross_entropy(states, parameters, batch.fold, labels, ignore_index=ignore_index, reduction=reduction)

    # As the head's own forward, within its hooks: FSDP2 gathers a head that it shards by itself there.
    with HEAD_FORWARD:
        head.forward = forward  # type: ignore[method-assign, assignment]
        try:
            loss: Tensor = head(hidden[0])
        finally:
            del head.forward
    return loss if num_items_in_batch is None else loss / num_items_in_batch
