"""Attention under torch.compile, one operation for all folds, against attention as it is."""

import gc
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from radix_mlp import Fold
from radix_mlp.torch import attention, dispatch, fold_handle, sequential
from radix_mlp.torch import operator as operator_module
from radix_mlp.torch.sequential import MAX_SCORES
from test_attention import DEVICE, FLOAT32, Options, compare, folds, needs_cuda, optional, shapes, tensors, three_levels

# What torch.compile leaves out where it compiles nothing: its graph, and the operation's own gradient, stay.
COMPILER = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def layer(q: Tensor, k: Tensor, v: Tensor, fold: Tensor, **options: Any) -> Tensor:
    return attention(q, k, v, fold, **options)


def compiled(**options: Any) -> Any:
    """Attention in a graph that must not break."""
    return torch.compile(partial(layer, **options), backend=COMPILER, dynamic=True, fullgraph=True)


def same(fold: Fold, qkv: list[Tensor], tolerance: float, options: Options, backend: Any) -> None:
    """The compiled operation's outputs and gradients within `tolerance` of those of every copy."""
    torch.compiler.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, fold: Fold, **given: Any) -> Any:
        return compiled(**given)(q, k, v, fold_handle(fold))

    compare(fold, qkv, tolerance, options, backend, attend)


@settings(max_examples=20)
@given(folds("first_occurrence"), shapes, st.fixed_dictionaries(optional))
def test_the_operation_equals_every_copy(fold: Fold, shape: tuple[int, int, int], options: Options) -> None:
    same(fold, tensors(fold, *shape), FLOAT32, options, "sequential")
    same(fold, tensors(fold, *shape, torch.float64), 1e-12, options, "sequential")


@settings(max_examples=10)
@given(folds("depth_first"), shapes, st.fixed_dictionaries(optional))
def test_the_trees_operation_equals_every_copy(fold: Fold, shape: tuple[int, int, int], options: Options) -> None:
    pytest.importorskip("triton")
    same(fold, tensors(fold, *shape), FLOAT32, options, "tree")


# bfloat16 has 8 bits: its products are rounded to 2^-9, and sums of them are a few times as far off.
@needs_cuda
@pytest.mark.parametrize("layout", ["first_occurrence", "depth_first"])
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("backend", [None, "query_folded"])
def test_a_gpus_operations_equal_every_copy(layout: Any, window: int | None, backend: Any) -> None:
    sequences = [[1] * 40, [1] * 40 + [2] * 30, [3] * 5, [1] * 40 + [2] * 9]
    for fold in (three_levels(layout), Fold.from_sequences(sequences, layout=layout, pad_multiple_of=64)):
        same(fold, tensors(fold, 4, 2, 64, torch.bfloat16), 2e-2, {"window": window}, backend)


@pytest.mark.parametrize("backend", ["sequential", "tree"])
def test_one_graph_serves_all_folds(backend: Any) -> None:
    if backend == "tree":
        pytest.importorskip("triton")
    run = compiled(backend=backend)
    for sequences in ([[1, 2, 3], [1, 2, 4]], [[5] * 40], [[1], [2]], [[1] * 9, [1] * 200, [2] * 3]):
        fold = Fold.from_sequences(sequences, layout="depth_first")
        q, k, v = tensors(fold, 2, 2, 8)
        run(q, k, v, fold_handle(fold)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_long_sequences_have_gradients_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many scores at once as attention itself may hold."""
    fold = three_levels("first_occurrence")
    monkeypatch.setattr(sequential, "MAX_SCORES", 4 * 260 * 10)
    assert MAX_SCORES > sequential.MAX_SCORES
    largest, weights = 0, sequential._weights

    def spy(*given: Any) -> Any:
        nonlocal largest
        made = weights(*given)
        largest = max(largest, made[0].numel())
        return made

    monkeypatch.setattr(sequential, "_weights", spy)
    for window in (None, 50):
        same(fold, tensors(fold, 4, 2, 16, torch.float64), 1e-12, {"window": window}, "sequential")
    assert 0 < largest <= 4 * 260 * 10


def test_nothing_is_kept_for_a_backward_pass_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[bool] = []
    choose = dispatch.choose

    def spy(*given: Any, training: bool) -> Any:
        trained.append(training)
        return choose(*given, training=training)

    monkeypatch.setattr(operator_module, "choose", spy)
    fold = three_levels("depth_first")
    run, handle, qkv = compiled(), fold_handle(fold), tensors(fold, 2, 2, 8)
    with torch.no_grad():
        plain = run(*qkv, handle)
    torch.testing.assert_close(run(*qkv, handle), plain)
    assert trained == [False, True]


@pytest.mark.parametrize("run", [layer, compiled()], ids=["eager", "compiled"])
def test_gradients_of_many_copies_are_added_in_float32(run: Any) -> None:
    """A prompt's value has half of each of 300 completions: a sum in bfloat16 stops at 128, where a half is lost."""
    fold = Fold.from_sequences([[1, 2 + i] for i in range(300)], layout="depth_first")
    q, k, v = (torch.zeros(fold.num_rows, 1, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    run(q, k, v, fold_handle(fold), backend="sequential").sum().backward()
    assert v.grad is not None
    assert v.grad[0, 0].tolist() == [151.0] * 8


def test_the_operation_says_the_truth_of_itself() -> None:
    """Shapes, strides and gradients by torch's own checks of operations."""
    fold = three_levels("depth_first")
    q, k, v = tensors(fold, 4, 2, 16)
    strided = q.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for qkv in ((q, k, v), (strided, k, v), (q.double(), k.double(), v.double())):
        given = (*qkv, fold_handle(fold), 0.25, 2.0, 40, "sequential", True)
        # What comes beside the output is no function of the input that could be differentiated, or be compared.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator_module.attention_operation, given, test_utils=tests)


def test_a_handle_keeps_its_fold_until_the_backward_pass() -> None:
    fold = three_levels("depth_first")
    q, k, v = tensors(fold, 2, 2, 8)
    alive = weakref.ref(fold)
    out = compiled()(q, k, v, fold_handle(fold)).sum()
    del fold
    gc.collect()
    assert alive() is not None
    out.backward()
    del out
    gc.collect()
    assert alive() is None


def test_nothing_but_its_handle_keeps_a_fold() -> None:
    fold = three_levels("depth_first")
    handle, alive = fold_handle(fold), weakref.ref(fold)
    number = handle.clone()
    # Without a cycle that would wait for the collector.
    gc.disable()
    try:
        del fold
        assert alive() is not None
        del handle
        assert alive() is None
    finally:
        gc.enable()
    q = torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match=f"no fold has the handle {number.item()}"):
        attention(q, q, q, number)


@pytest.mark.parametrize(
    "handle", [torch.zeros(1), torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int64)]
)
def test_other_tensors_are_no_handles(handle: Tensor) -> None:
    q = torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="fold must be a Fold or its fold_handle, int64 \\[1\\]"):
        attention(q, q, q, handle)


def test_a_handle_serves_where_nothing_is_compiled() -> None:
    fold = three_levels("depth_first")
    q, k, v = tensors(fold, 2, 2, 8)
    torch.testing.assert_close(attention(q, k, v, fold_handle(fold)), attention(q, k, v, fold), rtol=0, atol=0)


def test_bad_options_are_told_when_a_graph_runs() -> None:
    fold = three_levels("depth_first")
    q, k, v = tensors(fold, 3, 2, 8)
    with pytest.raises(ValueError, match="heads of q a multiple"):
        compiled()(q, k, v, fold_handle(fold))
    with pytest.raises(ValueError, match="backend must be one of"):
        compiled(backend="fast")(k, k, v, fold_handle(fold))


def test_an_empty_batch_is_compiled() -> None:
    fold = Fold.from_sequences([], layout="depth_first")
    q = torch.zeros(0, 2, 8, device=DEVICE, requires_grad=True)
    out = compiled()(q, q, q, fold_handle(fold))
    out.sum().backward()
    assert out.shape == (0, 2, 8)
