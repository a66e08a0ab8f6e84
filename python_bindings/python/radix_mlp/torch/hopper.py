"""Tree attention on GPUs of compute capability 9.0: the CUDA kernel of the crate radix_mlp_kernels, compiled by NVRTC.

Its tensor cores work on while the softmax of the step before is taken (FlashAttention-3, arXiv 2407.08608); Triton
waits for each product. CUDA builds of torch bring NVRTC and, from 2.10 on, the package cuda-bindings.
"""

import ctypes
import warnings
from collections.abc import Iterator
from functools import cache, lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from radix_mlp._core import cuda_sources
from radix_mlp.torch.tree_mask import TreeMask

CAPABILITY, ARCHITECTURE = (9, 0), "sm_90a"
HEAD_DIMS = (64, 128)
DTYPES = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
# Of kernels/cuda: hopper_memory.cuh says what a block has, tree_attention.cuh how scores are cut.
THREADS, TILE, KEY_BLOCK = 384, 128, 64
# What a box of the copy engine holds of a row: 128 bytes, swizzled as the tensor cores read them.
COLUMNS = 64

NAME = "tree_attention"
# Launches whose counters are filled at once.
COUNTERS = 256
_lock = Lock()
# The host's headers, which NVRTC does without: of CUDA's own one, all that the kernel uses.
HEADERS = {
    "cstdint": "using uint8_t = unsigned char; using uint32_t = unsigned int; using uint64_t = unsigned long long; "
    "using int64_t = long long;",
    "cuda.h": "struct alignas(64) CUtensorMap { unsigned long long opaque[16]; };",
}


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
    if device.type != "cuda" or torch.version.cuda is None or dtype not in DTYPES or head_dim not in HEAD_DIMS:
        return None
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return None
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
        from cuda.pathfinder import find_nvidia_header_directory  # noqa: F401
    except ImportError:
        return None
    try:
        return _load(compiled(dtype, head_dim), head_dim, device)
    except RuntimeError as error:
        warnings.warn(f"Triton's tree attention is taken instead of Hopper's: {error}", RuntimeWarning, stacklevel=2)
        return None


def hopper_attention(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    scale: float,
    softcap: float | None,
    lse: Tensor | None,
) -> Tensor:
    """Attention of `q` [rows, heads, head_dim] over `k`, `v` [rows, key heads, head_dim] by `hopper_kernel`'s kernel.

    Rows and heads lie at whole 16 bytes. The logarithms of the softmax's denominators go to `lse` [heads, rows],
    float32, where it is given. Raises RuntimeError where CUDA refuses the launch.
    """
    from cuda.bindings import driver

    (rows, heads, _), kv_heads = q.shape, k.shape[1]
    group, tiles = heads // kv_heads, mask.full.shape[0] - 1
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    maps = [_map(q, TILE // group, group), _map(k, KEY_BLOCK, 1), _map(v, KEY_BLOCK, 1)]
    lists = [mask.full, mask.blocks, mask.partial, mask.blocks]
    pointers = [out.data_ptr(), 0 if lse is None else lse.data_ptr()]
    pointers += [x.data_ptr() for x in (mask.subtree_end, mask.depth, *lists)]
    strides = [step for x in (q, k, v) for step in x.stride()[:2]]
    sizes = Sizes(*strides, rows, heads, group, mask.window or 0, scale, softcap or 0.0)
    stream = torch.cuda.current_stream(q.device).cuda_stream
    counter = _counter(q.device, stream)
    values = [*maps, *pointers, sizes, tiles, tiles * kv_heads, counter.data_ptr()]
    types = [*[None] * len(maps), *[ctypes.c_void_p] * len(pointers), None, ctypes.c_uint32, ctypes.c_uint32]
    arguments = (tuple(values), (*types, ctypes.c_void_p))
    blocks = min(tiles * kv_heads, _multiprocessors(q.device))
    with torch.cuda.device(q.device):
        shared = shared_bytes(q.shape[-1])
        _check(driver.cuLaunchKernel(kernel, blocks, 1, 1, THREADS, 1, 1, shared, stream, arguments, 0))
    return out


def shared_bytes(head_dim: int) -> int:
    """Of a block: tiles of queries and outputs, two stages of keys and of values, and what `Memory` has besides."""
    return (2 * TILE + 8 * KEY_BLOCK) * head_dim * 2 + 2208


@cache
def compiled(dtype: torch.dtype, head_dim: int) -> bytes:
    """The kernel `NAME` as machine code, by NVRTC within seconds. Raises RuntimeError with its log where it fails."""
    from cuda.bindings import nvrtc
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    if folder is None:
        raise RuntimeError("CUDA's headers were not found: pip install nvidia-cuda-runtime")
    headers = {name: text.encode() for name, text in (cuda_sources() | HEADERS).items()}
    names = [name.encode() for name in headers]
    source = _source(dtype, head_dim).encode()
    program = _check(nvrtc.nvrtcCreateProgram(source, b"", len(names), list(headers.values()), names))
    try:
        return _machine_code(program, folder)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _machine_code(program: Any, folder: str) -> bytes:
    from cuda.bindings import nvrtc

    infinity = "-DINFINITY=__int_as_float(0x7f800000)"
    options = [f"--gpu-architecture={ARCHITECTURE}", "-std=c++17", infinity, f"-I{folder}"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC: {result.name}: {log.rstrip(bytes(1)).decode(errors='replace')}")
    code = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    return bytes(code)


def _source(dtype: torch.dtype, head_dim: int) -> str:
    """The program: the kernel, which does not compile where its constants or sizes are not those above."""
    numbers = range(len(Sizes._fields_))
    in_order = " && ".join(f"numbered.{field[0]} == {at}" for at, field in zip(numbers, Sizes._fields_, strict=True))
    return f"""
#include <tree_attention_hopper.cuh>
static_assert(TILE == {TILE} && KEYS == {KEY_BLOCK} && HOPPER_THREADS == {THREADS});
static_assert(Memory<{head_dim}>::BYTES == {shared_bytes(head_dim)});
constexpr Sizes numbered = {{{", ".join(map(str, numbers))}}};
static_assert(sizeof(Sizes) == {ctypes.sizeof(Sizes)} && {in_order});
TREE_ATTENTION_HOPPER({NAME}, {DTYPES[dtype]}, {head_dim})
"""


def _load(code: bytes, head_dim: int, device: torch.device) -> Any:
    from cuda.bindings import driver

    with torch.cuda.device(device):
        # A thread that has not used CUDA yet has no context.
        torch.cuda.synchronize()
        module = _check(driver.cuModuleLoadData(code))
        kernel = _check(driver.cuModuleGetFunction(module, NAME.encode()))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(kernel, most, shared_bytes(head_dim)))
    return kernel


def _map(x: Tensor, box_rows: int, box_heads: int) -> Any:
    return _encoded(x.data_ptr(), tuple(x.shape), tuple(x.stride()), x.dtype, box_rows, box_heads)


# Layers' tensors come back at the same addresses.
@lru_cache(maxsize=4096)
def _encoded(
    address: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, box_rows: int, box_heads: int
) -> Any:
    """Tells the copy engine of a tensor [rows, heads, columns], and of the boxes that are copied from it."""
    from cuda.bindings import driver

    half = dtype == torch.float16
    kinds = driver.CUtensorMapDataType
    rows, heads, columns = shape
    return _check(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            3,
            address,
            [driver.cuuint64_t(size) for size in (columns, heads, rows)],
            [driver.cuuint64_t(dtype.itemsize * step) for step in (stride[1], stride[0])],
            [driver.cuuint32_t(size) for size in (COLUMNS, box_heads, box_rows)],
            [driver.cuuint32_t(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


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


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _check(answer: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings gives. Raises RuntimeError with the name of its error."""
    status, *values = answer
    if status.value != 0:
        raise RuntimeError(f"{type(status).__name__}: {status.name}")
    return values[0] if values else None
