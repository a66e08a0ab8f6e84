"""Folding batches of torch tensors. Importing this module imports torch."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.fold import Fold

INT32_MAX = np.iinfo(np.int32).max
NUMPY: dict[torch.dtype, Any] = {torch.int32: np.int32, torch.int64: np.int64}


@dataclass(frozen=True)
class FoldTensors:
    """The arrays of a `Fold` as int32 tensors of one device: of an accelerator, slices of one buffer."""

    input_ids: Tensor
    position_ids: Tensor
    scatter_indices: Tensor
    fold_gather: Tensor
    cu_seq_lengths: Tensor
    query_lengths: Tensor | None = None
    subtree_end: Tensor | None = None
    row_order: Tensor | None = None


def compute_fold_and_scatter_torch(
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seq_lengths: Tensor,
    pad_multiple_of: int | None = None,
    bound_checks: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold a batch in first-occurrence layout, in the form of the published package 0.0.x.

    `input_ids` and `position_ids` are [N], `cu_seq_lengths` [sequences + 1]: integer tensors of one
    device. Returns int32 tensors on it: `(compact_input_ids, compact_position_ids,
    scatter_indices, fold_gather)`: `scatter_indices` is [N], the others are [rows].

    `bound_checks` has no effect: input is always checked. Raises ValueError for input that is not a
    batch, tensors of several devices, and ids that int32 cannot hold; TypeError for what are not
    tensors of integers.
    """
    named = {"input_ids": input_ids, "position_ids": position_ids, "cu_seq_lengths": cu_seq_lengths}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor)}")
    fold = Fold(input_ids, position_ids, cu_seq_lengths, pad_multiple_of=pad_multiple_of)
    tensors = fold.tensors(input_ids.device)
    return (
        tensors.input_ids,
        tensors.position_ids,
        tensors.scatter_indices,
        tensors.fold_gather,
    )


def fold_tensors(fold: Fold, device: torch.device) -> FoldTensors:
    """The arrays of `fold` on `device`. Raises ValueError where int32 cannot hold a value."""
    arrays: dict[str, NDArray[np.uint32]] = {}
    for name in FoldTensors.__dataclass_fields__:
        array = getattr(fold, name)
        if array is not None:
            arrays[name] = array
    return FoldTensors(**to_device(arrays, device))


def to_device(
    arrays: Mapping[str, NDArray[np.integer[Any]]], device: torch.device, dtype: torch.dtype = torch.int32
) -> dict[str, Tensor]:
    """One-dimensional arrays as tensors of `device`: one transfer, from pinned memory to CUDA.

    Raises ValueError where int32 cannot hold a value.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(_narrowed(name, array, dtype)) for name, array in arrays.items()}
    packed = pack(arrays, dtype, pinned=device.type == "cuda").to(device, non_blocking=True)
    return sections(packed, {name: len(array) for name, array in arrays.items()})


def sections(packed: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The parts of `packed`, each of which starts at whole 16 bytes: a kernel compiled for one fits all."""
    return {name: packed[start : start + sizes[name]] for name, start in _starts(sizes).items()}


def _starts(sizes: Mapping[str, int]) -> dict[str, int]:
    starts = itertools.accumulate(map(_aligned, sizes.values()), initial=0)
    return dict(zip(sizes, starts, strict=False))


def packed_size(sizes: Iterable[int]) -> int:
    return sum(map(_aligned, sizes))


def _aligned(size: int) -> int:
    return -(-size // 4) * 4


def pack(
    arrays: Mapping[str, NDArray[np.integer[Any]]],
    dtype: torch.dtype = torch.int32,
    *,
    pinned: bool,
    sizes: Mapping[str, int] | None = None,
) -> Tensor:
    """One-dimensional arrays of values that are not negative, as `sections` of one integer tensor of the CPU.

    `sizes` are those of the sections, where arrays are shorter. Raises ValueError where int32 cannot hold a value.
    """
    sizes = {name: len(array) for name, array in arrays.items()} if sizes is None else sizes
    packed = torch.empty(packed_size(sizes.values()), dtype=dtype, pin_memory=pinned)
    values = packed.numpy()
    for name, start in _starts(sizes).items():
        array = arrays[name]
        _refuse_large(name, array, dtype)
        values[start : start + len(array)] = array
    return packed


def _narrowed(name: str, array: NDArray[np.integer[Any]], dtype: torch.dtype) -> NDArray[np.integer[Any]]:
    """A copy that a tensor can hold: the fold's own arrays are read-only."""
    _refuse_large(name, array, dtype)
    return array.astype(NUMPY[dtype])


def _refuse_large(name: str, array: NDArray[np.integer[Any]], dtype: torch.dtype) -> None:
    if dtype == torch.int32 and array.size and (largest := array.max()) > INT32_MAX:
        raise ValueError(f"{name} holds {largest}: {largest} does not fit in an int32 tensor")


def to_host(named: Mapping[str, Any]) -> dict[str, Any]:
    """`named` with its tensors as NumPy arrays of the same shapes and dtypes.

    One copy brings all tensors of an accelerator. Raises ValueError for tensors of several devices,
    TypeError for what are not integers.
    """
    tensors = {name: values for name, values in named.items() if isinstance(values, Tensor)}
    first, device = next((name, tensor.device) for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} must be on the same device as {first}, got {tensor.device} and {device}")
        if tensor.is_floating_point() or tensor.is_complex():
            value = f" with {tensor.flatten()[0].item()}" if tensor.numel() else ""
            raise TypeError(f"{name} must hold integers, got {tensor.dtype}{value}")
    if device.type == "cpu":
        return {**named, **{name: tensor.numpy() for name, tensor in tensors.items()}}
    return {**named, **_in_one_copy(tensors)}


def _in_one_copy(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    packed = torch.cat([tensor.flatten().to(torch.int64) for tensor in tensors.values()]).cpu()
    parts = torch.split(packed, [tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape).to(tensor.dtype).numpy()
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }
