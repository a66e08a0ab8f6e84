"""Folded training gives the loss of unfolded training and every parameter's gradient, on every backend of this machine.

Unfolded training is held to torch's own cross entropy and autograd alone, so that no error that both share goes unseen;
the model itself is held to transformers' in test_huggingface_comparison.py.

As a script it prints a table and exits with 1 where it does not: python train/proof_radix_forward_backward.py
"""

# isort: off
import interpreted  # noqa: F401
# isort: on

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from statistics import mean
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from radix_mlp.torch import log_probs
from radix_mlp.torch.dispatch import Backend
from radix_torch_varlen import Batch, Level, Qwen3, Residual
from tries import (
    CONFIG,
    DEEP,
    DEEP_STD,
    DEVICE,
    DTYPES,
    MERGEABLE,
    NAMES,
    affordable,
    families,
    fold_at,
    model,
    runs,
    wrongly_folded,
)

# Largest difference of the loss, and of each parameter's gradient over its largest magnitude: rounding is 1.1e-16 and
# 6e-8, gradients are sums over some hundred rows, and those of early layers have passed three layers twice.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
# One token in the place of another moves gradients by far more than rounding does, in either dtype.
SEEN = 1e-2
# The error of a folded step in bfloat16, against float32 with the same weights, over that of the unfolded one. A row's
# gradient is rounded once, as the sum of its copies', whose own roundings partly cancel; what makes up for it is that
# it is not rounded from layer to layer, nor between the head and the last layer. Over all tries and seeds the mean is
# 0.97, and in deep models, where roundings add up, 0.95. Single tries' means are 0.92 to 1.01, single seeds scatter by
# 0.02 around them, in deep models by 0.08.
BFLOAT16_SHARED, BFLOAT16_MEAN, BFLOAT16_EACH = 1.0, 1.02, 1.05
# The same for the loss: of the root mean squares of its errors, over all tries and seeds and over a try's seeds, as a
# single one may be next to none by chance. Were the steps' errors independent, the logarithm of the ratio would scatter
# by 0.41 for the six errors of a try, and by 0.15 and 0.19 for the 42 and 28 of all. Many are the same roundings: the
# ratio is 1.0 where kernels give a row the same bits wherever it stands; 0.6 to 1.4 in a try, 0.93 and 1.02 over all,
# where the folded step's kernels sum in another order.
BFLOAT16_LOSS_SHARED, BFLOAT16_LOSS_TRY = 1.5, 3.0
SEEDS, DEEP_SEEDS = range(6), range(4)
LEVELS: tuple[Level, ...] = ("mlp", "full")
ALL_LEVELS: tuple[Level, ...] = ("none", *LEVELS)
# A family whose sequences have no second token trains nothing.
TRAINING = {family: sequences for family, sequences in families().items() if max(map(len, sequences)) > 1}
# Backend, dtype and family of each comparison within bounds.
CASES = [
    (backend, dtype, family)
    for backend, dtype in runs(*BOUNDS)
    for family, sequences in TRAINING.items()
    if affordable(backend, sequences)
]

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
    sign = torch.arange(len(ratio), dtype=ratio.dtype, device=ratio.device) % 2 * 2 - 1
    return -torch.minimum(ratio * sign, ratio.clamp(0.9, 1.1) * sign).mean()


STEPS = {"mean": mean_loss, "weighted": weighted_loss, "ratio": ratio_loss}


def step(
    family: str,
    level: Level,
    dtype: torch.dtype,
    backend: Backend = "sequential",
    run: Step = mean_loss,
    *,
    tied: bool = True,
    checkpointing: bool = False,
    head_into_grad: bool = False,
    batch: Batch | None = None,
    seed: int = 0,
    deep: bool = False,
) -> tuple[Tensor, Gradients]:
    """The loss and the gradients of one step over `family` at `level`, or over `batch` where it is given."""
    config = replace(DEEP if deep else CONFIG, tie_word_embeddings=tied)
    own = model(dtype, config, backend=backend, seed=seed, std=DEEP_STD if deep else None)
    own.checkpointing, own.head_into_grad = checkpointing, head_into_grad
    loss = run(own, fold_at(level, TRAINING[family]) if batch is None else batch)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in own.named_parameters() if parameter.grad is not None}
    return loss.detach(), gradients


def difference(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> float:
    """The largest relative difference of the loss and of any parameter's gradient."""
    assert found[1].keys() == expected[1].keys()
    pairs = [(found[0], expected[0]), *((found[1][name], gradient) for name, gradient in expected[1].items())]
    # Python's max would forget NaN.
    return torch.stack([((a - b).abs().max() / b.abs().max()).double() for a, b in pairs]).max().item()


class Errors(NamedTuple):
    """Of a step's loss, and of all its gradients, over the length of those that they should be."""

    loss: float
    gradients: float


# Those of an unfolded step in bfloat16, which are what folded ones are held to: a unit in the last place, 2^-8, of the
# loss, and of gradients, which have passed all layers twice, a few of them. At most 6e-4 and 1.1e-2 are found.
BFLOAT16_UNFOLDED = Errors(4e-3, 2e-2)


def errors(found: tuple[Tensor, Gradients], reference: tuple[Tensor, Gradients]) -> Errors:
    gradients = [(found[1][name], gradient) for name, gradient in reference[1].items()]
    return Errors(distance([(found[0], reference[0])]), distance(gradients))


def distance(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Of the first of all pairs from the second, over the length of these."""
    lengths = [torch.stack([(a.double() - b.double()).norm(), b.double().norm()]) for a, b in pairs]
    apart, length = torch.stack(lengths).norm(dim=0).tolist()
    return float(apart / length)


@cache
def unfolded(
    family: str, dtype: torch.dtype, backend: Backend = "sequential", *, seed: int = 0, deep: bool = False
) -> tuple[Tensor, Gradients]:
    """The step that computes every token, by default one sequence after the other."""
    return step(family, "none", dtype, backend, seed=seed, deep=deep)


@cache
def alone(family: str, dtype: torch.dtype) -> tuple[Tensor, Gradients]:
    """The step of autograd alone: logits of one sequence after the other, and torch's own cross entropy."""
    own = model(dtype)
    sequences = [sequence for sequence in TRAINING[family] if len(sequence) > 1]
    logits = [own.logits(fold_at("none", [sequence]))[:-1] for sequence in sequences]
    labels = [label for sequence in sequences for label in sequence[1:]]
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(labels, device=DEVICE))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in own.named_parameters() if parameter.grad is not None}
    return loss.detach(), gradients


def merged(family: str, level: Level, dtype: torch.dtype, backend: Backend) -> float:
    """The difference that one row makes which stands for two."""
    wrong = step(family, level, dtype, backend, batch=wrongly_folded(TRAINING[family], level))
    return difference(wrong, unfolded(family, dtype))


class Pair(NamedTuple):
    """Errors in bfloat16, against float32 with the same weights, of steps on one backend."""

    folded: Errors
    unfolded: Errors


def bfloat16_errors(family: str, level: Level, backend: Backend, *, deep: bool = False) -> list[Pair]:
    """Those of each seed."""
    pairs = []
    for seed in DEEP_SEEDS if deep else SEEDS:
        reference = unfolded(family, torch.float32, seed=seed, deep=deep)
        folded = step(family, level, torch.bfloat16, backend, seed=seed, deep=deep)
        plain = unfolded(family, torch.bfloat16, backend, seed=seed, deep=deep)
        pairs.append(Pair(errors(folded, reference), errors(plain, reference)))
    return pairs


def shared_errors(level: Level, backend: Backend, *, deep: bool) -> list[Pair]:
    """Those of all tries that share and seeds."""
    own = [family for family in TRAINING if family not in ("nothing shared", "empty and single")]
    return [pair for family in own for pair in bfloat16_errors(family, level, backend, deep=deep)]


def gradient_ratios(pairs: list[Pair]) -> list[float]:
    """The folded steps' errors over the unfolded ones'."""
    return [pair.folded.gradients / pair.unfolded.gradients for pair in pairs]


def loss_ratio(pairs: list[Pair]) -> float:
    """The same of the loss, for all of them together."""
    return typical(pair.folded for pair in pairs).loss / typical(pair.unfolded for pair in pairs).loss


def typical(found: Iterable[Errors]) -> Errors:
    """Root mean squares."""
    loss, gradients = torch.tensor(list(found), dtype=torch.float64).square().mean(0).sqrt().tolist()
    return Errors(loss, gradients)


def rounded_ratio(backend: Backend) -> float:
    """That of gradients in a deep model where one is rounded at every addition to the residual stream."""
    with patch.object(Residual, "begin", lambda values, level: Residual(values, None)):
        return mean(gradient_ratios(shared_errors("full", backend, deep=True)))


def rounded_loss_ratio(backend: Backend) -> float:
    """That of the loss where a folded step's is rounded to bfloat16."""
    exact = Qwen3.loss

    def loss(self: Qwen3, batch: Batch) -> Tensor:
        found = exact(self, batch)
        return found if batch.level == "none" else found.bfloat16()

    with patch.object(Qwen3, "loss", loss):
        return loss_ratio(shared_errors("full", backend, deep=False))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("backend", "dtype", "family"), CASES)
def test_loss_and_gradients_are_the_unfolded_ones(
    backend: Backend, dtype: torch.dtype, family: str, level: Level
) -> None:
    assert difference(step(family, level, dtype, backend), unfolded(family, dtype)) < BOUNDS[dtype]


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_gradient_that_is_no_number_is_a_difference(name: str) -> None:
    loss, right = torch.ones(()), {"a": torch.ones(2), "b": torch.ones(2)}
    wrong = right | {name: torch.tensor([1.0, torch.nan])}
    assert not difference((loss, wrong), (loss, right)) < 1
    assert difference((loss, right), (loss, right)) == 0


@pytest.mark.parametrize("run", STEPS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("head_into_grad", [True, False])
def test_every_loss(run: str, tied: bool, checkpointing: bool, head_into_grad: bool) -> None:
    expected = step("three levels", "none", torch.float64, run=STEPS[run], tied=tied)
    assert len(expected[1]) == 3 * 11 + (2 if tied else 3)
    for level in LEVELS:
        how: dict[str, Any] = {"tied": tied, "checkpointing": checkpointing, "head_into_grad": head_into_grad}
        found = step("three levels", level, torch.float64, run=STEPS[run], **how)
        assert difference(found, expected) < BOUNDS[torch.float64]


def test_checkpointing_computes_layers_again() -> None:
    own = model(torch.float32)
    own.checkpointing = True
    calls: list[str] = []
    for layer in own.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append("layer"))
    own.loss(fold_at("full", TRAINING["three levels"])).backward()  # type: ignore[no-untyped-call]
    assert len(calls) == 2 * len(own.layers)


def test_checkpointing_takes_the_same_gradients_in_bfloat16() -> None:
    """Those that come from layer to layer as well, of layers that are computed again."""
    once, again = (step("three levels", "full", torch.bfloat16, checkpointing=on) for on in (False, True))
    assert difference(again, once) < BOUNDS[torch.float32]


def test_many_copies_lose_nothing_in_bfloat16() -> None:
    """A sum in bfloat16 stops at 256, to which it cannot add 1."""
    batch = fold_at("mlp", [[5]] * 300)
    rows = torch.zeros(1, 4, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    batch.unfold(rows).sum().backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    assert rows.grad.tolist() == [[300.0] * 4]


@pytest.mark.parametrize("level", ALL_LEVELS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("family", TRAINING)
def test_the_step_is_that_of_autograd_alone(family: str, dtype: torch.dtype, level: Level) -> None:
    """An error that all levels share is one."""
    assert difference(step(family, level, dtype), alone(family, dtype)) < BOUNDS[dtype]


@pytest.mark.parametrize("family", TRAINING)
@pytest.mark.parametrize("backend", [backend for backend, _ in runs(torch.bfloat16)])
def test_unfolded_bfloat16_is_float32_rounded(backend: Backend, family: str) -> None:
    found = typical(pair.unfolded for pair in bfloat16_errors(family, "none", backend))
    assert found.loss < BFLOAT16_UNFOLDED.loss
    assert found.gradients < BFLOAT16_UNFOLDED.gradients


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", TRAINING)
@pytest.mark.parametrize("backend", [backend for backend, _ in runs(torch.bfloat16)])
def test_bfloat16_is_no_further_from_float32(backend: Backend, family: str, level: Level) -> None:
    pairs = bfloat16_errors(family, level, backend)
    ratios = gradient_ratios(pairs)
    assert mean(ratios) < BFLOAT16_MEAN
    assert max(ratios) < BFLOAT16_EACH
    assert loss_ratio(pairs) < BFLOAT16_LOSS_TRY


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", [backend for backend, _ in runs(torch.bfloat16)])
def test_sharing_takes_bfloat16_no_further(backend: Backend, level: Level, deep: bool) -> None:
    pairs = shared_errors(level, backend, deep=deep)
    assert mean(gradient_ratios(pairs)) < BFLOAT16_SHARED
    assert loss_ratio(pairs) < BFLOAT16_LOSS_SHARED


@pytest.mark.parametrize("backend", [backend for backend, _ in runs(torch.bfloat16)])
def test_rounding_at_every_addition_is_seen(backend: Backend) -> None:
    assert rounded_ratio(backend) > BFLOAT16_SHARED


@pytest.mark.parametrize("backend", [backend for backend, _ in runs(torch.bfloat16)])
def test_a_rounded_loss_is_seen(backend: Backend) -> None:
    assert rounded_loss_ratio(backend) > BFLOAT16_LOSS_SHARED


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("backend", "dtype", "family"), [case for case in CASES if case[2] in MERGEABLE])
def test_a_wrong_fold_is_seen(backend: Backend, dtype: torch.dtype, family: str, level: Level) -> None:
    assert merged(family, level, dtype, backend) > SEEN


def test_lost_copies_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass that gives a row the gradient of one of its copies instead of their sum."""

    def unfold(batch: Batch, rows: Tensor) -> Tensor:
        return rows.detach()[batch.scatter_indices].index_copy(0, batch.fold_gather.long(), rows)

    monkeypatch.setattr(Batch, "unfold", unfold)
    family = "one prompt, completions"
    assert difference(step(family, "mlp", torch.float64), unfolded(family, torch.float64)) > 1e-3


COLUMNS = [(level, dtype) for dtype in BOUNDS for level in ALL_LEVELS]


def report(family: str, backend: Backend) -> tuple[str, bool]:
    """A row of the table, and whether all of it is as it should be."""
    cells, right = [""] * (len(COLUMNS) + 1), []
    for place, (level, dtype) in enumerate(COLUMNS):
        if (backend, dtype, family) not in CASES or (level == "none" and backend != "sequential"):
            continue
        if level == "none":
            found = difference(unfolded(family, dtype), alone(family, dtype))
        else:
            found = difference(step(family, level, dtype, backend), unfolded(family, dtype))
        cells[place] = f"{found:.1e}"
        right.append(found < BOUNDS[dtype])
    if (backend, torch.float32, family) in CASES and family in MERGEABLE:
        found = merged(family, "full", torch.float32, backend)
        cells[-1] = f"{found:.1e}"
        right.append(found > SEEN)
    return line(family, backend, cells), all(right)


def bfloat16_report(family: str, backend: Backend) -> tuple[str, bool]:
    """The same of a try in bfloat16."""
    found = [bfloat16_errors(family, level, backend) for level in LEVELS]
    plain, right = typical(pair.unfolded for pair in found[0]), []
    for pairs in found:
        ratios = gradient_ratios(pairs)
        right += [mean(ratios) < BFLOAT16_MEAN, max(ratios) < BFLOAT16_EACH, loss_ratio(pairs) < BFLOAT16_LOSS_TRY]
    right += [plain.loss < BFLOAT16_UNFOLDED.loss, plain.gradients < BFLOAT16_UNFOLDED.gradients]
    return line(family, backend, bfloat16_cells(found)), all(right)


def shared_report(backend: Backend, *, deep: bool) -> tuple[str, bool]:
    """The same of all that share."""
    found = [shared_errors(level, backend, deep=deep) for level in LEVELS]
    right = [mean(gradient_ratios(pairs)) < BFLOAT16_SHARED for pairs in found]
    right += [loss_ratio(pairs) < BFLOAT16_LOSS_SHARED for pairs in found]
    name = f"{(DEEP if deep else CONFIG).num_hidden_layers} layers, all that share"
    return line(name, backend, bfloat16_cells(found)), all(right)


def bfloat16_cells(found: list[list[Pair]]) -> list[str]:
    """The errors of unfolded steps, and the ratios of each level."""
    plain = typical(pair.unfolded for pair in found[0])
    gradients = [f"{mean(gradient_ratios(pairs)):.3f}" for pairs in found]
    losses = [f"{loss_ratio(pairs):.3f}" for pairs in found]
    return [f"{plain.gradients:.1e}", *gradients, f"{plain.loss:.1e}", *losses]


def line(name: str, backend: str, cells: list[str]) -> str:
    return f"{name:26} {backend:12}" + "".join(cell.rjust(11) for cell in cells)


def main() -> None:
    titles = [f"{level}, {NAMES[dtype]}" for level, dtype in COLUMNS]
    print(line("largest difference", "backend", [*titles, "row merged"]))
    broken = False
    for family, sequences in TRAINING.items():
        for backend in DTYPES:
            if affordable(backend, sequences):
                row, right = report(family, backend)
                print(row)
                broken |= not right
    limits = [f"{NAMES[dtype]} below {bound:.0e}" for dtype, bound in BOUNDS.items()]
    print("none: from autograd alone; mlp, full: from none", *limits, f"merged above {SEEN}", sep=", ")
    print()
    print(line("bf16: error against f32", "backend", ["gradients", *LEVELS, "loss", *LEVELS]))
    for backend, _ in runs(torch.bfloat16):
        rows = [bfloat16_report(family, backend) for family in TRAINING]
        rows += [shared_report(backend, deep=deep) for deep in (False, True)]
        for row, right in rows:
            print(row)
            broken |= not right
        rounded, rounded_loss = rounded_ratio(backend), rounded_loss_ratio(backend)
        print(line("rounded at every addition", backend, ["", "", f"{rounded:.3f}"]))
        print(line("loss rounded", backend, [""] * 5 + [f"{rounded_loss:.3f}"]))
        broken |= not (rounded > BFLOAT16_SHARED and rounded_loss > BFLOAT16_LOSS_SHARED)
    print(f"unfolded gradients below {BFLOAT16_UNFOLDED.gradients}, losses below {BFLOAT16_UNFOLDED.loss}")
    print(f"mlp, full: over these; gradients below {BFLOAT16_SHARED} over all that share, rounded above,", end=" ")
    print(f"below {BFLOAT16_MEAN} in the mean of a try's seeds, each below {BFLOAT16_EACH};", end=" ")
    print(f"losses below {BFLOAT16_LOSS_SHARED} over all that share, rounded above, below {BFLOAT16_LOSS_TRY} in a try")
    sys.exit(broken)


if __name__ == "__main__":
    main()
