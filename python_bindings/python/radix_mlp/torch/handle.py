"""Folds as tensors: what a compiled graph hands on to the operations that read them."""

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.fold import Fold

_numbers = count()
_folds: WeakValueDictionary[int, Fold] = WeakValueDictionary()


class _Number(np.ndarray[Any, np.dtype[np.int64]]):
    """A fold's number, which a tensor's memory holds and which holds the fold."""

    fold: Fold


def fold_handle(fold: Fold) -> Tensor:
    """What stands for `fold` in `attention` under torch.compile: int64 [1] on the CPU.

    A graph takes it as it takes every tensor, and has no guards on the fold. The fold lives as long as the tensor's
    memory, in the graph's backward pass too; a copy of the tensor keeps nothing alive.
    """
    number: NDArray[np.int64] = np.array([next(_numbers)])
    held = number.view(_Number)
    held.fold = fold
    _folds[held.item()] = fold
    return torch.from_numpy(held)


def handled(handle: Tensor) -> Fold:
    """The fold of a `fold_handle`. Raises ValueError for other tensors, and where the fold is gone."""
    if handle.device.type != "cpu" or handle.dtype != torch.int64 or handle.shape != (1,):
        raise ValueError(
            "fold must be a Fold or its fold_handle, int64 [1] on the CPU, got a tensor of "
            f"{handle.dtype} {list(handle.shape)} on {handle.device}"
        )
    fold = _folds.get(int(handle))
    if fold is None:
        raise ValueError(f"no fold has the handle {handle.item()}, or it is no longer alive")
    return fold
