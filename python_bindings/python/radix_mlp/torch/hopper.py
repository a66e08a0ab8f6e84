"""Tree attention on GPUs of compute capability 9.0, by CUDA kernels of the crate radix_mlp_kernels.

Its tensor cores work on while the softmax of the step before is taken (FlashAttention-3, arXiv 2407.08608); Triton
waits for each product.
"""

import ctypes
from collections.abc import Iterator
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from radix_mlp.torch.cuda_program import (
    DTYPES,
    fields_in_order,
    has_kernels,
    launch,
    loaded,
    machine_code,
    multiprocessors,
    on,
    stream_of,
    tensor_map,
)
from radix_mlp.torch.path_blocks import Lists, PathBlocks
from radix_mlp.torch.tree_mask import Tiles

HEAD_DIMS = (64, 128)
# Of kernels/cuda: hopper_memory.cuh says what a block has, tree_attention.cuh how scores are cut.
THREADS, TILE, KEY_BLOCK = 512, 192, 64
PATH_TILES = Tiles(TILE, KEY_BLOCK, THREADS // 32, 4)

NAME = "tree_attention"
# Launches whose counters are filled at once.
COUNTERS = 256
_lock = Lock()


class Sizes(ctypes.Structure):
    """The kernel's argument of the same name."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")),
        *((name, ctypes.c_uint32) for name in ("rows", "heads", "group", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


@cache
def hopper_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Any | None:
    """The kernel for such queries, on `device`: None where there is none, with a warning where it does not load."""
    if head_dim not in HEAD_DIMS or not has_kernels(device, dtype):
        return None
    kernels = loaded(lambda: compiled(dtype, head_dim), {NAME: shared_bytes(head_dim)}, device)
    return kernels and kernels[0]


def hopper_attention(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PathBlocks,
    scale: float,
    softcap: float | None,
    lse: Tensor | None,
) -> Tensor:
    """Attention of `q` [rows, heads, head_dim] over `k`, `v` [rows, key heads, head_dim] by `hopper_kernel`'s kernel.

    Of heads of 128 without a softcap, the bits are those of FlashAttention-2 (torch's, of 2.11) over each row's path
    alone. Rows and heads lie at whole 16 bytes. The logarithms of the softmax's denominators go to `lse` [heads, rows],
    float32, where it is given. Raises RuntimeError where CUDA refuses the launch.
    """
    (rows, heads, _), kv_heads = q.shape, k.shape[1]
    group, tiles = heads // kv_heads, mask.full.shape[0] - 1
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    keys = [tensor_map(x, box, 1) for box in (KEY_BLOCK, 1) for x in (k, v)]
    maps = [tensor_map(q, TILE // group, group), *keys]
    pointers = [out.data_ptr(), 0 if lse is None else lse.data_ptr(), mask.depth.data_ptr()]
    strides = [step for x in (q, k, v) for step in x.stride()[:2]]
    sizes = Sizes(*strides, rows, heads, group, mask.window or 0, scale, softcap or 0.0)
    stream = stream_of(q.device)
    counter = _counter(q.device, stream)
    values = [*maps, *pointers, mask.lists, sizes, tiles, tiles * kv_heads, counter.data_ptr()]
    types = [*[None] * len(maps), *[ctypes.c_void_p] * len(pointers), None, None, ctypes.c_uint32, ctypes.c_uint32]
    blocks = min(tiles * kv_heads, multiprocessors(q.device))
    with on(q.device):
        launch(kernel, blocks, THREADS, shared_bytes(q.shape[-1]), stream, values, [*types, ctypes.c_void_p])
    return out


def shared_bytes(head_dim: int) -> int:
    """Of a block: tiles of queries and outputs, four stages of keys and of values, and what `Memory` has besides."""
    return (2 * TILE + 8 * KEY_BLOCK) * head_dim * 2 + 256


@cache
def compiled(dtype: torch.dtype, head_dim: int) -> bytes:
    """The kernel `NAME` as machine code: it does not compile where its constants or sizes are not those above."""
    return machine_code(f"""
#include <tree_attention_hopper.cuh>
static_assert(TILE == {TILE} && KEYS == {KEY_BLOCK} && HOPPER_THREADS == {THREADS});
static_assert(Memory<{head_dim}>::BYTES == {shared_bytes(head_dim)});
{fields_in_order(Sizes, "Sizes")}
static_assert(sizeof(Lists) == {ctypes.sizeof(Lists)});
TREE_ATTENTION_HOPPER({NAME}, {DTYPES[dtype]}, {head_dim})
""")


def _counter(device: torch.device, stream: int) -> Tensor:
    """A zero, by which the blocks of a launch on `stream` take their tiles."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Zero again at each replay.
        return torch.zeros(1, dtype=torch.int32, device=device)
    with _lock:
        return next(_counters(device, stream))


@cache
def _counters(device: torch.device, _stream: int) -> Iterator[Tensor]:
    while True:
        # One launch fills those of many.
        yield from torch.zeros(COUNTERS, dtype=torch.int32, device=device)
