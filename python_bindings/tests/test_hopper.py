"""Tree attention by the CUDA kernel for GPUs of compute capability 9.0."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_uint32, c_void_p
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from radix_mlp import Fold
from radix_mlp._core import cuda_sources
from radix_mlp.torch import attention
from radix_mlp.torch.cuda_program import CAPABILITY, DTYPES, HEADERS, on
from radix_mlp.torch.fold import to_device
from radix_mlp.torch.hopper import (
    COUNTERS,
    HEAD_DIMS,
    KEY_BLOCK,
    NAME,
    PATH_TILES,
    THREADS,
    TILE,
    Sizes,
    _counter,
    compiled,
    hopper_attention,
    hopper_kernel,
    shared_bytes,
)
from radix_mlp.torch.path_blocks import Lists, PathBlocks
from test_attention import DEVICE, compare, oracle, tensors, three_levels

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == CAPABILITY
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
# A rounding of the weights and of the output: float16 keeps 11 bits, bfloat16 8.
TOLERANCES = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Neither a kernel of before, nor one that later tests would find."""
    hopper_kernel.cache_clear()
    yield
    hopper_kernel.cache_clear()


def test_all_included_files_are_there() -> None:
    """But those of CUDA that NVRTC reads from a folder."""
    included = {name for text in cuda_sources().values() for name in re.findall(r"#include <(.*)>", text)}
    assert included - {"cuda_fp16.h", "cuda_bf16.h"} <= cuda_sources().keys() | HEADERS.keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_nvrtc_compiles_it(dtype: torch.dtype, head_dim: int) -> None:
    """With the sizes that the launch assumes, which the program asserts."""
    pytest.importorskip("cuda.bindings")
    code = compiled(dtype, head_dim)
    assert code.startswith(b"\x7fELF")
    assert f".text.{NAME}\0".encode() in code


def test_a_size_that_differs_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr("radix_mlp.torch.hopper.THREADS", 256)
    with pytest.raises(RuntimeError, match=r"NVRTC_ERROR_COMPILATION(.|\n)*HOPPER_THREADS == 256"):
        compiled.__wrapped__(torch.bfloat16, 128)


def test_tensors_become_what_the_copy_engine_takes() -> None:
    """Heads that stand for all, odd rows and odd addresses are copied, all others stay where they are."""
    pytest.importorskip("triton")
    from radix_mlp.torch.tree import _aligned

    whole = torch.randn(5, 4, 64, dtype=torch.float16)
    assert _aligned(whole[:, 1:]).data_ptr() == whole[:, 1:].data_ptr()
    odd = torch.randn(5 * 4 * 65 + 1, dtype=torch.float16)
    for x in (whole[:, :1].expand(5, 4, 64), odd[:-1].view(5, 4, 65)[..., :64], odd[1:].view(5, 4, 65)[..., 1:]):
        copy = _aligned(x)
        assert torch.equal(copy, x)
        assert copy.data_ptr() % 16 == 0
        assert all(step and 2 * step % 16 == 0 for step in copy.stride()[:2])


def launches_of_nothing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is launched from now on, on stream 7, and never happens: the arguments of each cuLaunchKernel."""
    driver = pytest.importorskip("cuda.bindings.driver")
    launches: list[tuple[Any, ...]] = []

    def launch(*given: Any) -> tuple[Any]:
        launches.append(given)
        return (driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(driver, "cuLaunchKernel", launch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return launches


def test_arguments_are_those_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a launch that never happens, against the declaration in the sources."""
    launches = launches_of_nothing(monkeypatch)
    monkeypatch.setattr("radix_mlp.torch.hopper.tensor_map", lambda x, *box: (x.data_ptr(), *box))
    monkeypatch.setattr("radix_mlp.torch.hopper.multiprocessors", lambda _: 3)
    fold = three_levels("depth_first")
    q, k, v = (torch.randn(fold.num_rows, heads, 64, dtype=torch.float16) for heads in (8, 2, 2))
    arrays = to_device(PathBlocks.arrays(fold, PATH_TILES, 4, 33), q.device)
    mask, lse = PathBlocks(PATH_TILES, 33, **arrays), torch.empty(8, fold.num_rows)
    out = hopper_attention("kernel", q, k, v, mask, 0.5, None, lse)
    ((kernel, *grid, shared, stream, (values, types), _),) = launches
    assert (kernel, grid, shared, stream) == ("kernel", [3, 1, 1, THREADS, 1, 1], shared_bytes(64), 7)

    source = cuda_sources()["tree_attention_hopper.cuh"].replace("\\\n", " ")
    declared = re.search(r"NAME\((.*?)\) *\{", source, re.DOTALL).group(1).split(",")  # type: ignore[union-attr]
    kinds = [c_void_p if "*" in one else c_uint32 if "uint32_t" in one else None for one in declared]
    assert list(types) == kinds
    passed = dict(zip([re.findall(r"\w+", one)[-1] for one in declared], values, strict=True))
    sizes = passed.pop("given")
    assert [getattr(sizes, name) for name, *_ in Sizes._fields_] == [
        512,
        64,
        128,
        64,
        128,
        64,
        len(q),
        8,
        4,
        33,
        0.5,
        0,
    ]
    lists = passed.pop("lists")
    parts = {"blocks": mask.blocks, "above": mask.above, "partial": mask.partial, "full": mask.full}
    parts |= {"partial_blocks": mask.listed, "full_blocks": mask.listed}
    declared_lists = re.search(r"struct Lists \{(.*?)\}", cuda_sources()["tree_attention.cuh"], re.DOTALL)
    names = re.findall(r"(\w+)[,;]", declared_lists.group(1))  # type: ignore[union-attr]
    assert [(name, getattr(lists, name)) for name in names] == [(name, parts[name].data_ptr()) for name in names]
    assert [field[0] for field in Lists._fields_] == names
    # Blocks are read 16 bytes at a time.
    assert lists.blocks % 16 == 0
    counter, tiles = passed.pop("next"), -(-len(q) // (TILE // 4))
    assert counter
    boxes = {
        "q": (q, TILE // 4, 4),
        "k": (k, KEY_BLOCK, 1),
        "v": (v, KEY_BLOCK, 1),
        "one_k": (k, 1, 1),
        "one_v": (v, 1, 1),
    }
    assert passed == {
        **{name: (x.data_ptr(), *box) for name, (x, *box) in boxes.items()},
        **{"out": out.data_ptr(), "lse": lse.data_ptr(), "tiles": tiles, "items": 2 * tiles},
        "depth": mask.depth.data_ptr(),
    }


def test_each_launch_has_a_counter_of_its_own() -> None:
    streams = [1, 2]
    taken = [_counter(torch.device("cpu"), stream) for _ in range(COUNTERS + 5) for stream in streams]
    assert len({counter.data_ptr() for counter in taken}) == len(taken)
    assert not torch.stack(taken).any()


def test_another_device_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for index in (0, 1):
        with on(torch.device("cuda", index)):
            pass
    assert entered == [torch.device("cuda", 0)]


def test_others_have_none(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    pretend(monkeypatch, (8, 0))
    assert hopper_kernel(torch.device("cuda:0"), torch.bfloat16, 128) is None
    assert hopper_kernel(torch.device("cpu"), torch.bfloat16, 128) is None


@pytest.mark.parametrize("missing", ["cuda.bindings", "cuda.pathfinder"])
def test_triton_is_taken_where_a_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, forgetful: None, missing: str
) -> None:
    pretend(monkeypatch, CAPABILITY)
    monkeypatch.setitem(sys.modules, missing, None)
    assert hopper_kernel(torch.device("cuda:0"), torch.bfloat16, 128) is None


def test_triton_is_taken_where_it_does_not_load(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    pytest.importorskip("cuda.bindings")

    def refuse(*_: Any) -> bytes:
        raise RuntimeError("NVRTC: no such thing")

    pretend(monkeypatch, CAPABILITY)
    monkeypatch.setattr("radix_mlp.torch.hopper.compiled", refuse)
    with pytest.warns(RuntimeWarning, match="Triton's tree attention is taken.*no such thing"):
        assert hopper_kernel(torch.device("cuda:0"), torch.bfloat16, 128) is None
    # Not again in the next layer.
    assert hopper_kernel(torch.device("cuda:0"), torch.bfloat16, 128) is None


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """That there is a GPU of this compute capability."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 8, 128), (7, 1, 64), (100, 1, 128), (12, 4, 64)])
@pytest.mark.parametrize(
    "options", [{}, {"window": 33}, {"softcap": 3.0}, {"scale": 0.5, "softcap": 2.0, "window": 100}]
)
def test_it_equals_every_copy(dtype: torch.dtype, shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    fold = three_levels("depth_first")
    q, k, v = (x.detach() for x in tensors(fold, *shape, dtype))
    assert hopper_kernel(q.device, dtype, shape[2])
    expected = oracle(q, k, v, fold, options)
    found = fold.unfold(attention(q, k, v, fold, backend="tree", **options)).double()
    # NaN fails.
    assert (found - expected).abs().max() <= TOLERANCES[dtype] * (1 + expected.abs().max())


@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(16, 8), (7, 1), (100, 1), (12, 4), (4, 4)])
@pytest.mark.parametrize("options", [{}, {"window": 33}, {"scale": 0.5}])
def test_bits_are_those_of_flash_attention(dtype: torch.dtype, heads: tuple[int, int], options: dict[str, Any]) -> None:
    """Of each sequence alone: branches within a block of keys and at its end, and more than one after the other."""
    fold = three_levels("depth_first")
    draw = np.random.default_rng(1).integers
    root = draw(0, 9, 256).tolist()
    deep = [root[:cut] + draw(9, 99, own).tolist() for cut, own in zip(draw(1, 257, 40), draw(1, 300, 40), strict=True)]
    for folded in (fold, Fold.from_sequences([root, *deep], layout="depth_first")):
        q, k, v = (3 * x.detach() for x in tensors(folded, *heads, 128, dtype))
        alone = Fold(folded.unfold(folded.input_ids), None, folded.cu_seq_lengths, salts=range(folded.num_sequences))
        copies = (folded.unfold(q), folded.unfold(k), folded.unfold(v))
        expected = attention(*copies, fold=alone, backend="query_folded", **options)
        assert torch.equal(folded.unfold(attention(q, k, v, folded, backend="tree", **options)), expected)


@needs_hopper
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("options", [{}, {"window": 33, "softcap": 3.0}])
def test_folding_changes_no_bit(head_dim: int, options: dict[str, Any]) -> None:
    folded = three_levels("depth_first")
    q, k, v = (x.detach() for x in tensors(folded, 16, 8, head_dim, torch.bfloat16))
    salts = range(folded.num_sequences)
    alone = Fold(folded.unfold(folded.input_ids), None, folded.cu_seq_lengths, layout="depth_first", salts=salts)
    assert alone.num_nodes == folded.num_tokens
    copies = (folded.unfold(q), folded.unfold(k), folded.unfold(v))
    expected = attention(*copies, fold=alone, backend="tree", **options)
    assert torch.equal(folded.unfold(attention(q, k, v, folded, backend="tree", **options)), expected)


@needs_hopper
def test_gradients_take_its_denominators() -> None:
    fold = three_levels("depth_first")
    compare(fold, tensors(fold, 16, 8, 128, torch.bfloat16), TOLERANCES[torch.bfloat16], {"softcap": 3.0}, "tree")


@needs_hopper
def test_one_block_has_many_tiles() -> None:
    """More than multiprocessors: blocks take one after the other, by a counter of each call."""
    fold = Fold.from_sequences([[*range(300), own, *range(400)] for own in range(40)], layout="depth_first")
    q, k, v = tensors(fold, 16, 8, 128, torch.bfloat16)
    first, second = (attention(q, k, v, fold, backend="tree") for _ in range(2))
    assert torch.equal(first, second)
    expected = oracle(q, k, v, fold, {})
    assert (fold.unfold(first).double() - expected).abs().max() < TOLERANCES[torch.bfloat16]


@needs_hopper
def test_strides_do_not_matter() -> None:
    """Heads that are further apart than rows, rows at odd addresses, and one head that stands for all."""
    fold = three_levels("depth_first")
    q, k, v = (x.detach() for x in tensors(fold, 16, 8, 128, torch.bfloat16))

    def by_head(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def odd(x: Tensor) -> Tensor:
        return torch.cat([x, x[..., :1]], -1)[..., :-1]

    expected = attention(q, k, v, fold, backend="tree")
    for changed in (by_head, odd):
        assert torch.equal(attention(changed(q), changed(k), changed(v), fold, backend="tree"), expected)
    one = v[:, :1].expand(v.shape)
    assert one.device.type == DEVICE
    expected = attention(q, k, one.contiguous(), fold, backend="tree")
    assert torch.equal(attention(q, k, one, fold, backend="tree"), expected)
