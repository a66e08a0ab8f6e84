"""Gradients of tree attention on GPUs of compute capability 9.0: one walk for all of them, where Triton takes two.

What a block of keys sends to the queries is added in memory, in any order: sums of float32, whose last bits differ from
call to call. Where torch.use_deterministic_algorithms is on, Triton's kernels are taken.
"""

import ctypes
from functools import cache
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
    on,
    stream_of,
    tensor_map,
)
from radix_mlp.torch.tree_mask import Tiles
from radix_mlp.torch.walks import Walks

HEAD_DIM = 128
# Of kernels/cuda/tree_gradient_memory.cuh: steps of so many (row, head) pairs, blocks of so many keys.
PAIRS, KEY_BLOCK = 64, 128
BEGIN_THREADS, WALK_THREADS, END_THREADS = 256, 384, 256
SHARED_BYTES = 165200
HOPPER_TILES = Tiles(PAIRS, KEY_BLOCK, WALK_THREADS // 32, 2)
# One on each multiprocessor of an H200.
HOPPER_PROGRAMS = 132

NAME = "tree_gradient"


class GradientSizes(ctypes.Structure):
    """The kernels' argument of the same name."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("out_row", "out_head", "dout_row", "dout_head")),
        *((name, ctypes.c_uint32) for name in ("rows", "kv_heads", "group")),
        ("scale", ctypes.c_float),
    ]


@cache
def hopper_gradient_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Any] | None:
    """The kernels for such queries, on `device`: None where there are none, with a warning where they do not load."""
    if head_dim != HEAD_DIM or not has_kernels(device, dtype):
        return None
    shared = {f"{NAME}_begin": 0, NAME: SHARED_BYTES, f"{NAME}_end": 0}
    return loaded(lambda: compiled(dtype), shared, device)


def hopper_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    walks: Walks,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by `hopper_gradient_kernels`' kernels, contiguous.

    The walks are aligned. Rows and heads of all lie at whole 16 bytes. Raises RuntimeError where CUDA refuses a launch.
    """
    kernels = hopper_gradient_kernels(q.device, q.dtype, q.shape[-1])
    if kernels is None:
        raise RuntimeError(f"there are no kernels for {q.dtype} and head_dim {q.shape[-1]} on {q.device}")
    begin, walk, end = kernels
    (rows, heads, _), kv_heads = q.shape, k.shape[1]
    group, splits = heads // kv_heads, walks.split_block.shape[0]
    steps = -(-rows // (PAIRS // group))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    # In one piece, since each costs the host time: numbers of pairs, their sums, and parts of keys' sums.
    sizes = [steps * 2 * PAIRS, steps * PAIRS * HEAD_DIM, walks.parts * 2 * KEY_BLOCK * HEAD_DIM]
    memory = lse.new_empty(kv_heads * sum(sizes))
    pair_numbers = memory.data_ptr()
    pair_sums = pair_numbers + 4 * kv_heads * sizes[0]
    parts = pair_sums + 4 * kv_heads * sizes[1]
    given = GradientSizes(*out.stride()[:2], *dout.stride()[:2], rows, kv_heads, group, scale)
    box = PAIRS // group, group
    maps = [tensor_map(q, *box), tensor_map(dout, *box), tensor_map(k, KEY_BLOCK, 1), tensor_map(v, KEY_BLOCK, 1)]
    gradients = [x.data_ptr() for x in (dq, dk, dv)]
    arrays = walks.subtree_end, walks.key_block, walks.first_step, walks.walk_end, walks.part
    lists = [x.data_ptr() for x in arrays]
    stream = stream_of(q.device)

    def run(kernel: Any, blocks: int, threads: int, shared: int, maps: list[Any], *pointers: int) -> None:
        types = [*[None] * len(maps), *[ctypes.c_void_p] * len(pointers), None]
        launch(kernel, blocks * kv_heads, threads, shared, stream, [*maps, *pointers, given], types)

    with on(q.device):
        outputs = out.data_ptr(), dout.data_ptr(), lse.data_ptr()
        run(begin, steps, BEGIN_THREADS, 0, [], *outputs, pair_numbers, pair_sums)
        sums = pair_numbers, pair_sums, parts, *gradients[1:]
        run(walk, walks.key_block.shape[0], WALK_THREADS, SHARED_BYTES, maps, *sums, *lists)
        split = walks.split_block.data_ptr(), walks.first_part.data_ptr()
        run(end, steps + splits, END_THREADS, 0, [], pair_sums, parts, *split, *gradients)
    return dq, dk, dv


@cache
def compiled(dtype: torch.dtype) -> bytes:
    """The kernels as machine code: they do not compile where their constants or sizes are not those above."""
    return machine_code(f"""
#include <tree_gradient_hopper.cuh>
static_assert(PAIRS == {PAIRS} && OWN_KEYS == {KEY_BLOCK} && GRADIENT_DIM == {HEAD_DIM});
static_assert(4 * PAIRS == {BEGIN_THREADS} && GRADIENT_THREADS == {WALK_THREADS} && DIFFERENTIATORS == {END_THREADS});
static_assert(GradientMemory::BYTES == {SHARED_BYTES});
{fields_in_order(GradientSizes, "GradientSizes")}
TREE_GRADIENT_HOPPER({NAME}, {DTYPES[dtype]})
""")
