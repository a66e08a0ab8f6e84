"""Gradients of tree attention by the CUDA kernels for GPUs of compute capability 9.0."""

import re
from collections.abc import Callable, Iterator
from ctypes import c_void_p
from typing import Any

import pytest
import torch
from torch import Tensor

from radix_mlp import Fold
from radix_mlp._core import cuda_sources
from radix_mlp.torch import attention
from radix_mlp.torch.cuda_program import CAPABILITY, DTYPES
from radix_mlp.torch.hopper_gradient import (
    BEGIN_THREADS,
    END_THREADS,
    HEAD_DIM,
    HOPPER_PROGRAMS,
    HOPPER_TILES,
    KEY_BLOCK,
    NAME,
    PAIRS,
    SHARED_BYTES,
    WALK_THREADS,
    GradientSizes,
    compiled,
    hopper_gradient_kernels,
    hopper_gradients,
)
from radix_mlp.torch.tree_mask import Tiles, key_gradient_tiles
from radix_mlp.torch.walks import key_walks
from test_attention import compare, tensors, three_levels
from test_hopper import TOLERANCES, launches_of_nothing, needs_hopper, pretend

pytest.importorskip("triton")

from radix_mlp.torch.tree import tree_gradients


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Neither kernels of before, nor some that later tests would find."""
    hopper_gradient_kernels.cache_clear()
    yield
    hopper_gradient_kernels.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvrtc_compiles_them(dtype: torch.dtype) -> None:
    """With the sizes that the launches assume, which the program asserts."""
    pytest.importorskip("cuda.bindings")
    code = compiled(dtype)
    for name in (f"{NAME}_begin", NAME, f"{NAME}_end"):
        assert f".text.{name}\0".encode() in code


@pytest.mark.parametrize("name", ["PAIRS", "KEY_BLOCK", "WALK_THREADS", "SHARED_BYTES"])
def test_a_size_that_differs_does_not_compile(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(f"radix_mlp.torch.hopper_gradient.{name}", 96)
    with pytest.raises(RuntimeError, match=r"NVRTC_ERROR_COMPILATION(.|\n)*== 96"):
        compiled.__wrapped__(torch.bfloat16)


def test_arguments_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of launches that never happen, against the declarations in the sources."""
    launches = launches_of_nothing(monkeypatch)
    monkeypatch.setattr("radix_mlp.torch.hopper_gradient.hopper_gradient_kernels", lambda *_: ["begin", "walk", "end"])
    monkeypatch.setattr("radix_mlp.torch.hopper_gradient.tensor_map", lambda x, *box: (x.data_ptr(), *box))
    fold = three_levels("depth_first")
    rows = fold.num_rows
    q, k, v, out = (torch.randn(rows, heads, HEAD_DIM, dtype=torch.float16) for heads in (6, 2, 2, 6))
    lse, dout = torch.empty(6, rows), torch.randn(6, rows, HEAD_DIM, dtype=torch.float16).transpose(0, 1)
    walks = key_walks(fold, q, k, HOPPER_TILES, HOPPER_PROGRAMS, aligned=True, longest=21)
    assert walks.parts
    allocated: list[int] = []
    new_empty = Tensor.new_empty

    def spy(x: Tensor, size: int) -> Tensor:
        allocated.append(size)
        return new_empty(x, size)

    monkeypatch.setattr(Tensor, "new_empty", spy)
    dq, dk, dv = hopper_gradients(q, k, v, out, lse, dout, walks, 0.5)

    steps = -(-rows // (PAIRS // 3))
    grids = [
        ("begin", 2 * steps, BEGIN_THREADS, 0),
        ("walk", 2 * len(walks.key_block), WALK_THREADS, SHARED_BYTES),
        ("end", 2 * (steps + len(walks.split_block)), END_THREADS, 0),
    ]
    assert [(kernel, blocks, threads, shared) for kernel, blocks, _, _, threads, _, _, shared, *_ in launches] == grids
    assert all(stream == 7 for *_, stream, _, _ in launches)
    passed: dict[str, Any] = {}
    for declared, (*_, (values, types), _) in zip(declarations(), launches, strict=True):
        assert list(types) == [c_void_p if "*" in one else None for one in declared]
        for one, value in zip(declared, values, strict=True):
            name = re.findall(r"\w+", one)[-1]
            # What two kernels take is the same for both.
            assert passed.setdefault(name, value) is value or passed[name] == value
    sizes = passed.pop("sizes")
    expected = [*out.stride()[:2], *dout.stride()[:2], rows, 2, 3, 0.5]
    assert [getattr(sizes, name) for name, *_ in GradientSizes._fields_] == expected
    # One after the other in one piece: numbers of pairs, their sums, parts of keys' sums.
    numbers, sums, parts = (passed.pop(name) for name in ("pair_numbers", "pair_sums", "parts"))
    assert (sums - numbers, parts - sums) == (4 * 2 * steps * 2 * PAIRS, 4 * 2 * steps * PAIRS * HEAD_DIM)
    assert 4 * allocated[0] == parts - numbers + 4 * 2 * walks.parts * 2 * KEY_BLOCK * HEAD_DIM
    boxes = {"q": (q, PAIRS // 3, 3), "dout": (dout, PAIRS // 3, 3), "k": (k, KEY_BLOCK, 1), "v": (v, KEY_BLOCK, 1)}
    for name, (x, *box) in boxes.items():
        assert passed.pop(f"{name}_boxes") == (x.data_ptr(), *box)
    given = {"out": out, "dout": dout, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    lists = "key_block", "first_step", "walk_end", "part", "split_block", "first_part", "subtree_end"
    given |= {name: getattr(walks, name) for name in lists}
    assert passed == {name: x.data_ptr() for name, x in given.items()}


def declarations() -> list[list[str]]:
    """The parameters of the three kernels, in the order of their launches."""
    source = cuda_sources()["tree_gradient_hopper.cuh"].replace("\\\n", " ")
    lists = re.findall(r"NAME(?:##\w+)?\((.*?)\) *\{", source[source.index("#define") :], re.DOTALL)
    return [one.split(",") for one in lists]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """That there are kernels for all tensors."""
    monkeypatch.setattr("radix_mlp.torch.tree.hopper_gradient_kernels", lambda *_: ["begin", "walk", "end"])


def taken(group: int = 3, window: int | None = None, softcap: float | None = None) -> Tiles:
    fold = three_levels("depth_first")
    q, k = (torch.empty(fold.num_rows, heads, HEAD_DIM, dtype=torch.bfloat16) for heads in (2 * group, 2))
    reads = tree_gradients(fold, q, k, window, softcap)
    assert (reads.mask is None) == (reads.walks.tiles == HOPPER_TILES)
    return reads.walks.tiles


def test_walks_are_those_of_what_computes_them(pretended: None) -> None:
    assert taken() == taken(group=PAIRS) == HOPPER_TILES
    triton = key_gradient_tiles(HEAD_DIM, torch.bfloat16, 3)
    assert taken(window=5) == taken(softcap=2.0) == triton
    assert taken(group=PAIRS + 1) == key_gradient_tiles(HEAD_DIM, torch.bfloat16, PAIRS + 1)
    torch.use_deterministic_algorithms(True)
    try:
        assert taken() == triton
    finally:
        torch.use_deterministic_algorithms(False)


def test_others_have_none(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    assert hopper_gradient_kernels(torch.device("cpu"), torch.bfloat16, HEAD_DIM) is None
    pretend(monkeypatch, CAPABILITY)
    assert hopper_gradient_kernels(torch.device("cuda:0"), torch.bfloat16, 64) is None
    assert hopper_gradient_kernels(torch.device("cuda:0"), torch.float32, HEAD_DIM) is None
    pretend(monkeypatch, (8, 0))
    assert hopper_gradient_kernels(torch.device("cuda:0"), torch.bfloat16, HEAD_DIM) is None


def test_without_kernels_there_are_no_gradients() -> None:
    x = torch.zeros(1, 1, HEAD_DIM)
    with pytest.raises(RuntimeError, match=r"no kernels for torch.float32 and head_dim 128 on cpu"):
        hopper_gradients(x, x, x, x, x, x, None, 1.0)  # type: ignore[arg-type]


@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(16, 8), (7, 1), (64, 1), (12, 4)])
@pytest.mark.parametrize("options", [{}, {"scale": 0.5}])
def test_they_equal_those_of_every_copy(dtype: torch.dtype, heads: tuple[int, int], options: dict[str, Any]) -> None:
    assert hopper_gradient_kernels(torch.device("cuda", 0), dtype, HEAD_DIM)
    fold = three_levels("depth_first")
    compare(fold, tensors(fold, *heads, HEAD_DIM, dtype), TOLERANCES[dtype], options, "tree")


@needs_hopper
def test_many_walks_of_many_steps() -> None:
    """Blocks of keys in parts, and more walks than multiprocessors."""
    fold = Fold.from_sequences([[*range(700), own, *range(300)] for own in range(20)], layout="depth_first")
    q, k, v = tensors(fold, 16, 8, HEAD_DIM, torch.bfloat16)
    walks = tree_gradients(fold, q, k, None, None).walks
    assert walks.tiles == HOPPER_TILES
    assert walks.parts
    assert len(walks.key_block) * 8 > HOPPER_PROGRAMS
    compare(fold, [q, k, v], TOLERANCES[torch.bfloat16], {}, "tree")


@needs_hopper
def test_strides_do_not_matter() -> None:
    """Of the output's gradient too: heads that are further apart than rows, rows at odd addresses, one for all."""
    fold = three_levels("depth_first")
    q, k, v = tensors(fold, 16, 8, HEAD_DIM, torch.bfloat16)

    def gradients(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        out = attention(change(q), change(k), change(v), fold, backend="tree")
        return torch.autograd.grad(out, (q, k, v), change(torch.ones_like(out) * v.detach().repeat(1, 2, 1)))

    def by_head(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def odd(x: Tensor) -> Tensor:
        return torch.cat([x, x[..., :1]], -1)[..., :-1]

    expected = gradients(lambda x: x)
    for change in (by_head, odd):
        for mine, theirs in zip(gradients(change), expected, strict=True):
            # Sums of float32 in another order, and a rounding.
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)
    out = attention(q, k, v, fold, backend="tree")
    ones = torch.ones(1, 1, 1, dtype=out.dtype, device=out.device).expand(out.shape)
    for mine, theirs in zip(
        torch.autograd.grad(out, (q, k, v), ones, retain_graph=True),
        torch.autograd.grad(out, (q, k, v), ones.contiguous()),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)


@needs_hopper
def test_deterministic_algorithms_repeat_every_bit() -> None:
    fold = Fold.from_sequences([[*range(700), own, *range(300)] for own in range(20)], layout="depth_first")
    q, k, v = tensors(fold, 16, 8, HEAD_DIM, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            torch.autograd.grad(attention(q, k, v, fold, backend="tree").float().square().sum(), (q, k, v))
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)
