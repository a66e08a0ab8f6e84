"""The kernels of the loss against torch in float64, and the loss with them against the loss without.

Without a GPU Triton interprets them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from radix_mlp import Fold
from radix_mlp.torch import Head, cross_entropy, log_probs, next_token_labels
from radix_mlp.torch.softmax import BLOCK, logsumexp, softmax_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# float32 sums of some thousand terms; what the others store has 11 and 8 bits.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SEQUENCES = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4], [1, 2], [], [6], [1, 2, 5, 7, 8]]


def use_kernels(patch: pytest.MonkeyPatch, yes: bool) -> None:
    patch.setattr("radix_mlp.torch.softmax.runs_on", lambda _device: yes)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("columns", [1, 7, BLOCK, 2 * BLOCK + 3])
def test_rows_are_those_of_float64(monkeypatch: pytest.MonkeyPatch, columns: int, dtype: torch.dtype) -> None:
    use_kernels(monkeypatch, True)
    torch.manual_seed(columns)
    # Rows of a wider tensor, one of them far from 0, and masked logits, a whole block of them at both ends.
    wide = 10 * torch.randn(5, columns + 8, device=DEVICE).to(dtype)
    wide[2] += 1000
    if columns > BLOCK:
        wide[3, :BLOCK] = wide[4, columns - BLOCK - 1 :] = float("-inf")
    logits = wide[:, :columns]
    expected = logits.double().logsumexp(-1)
    lse = logsumexp(logits)
    assert lse.dtype == torch.float32
    assert ((lse - expected).abs() <= 1e-6 * (1 + expected.abs())).all()

    factor, shift = torch.randn(2, 5, device=DEVICE)
    wanted = (logits.double() - expected[:, None]).exp() * factor[:, None] - shift[:, None]
    beside = wide[:, columns:].clone()
    softmax_(logits, lse, factor, shift)
    # The row at 1000 has a logsumexp of 7 digits.
    limit = (
        BOUNDS[dtype] * (factor.abs() + shift.abs())[:, None] + 1e-3 * (torch.arange(5, device=DEVICE) == 2)[:, None]
    )
    assert ((logits - wanted).abs() <= limit).all()
    assert torch.equal(wide[:, columns:], beside)


def gradients(function: Any, *parameters: Tensor, **options: Any) -> list[Tensor]:
    """Value and gradients of the sum of `function`, whose labels often repeat and are sometimes likely."""
    fold = Fold.from_sequences(SEQUENCES, layout="depth_first")
    ids = torch.tensor([token for own in SEQUENCES for token in own])
    labels = next_token_labels(ids, torch.from_numpy(fold.cu_seq_lengths.astype("int64"))).to(DEVICE)
    leaves = [parameter.detach().requires_grad_() for parameter in parameters]
    head = Head(leaves[1], leaves[2] if len(leaves) > 2 else None)
    value = function(leaves[0], head, fold, labels, **options)
    upstream = torch.arange(value.numel(), device=value.device).view(value.shape).to(value.dtype) + 1
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


@pytest.mark.parametrize(
    ("function", "options"),
    [(cross_entropy, {}), (cross_entropy, {"label_smoothing": 0.1, "z_loss": 1e-2}), (log_probs, {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_no_further_from_float64_with_kernels(
    monkeypatch: pytest.MonkeyPatch, function: Any, options: dict[str, float], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows = Fold.from_sequences(SEQUENCES).num_rows
    shapes = [(rows, 64), (BLOCK + 5, 64), (BLOCK + 5,)]
    parameters = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    truth = gradients(function, *(parameter.double() for parameter in parameters), **options)
    errors = []
    for kernels in (False, True):
        use_kernels(monkeypatch, kernels)
        found = gradients(function, *parameters, **options)
        errors.append([float((x.double() - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)])
    for without, with_kernels in zip(*errors, strict=True):
        # Both round logits and gradients to the dtype; what lies between is float32 in both.
        assert with_kernels <= 1.1 * without + 1e-6
