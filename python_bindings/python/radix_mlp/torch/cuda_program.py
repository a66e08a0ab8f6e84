"""CUDA kernels of the crate radix_mlp_kernels for GPUs of compute capability 9.0: compiled by NVRTC, loaded, launched.

CUDA builds of torch bring NVRTC and, from 2.10 on, the package cuda-bindings.
"""

import ctypes
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from radix_mlp._core import cuda_sources

CAPABILITY, ARCHITECTURE = (9, 0), "sm_90a"
DTYPES = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
# What a box of the copy engine holds of a row: 128 bytes, swizzled as the tensor cores read them.
COLUMNS = 64
# The host's headers, which NVRTC does without: of CUDA's own one, all that the kernels use.
HEADERS = {
    "cstdint": "using uint8_t = unsigned char; using uint32_t = unsigned int; using uint64_t = unsigned long long; "
    "using int64_t = long long;",
    "cuda.h": "struct alignas(64) CUtensorMap { unsigned long long opaque[16]; };",
}


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels for such tensors can be compiled and launched."""
    if device.type != "cuda" or torch.version.cuda is None or dtype not in DTYPES:
        return False
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return False
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
        from cuda.pathfinder import find_nvidia_header_directory  # noqa: F401
    except ImportError:
        return False
    return True


def loaded(code: Callable[[], bytes], shared: dict[str, int], device: torch.device) -> list[Any] | None:
    """The kernels of `code` by their names, each with so many bytes of shared memory: None, with a warning, without."""
    try:
        return _load(code(), shared, device)
    except RuntimeError as error:
        warnings.warn(f"Triton's tree attention is taken instead of Hopper's: {error}", RuntimeWarning, stacklevel=3)
        return None


def machine_code(source: str) -> bytes:
    """`source`, which may include what `cuda_sources` has, by NVRTC within seconds.

    Raises RuntimeError with its log where it fails.
    """
    from cuda.bindings import nvrtc
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    if folder is None:
        raise RuntimeError("CUDA's headers were not found: pip install nvidia-cuda-runtime")
    headers = {name: text.encode() for name, text in (cuda_sources() | HEADERS).items()}
    names = [name.encode() for name in headers]
    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"", len(names), list(headers.values()), names))
    try:
        return _compile(program, folder)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _compile(program: Any, folder: str) -> bytes:
    from cuda.bindings import nvrtc

    infinity = "-DINFINITY=__int_as_float(0x7f800000)"
    options = [f"--gpu-architecture={ARCHITECTURE}", "-std=c++17", infinity, f"-I{folder}"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(check(nvrtc.nvrtcGetProgramLogSize(program)))
        check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC: {result.name}: {log.rstrip(bytes(1)).decode(errors='replace')}")
    code = bytearray(check(nvrtc.nvrtcGetCUBINSize(program)))
    check(nvrtc.nvrtcGetCUBIN(program, code))
    return bytes(code)


def fields_in_order(sizes: type[ctypes.Structure], name: str) -> str:
    """C++ that does not compile where its struct `name` has other fields than `sizes`, or other places for them."""
    numbers = range(len(sizes._fields_))
    in_order = " && ".join(f"numbered.{field[0]} == {at}" for at, field in zip(numbers, sizes._fields_, strict=True))
    return f"""
constexpr {name} numbered = {{{", ".join(map(str, numbers))}}};
static_assert(sizeof({name}) == {ctypes.sizeof(sizes)} && {in_order});
"""


def _load(code: bytes, shared: dict[str, int], device: torch.device) -> list[Any]:
    from cuda.bindings import driver

    with torch.cuda.device(device):
        # A thread that has not used CUDA yet has no context.
        torch.cuda.synchronize()
        module = check(driver.cuModuleLoadData(code))
        kernels = [check(driver.cuModuleGetFunction(module, name.encode())) for name in shared]
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for kernel, size in zip(kernels, shared.values(), strict=True):
            check(driver.cuFuncSetAttribute(kernel, most, size))
    return kernels


def stream_of(device: torch.device) -> int:
    """The address of the current one, as Triton asks for it; torch.cuda.current_stream takes as long as a launch."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Where `device` is the current one, which is no change but for what setting it again takes."""
    return nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def launch(
    kernel: Any, blocks: int, threads: int, shared: int, stream: int, values: list[Any], types: list[Any]
) -> None:
    """With arguments as cuda.bindings takes them. Raises RuntimeError where CUDA refuses."""
    from cuda.bindings import driver

    arguments = (tuple(values), tuple(types))
    check(driver.cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, shared, stream, arguments, 0))


def tensor_map(x: Tensor, box_rows: int, box_heads: int) -> Any:
    """Tells the copy engine of `x` [rows, heads, columns], and of the boxes that are copied from it."""
    return _encoded(x.data_ptr(), tuple(x.shape), tuple(x.stride()), x.dtype, box_rows, box_heads)


# Layers' tensors come back at the same addresses.
@lru_cache(maxsize=4096)
def _encoded(
    address: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, box_rows: int, box_heads: int
) -> Any:
    from cuda.bindings import driver

    half = dtype == torch.float16
    kinds = driver.CUtensorMapDataType
    rows, heads, columns = shape
    return check(
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


@cache
def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def check(answer: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings gives. Raises RuntimeError with the name of its error."""
    status, *values = answer
    if status.value != 0:
        raise RuntimeError(f"{type(status).__name__}: {status.name}")
    return values[0] if values else None
