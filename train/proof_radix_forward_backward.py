"""Folded training gives the loss of unfolded training and the gradient of every parameter.

As a script it prints a table and exits with 1 where it does not: python train/proof_radix_forward_backward.py
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from radix_mlp.torch import log_probs
from radix_torch_varlen import Batch, Level, Qwen3
from tries import CONFIG, MERGEABLE, Sequences, families, model, wrongly_folded

# Largest difference of the loss, and of each parameter's gradient over its largest magnitude: rounding is 1.1e-16 and
# 6e-8, gradients are sums over some hundred rows, and those of early layers have passed three layers twice.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
# One token in the place of another moves gradients by far more than rounding does, in either dtype.
SEEN = 1e-2
# How much of the unfolded step's error a folded one may have in bfloat16: rows that are grouped otherwise are rounded
# otherwise, some with more luck.
BFLOAT16_FACTOR = 1.25
LEVELS: tuple[Level, ...] = ("mlp", "full")
# A family whose sequences have no second token trains nothing.
TRAINING = {family: sequences for family, sequences in families().items() if max(map(len, sequences)) > 1}

Gradients = dict[str, Tensor]
Step = Callable[[Qwen3, Batch], Tensor]


def mean_loss(model: Qwen3, batch: Batch) -> Tensor:
    return model.loss(batch)


def weighted_loss(model: Qwen3, batch: Batch) -> Tensor:
    """A weight for each token, as an advantage or a mask of the prompt is; some are zero or negative."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(len(batch.labels), generator=generator, dtype=torch.float64)
    weights[torch.rand(len(weights), generator=generator) < 0.3] = 0
    return model.loss(batch, weights)


def ratio_loss(model: Qwen3, batch: Batch) -> Tensor:
    """Clipped ratios of log-probabilities, as PPO and GRPO have them: not linear in the log-probabilities."""
    fold = batch.fold if batch.level == "full" else batch.tokens
    states = model(batch) if batch.level == "full" else batch.unfold(model(batch))
    found = log_probs(states, model.lm_head.weight, fold, batch.labels)
    ratio = (found - found.detach() * 0.99).exp()
    sign = torch.arange(len(ratio), dtype=ratio.dtype) % 2 * 2 - 1
    return -torch.minimum(ratio * sign, ratio.clamp(0.9, 1.1) * sign).mean()


STEPS = {"mean": mean_loss, "weighted": weighted_loss, "ratio": ratio_loss}


def step(
    sequences: Sequences,
    level: Level,
    dtype: torch.dtype,
    run: Step = mean_loss,
    *,
    tied: bool = True,
    checkpointing: bool = False,
    batch: Batch | None = None,
) -> tuple[Tensor, Gradients]:
    """The loss and the gradients of one step over `sequences` at `level`, or over `batch` where it is given."""
    own = model(dtype, replace(CONFIG, tie_word_embeddings=tied))
    own.checkpointing = checkpointing
    loss = run(own, Batch.from_sequences(sequences, level) if batch is None else batch)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in own.named_parameters() if parameter.grad is not None}
    return loss.detach(), gradients


def difference(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> float:
    """The largest relative difference of the loss and of any parameter's gradient."""
    assert found[1].keys() == expected[1].keys()
    pairs = [(found[0], expected[0]), *((found[1][name], gradient) for name, gradient in expected[1].items())]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def error(found: Gradients, reference: Gradients) -> float:
    """The distance of all gradients from the reference, over the length of the reference."""
    squares = [(found[name].double() - gradient.double()).square().sum() for name, gradient in reference.items()]
    lengths = [gradient.double().square().sum() for gradient in reference.values()]
    return (sum(squares, torch.tensor(0.0)) / sum(lengths, torch.tensor(0.0))).sqrt().item()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", TRAINING)
def test_loss_and_gradients_are_the_unfolded_ones(family: str, level: Level, dtype: torch.dtype) -> None:
    sequences = TRAINING[family]
    assert difference(step(sequences, level, dtype), step(sequences, "none", dtype)) < BOUNDS[dtype]


@pytest.mark.parametrize("run", STEPS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_loss(run: str, tied: bool, checkpointing: bool) -> None:
    sequences = TRAINING["three levels"]
    expected = step(sequences, "none", torch.float64, STEPS[run], tied=tied)
    assert len(expected[1]) == 3 * 11 + (2 if tied else 3)
    for level in LEVELS:
        found = step(sequences, level, torch.float64, STEPS[run], tied=tied, checkpointing=checkpointing)
        assert difference(found, expected) < BOUNDS[torch.float64]


def test_checkpointing_computes_layers_again() -> None:
    own = model(torch.float32)
    own.checkpointing = True
    calls: list[str] = []
    for layer in own.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append("layer"))
    own.loss(Batch.from_sequences(TRAINING["three levels"])).backward()  # type: ignore[no-untyped-call]
    assert len(calls) == 2 * len(own.layers)


def test_many_copies_lose_nothing_in_bfloat16() -> None:
    """A sum in bfloat16 stops at 256, to which it cannot add 1."""
    batch = Batch.from_sequences([[5]] * 300, "mlp")
    rows = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    batch.unfold(rows).sum().backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    assert rows.grad.tolist() == [[300.0] * 4]


def test_the_unfolded_step_is_that_of_autograd_alone() -> None:
    """Logits of one sequence after the other, and torch's own cross entropy."""
    sequences = TRAINING["two prompts, completions"]
    own = model(torch.float64)
    logits, labels = [], []
    for sequence in sequences:
        logits.append(own.logits(Batch.from_sequences([sequence], "none"))[:-1])
        labels += sequence[1:]
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(labels))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in own.named_parameters() if parameter.grad is not None}
    for level in ("none", *LEVELS):
        assert difference(step(sequences, level, torch.float64), (loss.detach(), gradients)) < BOUNDS[torch.float64]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", TRAINING)
def test_bfloat16_is_no_further_from_float32(family: str, level: Level) -> None:
    reference = step(TRAINING[family], "none", torch.float32)[1]
    folded, unfolded = (error(step(TRAINING[family], each, torch.bfloat16)[1], reference) for each in (level, "none"))
    assert folded < BFLOAT16_FACTOR * unfolded


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_wrong_fold_is_seen(level: Level, dtype: torch.dtype) -> None:
    for family in MERGEABLE:
        sequences = TRAINING[family]
        wrong = step(sequences, level, dtype, batch=wrongly_folded(sequences, level))
        assert difference(wrong, step(sequences, "none", dtype)) > SEEN, family


def test_lost_copies_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass that gives a row the gradient of one of its copies instead of their sum."""
    sequences = TRAINING["one prompt, completions"]
    expected = step(sequences, "none", torch.float64)
    monkeypatch.setattr(
        Batch, "unfold", lambda batch, rows: rows.detach()[batch.scatter_indices].index_copy(0, batch.fold_gather, rows)
    )
    assert difference(step(sequences, "mlp", torch.float64), expected) > 1e-3


def main() -> None:
    columns = [(level, dtype) for dtype in BOUNDS for level in LEVELS]
    titles = "  ".join(f"{level}, f{8 * dtype.itemsize}" for level, dtype in columns)
    print(f"{'largest difference from level none':36} {titles}  one row merged  bf16 error: none / mlp / full")
    broken = False
    for family, sequences in TRAINING.items():
        expected = {dtype: step(sequences, "none", dtype) for dtype in BOUNDS}
        found = {column: difference(step(sequences, column[0], column[1]), expected[column[1]]) for column in columns}
        broken |= any(not value < BOUNDS[dtype] for (_, dtype), value in found.items())
        reference = expected[torch.float32][1]
        errors = [error(step(sequences, level, torch.bfloat16)[1], reference) for level in ("none", *LEVELS)]
        broken |= not max(errors) < BFLOAT16_FACTOR * errors[0]
        merged = ""
        if family in MERGEABLE:
            wrong = step(sequences, "full", torch.float64, batch=wrongly_folded(sequences, "full"))
            seen = difference(wrong, expected[torch.float64])
            broken |= not seen > SEEN
            merged = f"{seen:.1e}"
        row = "   ".join(f"{value:.1e}" for value in found.values())
        print(f"{family:36} {row}   {merged:14}  " + " / ".join(f"{value:.2%}" for value in errors))
    limits = [f"f{8 * dtype.itemsize} below {bound:.0e}" for dtype, bound in BOUNDS.items()]
    print(*limits, f"merged above {SEEN}", f"bf16 below {BFLOAT16_FACTOR} × none", sep=", ")
    sys.exit(broken)


if __name__ == "__main__":
    main()
