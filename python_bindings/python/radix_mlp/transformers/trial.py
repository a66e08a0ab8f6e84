"""A small batch on which a model that no test covers runs both ways, before it is folded for good."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.transformers.support import UnsupportedModelError, embeddings_of, has_lm_head, has_own_forward

if TYPE_CHECKING:
    from radix_mlp.transformers.folding import Folding

# Short sequences that share their first tokens, the second padded on the left.
SEQUENCES, LENGTH, SHARED, PADDING = 3, 12, 6, 3


def outputs(model: PreTrainedModel) -> list[Tensor]:
    """The states at the tokens, or the logits where `model` has an LM head, and then the loss that it computes."""
    batch, labels = _batch(model)
    kept = batch["attention_mask"].bool()
    with _evaluating(model), torch.no_grad():
        if not has_lm_head(model):
            return [model.base_model(**batch, use_cache=False)[0][kept]]
        if not has_own_forward(model):
            return [model(**batch, use_cache=False, return_dict=False)[0][kept]]
        loss, logits = model(**batch, labels=labels, use_cache=False, return_dict=False)[:2]
        return [logits[kept], loss]


def prove(folding: "Folding", plain: list[Tensor]) -> None:
    """Raises UnsupportedModelError where the `outputs` of the folded model are others than the `plain` model's."""
    model = folding.model
    found = outputs(model)
    if len(found) > 1 and (head := folding.lm_head()) is not None:
        batch, labels = _batch(model)
        with _evaluating(model), torch.no_grad():
            trained = folding.train_step(dict(batch), head, labels, {})["loss"]
        found, plain = [*found, trained], [*plain, plain[-1]]
    differences = [((x - y).float().norm() / y.float().norm()).item() for x, y in zip(found, plain, strict=True)]
    limit = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 5e-2
    if not all(difference < limit for difference in differences):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be folded: on a test batch the outputs of the folded model differ from its "
            f"own by {max(differences):.1e} of their norm. It is of type {model.config.model_type}, attends by "
            f"{folding.implementation!r}, and is none that the tests cover"
        )


def _batch(model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
    """Its arguments, and labels of tokens that tokens predict."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (SEQUENCES, LENGTH), generator=generator)
    ids[1:, :SHARED] = ids[0, :SHARED]
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    labels = ids.clone()
    labels[:, : PADDING + 1] = -100
    _, device = embeddings_of(model)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, labels.to(device)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.train(mode=False)
    try:
        yield
    finally:
        for module, was in training:
            module.training = was
