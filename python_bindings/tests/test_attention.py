"""Attention over a fold against attention of every copy, by definition, in float64."""

import gc
import math
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from radix_mlp import Fold
from radix_mlp.torch import attention, pick_backend, walks
from radix_mlp.torch.dispatch import attended
from radix_mlp.torch.flash import Gather, varlen
from radix_mlp.torch.sequential import MAX_SCORES, paths

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
# Without a GPU, Triton interprets its kernels on the CPU.
DEVICE = "cuda" if CUDA else "cpu"

Options = dict[str, Any]


def oracle(q: Tensor, k: Tensor, v: Tensor, fold: Fold, options: Options) -> Tensor:
    """[N, heads, head_dim]: softmax over all scores of each sequence, in float64."""
    q, k, v = (fold.unfold(x).double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    softcap, window = options.get("softcap"), options.get("window")
    outputs: list[Tensor] = []
    for start, end in zip(fold.cu_seq_lengths[:-1].tolist(), fold.cu_seq_lengths[1:].tolist(), strict=True):
        keys, values = (x[start:end].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * options.get("scale", q.shape[-1] ** -0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & (distance < (window or end))
        weights = scores.masked_fill(~seen.to(scores.device), -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


def tensors(fold: Fold, heads: int, kv_heads: int, head_dim: int, dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(fold.num_rows)
    shapes = [(fold.num_rows, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(DEVICE, dtype).requires_grad_() for x in drawn]


def compare(
    fold: Fold, qkv: list[Tensor], tolerance: float, options: Options, backend: Any, attend: Any = attention
) -> None:
    """Outputs and gradients of `attend` within `tolerance` of the oracle's largest value, and of 1."""
    q, k, v = qkv
    expected = oracle(q, k, v, fold, options)
    found = fold.unfold(attend(q, k, v, fold, backend=backend, **options))
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    for mine, theirs in zip((found, *gradients), (expected, *wanted), strict=True):
        assert torch.isfinite(mine).all()
        assert (mine.double() - theirs.double()).abs().max() <= tolerance * (1 + theirs.double().abs().max())


@st.composite
def folds(draw: st.DrawFn, layout: Any) -> Fold:
    """Sequences of few tokens, so that they share, branch, repeat and are prefixes of each other."""
    prefixes = draw(st.lists(st.lists(st.integers(0, 1), max_size=30), min_size=1, max_size=3))
    suffix = st.lists(st.integers(0, 1), max_size=20)
    sequences = draw(st.lists(st.tuples(st.sampled_from(prefixes), suffix), min_size=1, max_size=5))
    joined = [a + b for a, b in sequences]
    if not any(joined):
        joined.append([0])
    return Fold.from_sequences(joined, layout=layout, pad_multiple_of=draw(st.sampled_from([None, 8])))


optional = {"softcap": st.sampled_from([None, 2.0]), "window": st.sampled_from([None, 1, 5, 17])}
shapes = st.sampled_from([(2, 2, 16), (4, 2, 8), (3, 1, 24), (32, 1, 16)])

# float32: sums of up to 50 products in another order; gradients add a few times as many.
FLOAT32 = 2e-5


@given(st.sampled_from(["first_occurrence", "depth_first"]).flatmap(folds), shapes, st.fixed_dictionaries(optional))
def test_sequential_equals_every_copy(fold: Fold, shape: tuple[int, int, int], options: Options) -> None:
    compare(fold, tensors(fold, *shape), FLOAT32, options, "sequential")
    compare(fold, tensors(fold, *shape, torch.float64), 1e-12, options, "sequential")


@settings(max_examples=25)
@given(folds("depth_first"), shapes, st.fixed_dictionaries(optional), st.booleans())
def test_tree_equals_every_copy(fold: Fold, shape: tuple[int, int, int], options: Options, split: bool) -> None:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if split:
            split_walks(patch)
        compare(fold, tensors(fold, *shape), FLOAT32, options, "tree")


def split_walks(patch: pytest.MonkeyPatch) -> None:
    """Make every walk of the key gradient a single step."""
    patch.setattr(walks, "MIN_WALK", 1)
    patch.setattr("radix_mlp.torch.tree.PROGRAMS", 10**9)


def three_levels(layout: Any) -> Fold:
    """Long enough for whole blocks of every kind: above, beside and beyond a window."""
    draw = np.random.default_rng(0).integers
    root = draw(0, 9, 150).tolist()
    branches = [root + draw(0, 9, 70).tolist() for _ in range(2)]
    return Fold.from_sequences([b + draw(0, 9, 40).tolist() for b in branches for _ in range(3)], layout=layout)


LONG_OPTIONS: list[Options] = [{}, {"window": 33}, {"softcap": 3.0}, {"scale": 0.5, "window": 100}]


@pytest.mark.parametrize("options", LONG_OPTIONS)
def test_parts_of_long_walks_are_added(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    split_walks(monkeypatch)
    fold = three_levels("depth_first")
    compare(fold, tensors(fold, 4, 2, 16), FLOAT32, options, "tree")


def test_tree_computes_the_same_without_gradients() -> None:
    pytest.importorskip("triton")
    fold = three_levels("depth_first")
    q, k, v = tensors(fold, 4, 2, 16)
    expected = attention(q, k, v, fold, backend="tree")
    with torch.no_grad():
        # Last dimensions that are not contiguous.
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        assert torch.equal(attention(q, k, v, fold, backend="tree"), expected)


def test_more_key_heads_than_start_together() -> None:
    """The last of them are fewer than the others."""
    pytest.importorskip("triton")
    fold = Fold.from_sequences([[1] * 40 + [2, 3], [1] * 40 + [4]], layout="depth_first")
    compare(fold, tensors(fold, 20, 20, 8), FLOAT32, {}, "tree")


@pytest.mark.parametrize("options", LONG_OPTIONS)
@pytest.mark.parametrize("backend", ["tree", "sequential"])
def test_long_tries(options: Options, backend: str) -> None:
    if backend == "tree":
        pytest.importorskip("triton")
    fold = three_levels("depth_first")
    compare(fold, tensors(fold, 4, 2, 16), FLOAT32, options, backend)


# float16 keeps 11 bits: a rounding of the weights and of the output, 2**-11 each, and in gradients once more.
@pytest.mark.parametrize("shape", [(4, 2, 16), (3, 1, 24), (2, 1, 136)])
def test_tiles_of_half_precision(shape: tuple[int, int, int]) -> None:
    """Larger than those of float32, the query gradient's parts of the forward pass's, the key gradient's of large
    heads of more keys."""
    pytest.importorskip("triton")
    fold = three_levels("depth_first")
    compare(fold, tensors(fold, *shape, torch.float16), 3e-3, {}, "tree")


# bfloat16 keeps 8 bits: a rounding of the weights and of the output, 2**-8 each, and in gradients once more.
@needs_cuda
@pytest.mark.parametrize("backend", ["tree", "query_folded", None])
@pytest.mark.parametrize("shape", [(16, 8, 128), (4, 1, 64), (7, 1, 96), (2, 1, 256)])
@pytest.mark.parametrize("window", [None, 33])
def test_half_precision_on_cuda(backend: Any, shape: tuple[int, int, int], window: int | None) -> None:
    fold = three_levels("depth_first")
    compare(fold, tensors(fold, *shape, torch.bfloat16), 2e-2, {"window": window}, backend)


def test_gradients_of_many_copies_are_added_in_float32() -> None:
    """A sum in bfloat16 stops at 256, to which it cannot add 1: a GPU's does, a CPU's is in float32 by itself."""
    summed: list[torch.dtype] = []

    class Sums(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.index_add_.default:
                summed.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with Sums():  # type: ignore[no-untyped-call]
        Gather.backward(
            SimpleNamespace(saved_tensors=[torch.tensor([0])], count=1), torch.ones(1, dtype=torch.bfloat16)
        )
    assert summed == [torch.float32]
    rows = torch.zeros(2, 1, 4, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    copies: Tensor = Gather.apply(rows, torch.tensor([1] * 300 + [0], device=DEVICE))  # type: ignore[no-untyped-call]
    copies.sum().backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    assert rows.grad.dtype == torch.bfloat16
    assert rows.grad[:, 0].tolist() == [[1.0] * 4, [300.0] * 4]


@needs_cuda
def test_query_folded_takes_either_layout() -> None:
    first, tree = three_levels("first_occurrence"), three_levels("depth_first")
    q, k, v = tensors(first, 4, 2, 64, torch.bfloat16)
    assert tree.row_order is not None
    order = torch.from_numpy(tree.row_order.astype(np.int64)).to(DEVICE)
    expected = attention(q, k, v, first, backend="query_folded")[order]
    assert torch.equal(attention(q[order], k[order], v[order], tree, backend="query_folded"), expected)


@needs_cuda
def test_query_folded_has_the_bits_of_every_copy() -> None:
    """FlashAttention computes each query of its own: the tile it falls into changes nothing."""
    fold = three_levels("first_occurrence")
    copies = Fold.from_sequences(
        [fold.unfold(fold.input_ids)[a:b] for a, b in zip(fold.cu_seq_lengths, fold.cu_seq_lengths[1:], strict=False)],
        salts=range(fold.num_sequences),
    )
    q, k, v = tensors(fold, 4, 2, 64, torch.bfloat16)
    whole = attention(fold.unfold(q), fold.unfold(k), fold.unfold(v), copies, backend="query_folded")
    assert torch.equal(fold.unfold(attention(q, k, v, fold, backend="query_folded")), whole)


def test_memory_is_bounded_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = three_levels("first_occurrence")
    q, k, v = tensors(fold, 4, 2, 16)
    whole = attention(q, k, v, fold, backend="sequential")
    largest = 0
    compute = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, q.shape[1] * q.shape[2] * k.shape[2])
        return compute(q, k, *rest, **options)

    monkeypatch.setattr("radix_mlp.torch.sequential.scaled_dot_product_attention", spy)
    monkeypatch.setattr("radix_mlp.torch.sequential.MAX_SCORES", 4 * 260 * 10)
    chunked = attention(q, k, v, fold, backend="sequential")
    assert (chunked - whole).abs().max() < FLOAT32
    assert 4 * 260 < largest <= 4 * 260 * 10 < MAX_SCORES


def test_compiled_models_attend() -> None:
    """The graph breaks around attention, once for all folds: what a fold has is for the host to read."""

    def layer(x: Tensor, fold: Fold) -> Tensor:
        return attention(2 * x, x, x, fold) + 1

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, backend="eager", dynamic=True)
    for length in (3, 9, 40, 41):
        fold = Fold.from_sequences([[1] * length, [1, 2]])
        x = tensors(fold, 2, 2, 8)[0].detach()
        torch.testing.assert_close(compiled(x, fold), layer(x, fold))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_fold_keeps_what_is_made_of_it() -> None:
    """Every layer asks for it."""
    fold, device = three_levels("depth_first"), torch.device("cpu")
    assert varlen(fold, device) is varlen(fold, device)
    assert paths(fold, device) is paths(fold, device)


def test_an_empty_batch_attends() -> None:
    fold = Fold.from_sequences([], layout="depth_first")
    q = torch.zeros(0, 2, 8)
    assert attention(q, q, q, fold).shape == (0, 2, 8)


def test_cpu_takes_the_exact_path() -> None:
    fold = three_levels("depth_first")
    q, k, v = (x.double().cpu() for x in tensors(fold, 4, 2, 16))
    assert pick_backend(q, k, v, fold) == "sequential"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (5, 2, 8)}, r"q must be \[4, heads, head_dim\], got shape \(5, 2, 8\)"),
        ({"v": (3, 2, 8)}, r"v must be \[4, heads, head_dim\], got shape \(3, 2, 8\)"),
        ({"k": (4, 16)}, r"k must be \[4, heads, head_dim\]"),
        ({"q": (4, 3, 8)}, "heads of q a multiple"),
        ({"k": (4, 2, 16), "v": (4, 2, 16)}, "heads of q a multiple"),
        ({"window": 0}, "window must be a positive integer, got 0"),
        ({"window": 2.5}, r"window must be a positive integer, got 2\.5"),
        ({"scale": math.nan}, "scale must be positive, got nan"),
        ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ({"softcap": math.inf}, "softcap must be positive, got inf"),
        ({"backend": "magic"}, r"backend must be one of tree, query_folded, sequential, got 'magic'"),
        ({"backend": "query_folded"}, r"'query_folded' (runs on CUDA, got cpu|takes float16 and bfloat16)"),
        ({"backend": "tree"}, r"'tree' (runs on CUDA, got cpu|needs a fold in depth_first layout)"),
    ],
)
def test_errors_name_what_is_wrong(change: Options, message: str) -> None:
    fold = Fold.from_sequences([[1, 2, 3], [1, 2, 4]])
    shapes = {"q": (4, 2, 8), "k": (4, 2, 8), "v": (4, 2, 8)}
    options = {name: value for name, value in change.items() if name not in shapes}
    shapes |= {name: value for name, value in change.items() if name in shapes}
    q, k, v = (torch.zeros(shape, device=DEVICE) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, fold, **options)
    assert not attended(fold)


def test_what_is_no_fold_is_named() -> None:
    q = torch.zeros(4, 2, 8, device=DEVICE)
    with pytest.raises(TypeError, match="fold must be a Fold or the tensor that stands for one, got NoneType"):
        attention(q, q, q, None)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is CUDA")
def test_interpreted_kernels_have_no_bfloat16() -> None:
    """Triton's interpreter would return numbers without meaning."""
    pytest.importorskip("triton")
    q = torch.zeros(2, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'tree' takes float16 and float32 where Triton interprets it"):
        attention(q, q, q, Fold.from_sequences([[1, 2]], layout="depth_first"), backend="tree")


def test_more_heads_than_a_tile_has_are_refused() -> None:
    pytest.importorskip("triton")
    fold = Fold.from_sequences([[1, 2]], layout="depth_first")
    q, k, v = tensors(fold, 71, 1, 16)
    with pytest.raises(
        ValueError, match=r"'tree' takes up to 64 query heads for each key head of torch.float32, got 71"
    ):
        attention(q, k, v, fold, backend="tree")
    compare(fold, [q, k, v], FLOAT32, {}, None)


def test_mixed_dtypes_are_refused() -> None:
    fold = Fold.from_sequences([[1, 2]])
    q = torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match=r"v is torch.float16 on cpu, but q is torch.float32"):
        attention(q, q, q.half(), fold)


@pytest.mark.parametrize("backend", ["tree", "sequential"])
def test_a_fold_goes_with_its_last_reference(backend: Any) -> None:
    """What attention keeps with a fold must not keep the fold: masks are device memory, which no collector looks at."""
    if backend == "tree":
        pytest.importorskip("triton")
    fold = Fold.from_sequences([[1, 2], [1, 3]], layout="depth_first")
    q, k, v = tensors(fold, 2, 1, 16)
    compare(fold, [q, k, v], FLOAT32, {}, backend)
    alive = weakref.ref(fold)
    gc.disable()
    try:
        del fold
        assert alive() is None
    finally:
        gc.enable()


class Spy:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("windowed", [False, True])
def test_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch, windowed: bool) -> None:
    pytest.importorskip("triton")
    from radix_mlp.torch import kernels, tree

    names = ("forward", "query_gradient", "key_gradient", "add_parts")
    spies = {name: Spy(getattr(kernels, name)) for name in names}
    for name, spy in spies.items():
        monkeypatch.setattr(kernels, name, spy)
    for _layer in range(2):
        tree.compile_kernels(torch.device(DEVICE), torch.float16, 6, 2, 24, windowed)
    assert [spy.launches for spy in spies.values()] == [1, 1, 1, 1]


@needs_cuda
def test_a_picked_backend_compiles_nothing_later(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    q, k, v = tensors(three_levels("depth_first"), 16, 8, 128, torch.bfloat16)
    pick_backend(q, k, v, three_levels("depth_first"))
    compiled: list[int] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **_: compiled.append(1))
    compare(three_levels("depth_first"), [q, k, v], 2e-2, {}, "tree")
    assert not compiled


@needs_cuda
def test_a_new_batch_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    draw = np.random.default_rng(1).integers
    sizes = [(3, 40, 9), (5, 101, 64), (2, 1, 1), (9, 300, 17), (4, 64, 63)]
    compiled: list[int] = []
    for count, prefix, suffix in sizes:
        shared = draw(0, 9, prefix).tolist()
        tries = [shared + draw(0, 9, suffix).tolist() for _ in range(count)]
        fold = Fold.from_sequences(tries, layout="depth_first")
        q, k, v = tensors(fold, 4, 2, 64, torch.bfloat16)
        out = attention(q, k, v, fold, backend="tree")
        torch.autograd.grad(out.sum(), (q, k, v))
        # From the second batch on.
        monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **_: compiled.append(1))
    assert not compiled
