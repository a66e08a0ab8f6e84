"""Brings token ids, in the forms in which people have them, into the arrays that the core reads."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

# NumPy's own way to them takes as long as a small fold.
LIMITS: dict[Any, int] = {dtype: int(np.iinfo(dtype).max) for dtype in (np.uint32, np.uint64)}

TokenIds = NDArray[np.uint32] | NDArray[np.int64]


def is_tensor(values: object) -> TypeIs[torch.Tensor]:
    """Whether `values` is a torch tensor; False, without importing torch, where nobody has."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


def to_host(named: Mapping[str, Any]) -> dict[str, Any]:
    """`named` with its tensors as NumPy arrays: those of an accelerator come in one copy."""
    if not any(map(is_tensor, named.values())):
        return dict(named)
    from radix_mlp.torch.fold import to_host

    return to_host(named)


def token_ids(name: str, values: Any) -> TokenIds:
    """Ids as the core folds them: what is contiguous int64 as it is, for the core checks it; all else `unsigned`."""
    array = np.asarray(values)
    if array.ndim == 1 and array.dtype == np.int64 and array.flags.c_contiguous and array.flags.aligned:
        return array
    return unsigned(name, values)


def unsigned(name: str, values: Any, dtype: Any = np.uint32) -> NDArray[Any]:
    """One-dimensional integers as contiguous `dtype`, the same memory where its bytes are that already.

    Raises ValueError for another number of dimensions and for a value that `dtype` cannot hold,
    TypeError for what are not integers.
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-dimensional, got shape {array.shape}")
    if array.dtype == dtype:
        return array if array.flags.c_contiguous and array.flags.aligned else array.copy()
    if array.size == 0:
        return np.empty(0, dtype)
    limit = LIMITS[dtype]
    if array.dtype.kind not in "iu":
        # NumPy makes floats or objects of a list with integers of 2**63 and more.
        exact = np.asarray(values, object)
        for value in exact:
            if type(value) is not int or not 0 <= value <= limit:
                found = f"got dtype {array.dtype} with {value!r}"
                raise TypeError(f"{name} must hold integers of 0..={limit}, {found}")
        return exact.astype(dtype)
    # `limit` is all ones: the values lie within it if and only if all their bits do.
    if not 0 <= np.bitwise_or.reduce(array) <= limit:
        index = int(np.argmax((array < 0) | (array > limit)))
        raise ValueError(f"{name}[{index}] is {array[index]}, which is not in 0..={limit}")
    if array.dtype.isnative and array.dtype.itemsize == np.dtype(dtype).itemsize:
        return unsigned(name, array.view(dtype), dtype)
    return array.astype(dtype)
