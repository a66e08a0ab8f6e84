"""Batches for a DataLoader in which sequences that share prefixes meet."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from radix_mlp._host import is_tensor
from radix_mlp.batching import plan_batches

if TYPE_CHECKING:
    from radix_mlp.fold import Ids

Values = TypeVar("Values", list[Any], Tensor, np.ndarray[Any, Any])


class PrefixBatchSampler(Sampler[list[int]]):
    """Indices of `sequences` in batches, for a DataLoader's `batch_sampler`.

    Batches are those of `plan_batches`: of at most `unique_tokens` different nodes, or of at most `tokens` tokens,
    so that sequences that share prefixes fold together. With `shuffle` the batches, not what they hold, come in
    another order each epoch, drawn from `seed` and the epoch that `set_epoch` tells.

    Raises what `plan_batches` raises.
    """

    def __init__(
        self,
        sequences: Sequence["Ids"],
        *,
        unique_tokens: int | None = None,
        tokens: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.batches = plan_batches(sequences, unique_tokens=unique_tokens, tokens=tokens)
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = range(len(self.batches))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            return (self.batches[i] for i in torch.randperm(len(order), generator=generator).tolist())
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def restore_order(values: Values, batches: Sequence[Sequence[int]]) -> Values:
    """Bring `values`, one for each index of `batches` in turn, into the order of the indices.

    Raises ValueError where `batches` do not hold each of 0, 1, 2 and so on once, as many as there are values.
    """
    indices = np.array([index for batch in batches for index in batch], np.int64)
    if len(indices) != len(values) or not (np.sort(indices) == np.arange(len(values))).all():
        raise ValueError(f"batches must hold each index below {len(values)} once, got {len(indices)} indices")
    places = np.argsort(indices)
    if is_tensor(values):
        return values[torch.from_numpy(places).to(values.device)]
    if isinstance(values, np.ndarray):
        return values[places]
    return [values[place] for place in places.tolist()]
