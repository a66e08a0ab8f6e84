"""The loss where states, heads, weights or gradients have 16 bits, and where copies are many."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from radix_mlp import Fold
from radix_mlp.torch import Head, cross_entropy, log_probs
from radix_mlp.torch.logits import add_sums
from test_loss import HIDDEN, VOCABULARY, assert_close, make_logits_again, packed

SEQUENCE = [1, 2, 3, 4, 5, 6, 7, 8]
# More than bfloat16 counts one by one, and no number of bfloat16.
COPIES = 1003


def test_sums_are_rounded_once_where_a_head_has_fewer_bits() -> None:
    torch.manual_seed(0)
    weight = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    weight.grad, total, by = torch.randn_like(weight), torch.randn(VOCABULARY, HIDDEN), torch.tensor(3.1)
    expected = (weight.grad.float() + by * total).bfloat16()
    add_sums(Head(weight), (total, None), by)
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("function", [cross_entropy, log_probs])
def test_states_of_more_bits_than_the_head_get_such_gradients(
    monkeypatch: pytest.MonkeyPatch, function: Any, again: bool
) -> None:
    """Logits and their gradients are bfloat16, and nothing is rounded after them, the mean included."""
    if again:
        make_logits_again(monkeypatch)
    monkeypatch.setattr("radix_mlp.torch.labels.MAX_LOGITS", 2 * VOCABULARY)
    fold, labels = packed([[1, 2, 3, 4, 5, 6, 7, 8]], "depth_first")
    torch.manual_seed(0)
    hidden = torch.randn(fold.num_rows, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN).bfloat16().requires_grad_()
    gradient, of_weight = torch.autograd.grad(function(hidden, weight, fold, labels).sum(), (hidden, weight))
    # Seven tokens predict something, in rows of their order.
    states = hidden.detach()[:7].bfloat16()
    logits = (states @ weight.detach().t()).float()
    one_hot = functional.one_hot(labels[:7], VOCABULARY)
    by = 7 if function is cross_entropy else -1
    of_logits = (logits.softmax(-1) - one_hot).bfloat16().float() / by
    assert_close(gradient[:7], of_logits @ weight.detach().float())
    assert (gradient[7:] == 0).all()
    assert_close(of_weight.float(), (of_logits.t() @ states.float()).bfloat16().float())


@pytest.mark.parametrize("again", [False, True])
def test_a_scaled_loss_stays_within_float16(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """As GradScaler scales it: by more than float16 could hold if gradients of logits were not divided first."""
    if again:
        make_logits_again(monkeypatch)
    fold, labels = packed([[1, 2, 3, 4, 5, 6, 7, 8]] * 64, "depth_first")
    torch.manual_seed(0)
    hidden = (torch.randn(fold.num_rows, HIDDEN) / 8).half().requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).half().requires_grad_()
    found = torch.autograd.grad(2.0**15 * cross_entropy(hidden, weight, fold, labels), (hidden, weight))
    states, head = (x.detach().float().requires_grad_() for x in (hidden, weight))
    expected = torch.autograd.grad(2.0**15 * cross_entropy(states, head, fold, labels), (states, head))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.isfinite().all()
        assert (mine - theirs).norm() < 2e-3 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_loss_is_scaled_by_is_not_rounded(dtype: torch.dtype) -> None:
    """Nor does it leave float16's range, as GradScaler's first scale would."""
    fold, labels = packed([SEQUENCE], "depth_first")
    torch.manual_seed(0)
    logits = torch.randn(fold.num_rows, VOCABULARY).to(dtype).requires_grad_()

    def gradient(by: float) -> Tensor:
        (found,) = torch.autograd.grad(cross_entropy(logits, None, fold, labels) * by, logits)
        return found

    for by in (1 / 3, 1 / 7, 2.0**16):
        found = gradient(by)
        assert found.isfinite().all()
        assert torch.equal(found, (gradient(1.0).float() * torch.tensor(by)).to(dtype))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("weighted", ["counted", "weights", "sequence_weights"])
def test_copies_are_counted_beyond_what_16_bits_count(
    monkeypatch: pytest.MonkeyPatch, weighted: str, again: bool
) -> None:
    if again:
        make_logits_again(monkeypatch)
    one, many = (packed([SEQUENCE] * copies, "depth_first") for copies in (1, COPIES))
    torch.manual_seed(0)
    hidden = torch.randn(len(SEQUENCE), HIDDEN).bfloat16().requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).bfloat16().requires_grad_()
    ones = {"weights": COPIES * len(SEQUENCE), "sequence_weights": COPIES, "counted": 0}[weighted]
    given: dict[str, Any] = {weighted: torch.ones(ones)} if ones else {}
    of_one = cross_entropy(hidden, weight, *one, reduction="sum")
    of_many = cross_entropy(hidden, weight, *many, reduction="sum", **given)
    # Of products in bfloat16, and sums of float32 that are rounded to it once.
    torch.testing.assert_close(of_many, COPIES * of_one, rtol=1e-5, atol=0)
    expected = torch.autograd.grad(of_one, (hidden, weight))
    for found, own in zip(torch.autograd.grad(of_many, (hidden, weight)), expected, strict=True):
        assert (found.float() / COPIES - own.float()).norm() < 2.0**-8 * own.float().norm()


def test_many_chunks_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a sum of equal terms stops to grow where a term is half of its last bit."""
    monkeypatch.setattr("radix_mlp.torch.labels.MAX_LOGITS", VOCABULARY)
    tokens = list(range(600))
    fold = Fold.from_sequences([tokens], layout="depth_first")
    labels = torch.full((len(tokens),), 3)
    torch.manual_seed(0)
    states = torch.randn(HIDDEN).bfloat16().expand(len(tokens), -1)
    weight, bias = torch.randn(VOCABULARY, HIDDEN).bfloat16(), torch.randn(VOCABULARY).bfloat16()

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        own = weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()
        loss = cross_entropy(states.to(dtype), Head(own[0], own[1]), fold, labels, reduction="sum")
        return torch.autograd.grad(loss, own)

    for mine, theirs in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert (mine - theirs).norm() < 2.0**-6 * theirs.norm()


@pytest.mark.parametrize("function", [cross_entropy, log_probs])
def test_another_label_is_ignored(function: Any) -> None:
    fold, labels = packed([SEQUENCE, SEQUENCE[:3]], "depth_first")
    torch.manual_seed(0)
    logits = torch.randn(fold.num_rows, VOCABULARY)
    expected = function(logits, None, fold, labels.masked_fill(labels == 7, -100))
    assert_close(function(logits, None, fold, labels.masked_fill(labels == -100, 7), ignore_index=7), expected)
    with pytest.raises(ValueError, match=r"labels\[7\] is -100"):
        function(logits, None, fold, labels, ignore_index=7)
