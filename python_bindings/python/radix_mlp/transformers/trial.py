"""A small batch on which a model that no test covers runs both ways, before it is folded for good."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.transformers.support import UnsupportedModelError, drawing_modules, embeddings_of, has_lm_head

if TYPE_CHECKING:
    from radix_mlp.transformers.folding import Folding

# Short sequences that share their first tokens, the second padded on the left.
SEQUENCES, LENGTH, SHARED, PADDING = 3, 12, 6, 3


class Outputs(NamedTuple):
    """The states at the tokens, or the logits where a model has an LM head; its loss in evaluation and in training.

    Without `labels` among its arguments a model has no loss.
    """

    states: Tensor
    losses: list[Tensor]


def outputs(model: PreTrainedModel) -> Outputs:
    batch, labels = _batch(model)
    kept = batch["attention_mask"].bool()
    predicts = has_lm_head(model)
    losses = []
    with _mode(model, training=False):
        states = (model if predicts else model.base_model)(**batch, use_cache=False)[0][kept]
    if predicts and "labels" in inspect.signature(model.forward).parameters:
        for training in (False, True):
            with _mode(model, training=training):
                losses.append(model(**batch, labels=labels, use_cache=False)[0])
    return Outputs(states, losses)


def prove(folding: "Folding", plain: Outputs) -> None:
    """Raises UnsupportedModelError where the states of the folded model are others than the `plain` model's.

    Where it is the loss that is another, `folding` takes that from whole logits; where this is no help, from nowhere.
    """
    model = folding.model
    found = outputs(model)
    limit = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 5e-2
    if not (difference := _difference(found.states, plain.states)) < limit:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be folded: on a test batch the outputs of the folded model differ from its "
            f"own by {difference:.1e} of their norm. It is of type {model.config.model_type}, attends by "
            f"{folding.implementation!r}, and is none that the tests cover"
        )

    def agree(losses: list[Tensor]) -> bool:
        return all(_difference(*pair) < limit for pair in zip(losses, plain.losses, strict=True))

    folding.fuses_loss = agree(found.losses)
    folding.knows_loss = folding.fuses_loss or agree(outputs(model).losses)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).float().norm() / expected.float().norm())


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
def _mode(model: PreTrainedModel, *, training: bool) -> Iterator[None]:
    """The model in training, but for what draws random numbers, or in evaluation; without gradients."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    for module in drawing_modules(model):
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in before:
            module.training = was
