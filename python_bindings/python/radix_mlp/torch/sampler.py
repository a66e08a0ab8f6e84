"""Batches for a DataLoader in which sequences that share prefixes meet."""

import heapq
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import Sampler

from radix_mlp._host import is_tensor
from radix_mlp.batching import plan_batches
from radix_mlp.fold import Fold

if TYPE_CHECKING:
    from radix_mlp.fold import Ids

Values = TypeVar("Values", list[Any], Tensor, np.ndarray[Any, Any])


class _BatchSampler(Sampler[list[int]]):
    """Batches that stay as they are, in another order each epoch with `shuffle`."""

    def __init__(self, batches: list[list[int]], *, shuffle: bool, seed: int) -> None:
        self.batches, self.shuffle, self.seed, self.epoch = batches, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        if not self.shuffle:
            return iter(self.batches)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.batches), generator=generator)
        return (self.batches[i] for i in order.tolist())

    def __len__(self) -> int:
        return len(self.batches)


class PrefixBatchSampler(_BatchSampler):
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
        super().__init__(
            plan_batches(sequences, unique_tokens=unique_tokens, tokens=tokens), shuffle=shuffle, seed=seed
        )


class BalancedBatchSampler(_BatchSampler):
    """One rank's batches for data-parallel training: in each step all ranks compute about as many unique tokens.

    `sequences` are those of the whole epoch, the same on every rank. Sequences of one group, as the completions of a
    prompt, stay in one batch, where what they share is computed once: `groups` [sequences] names the group of each, and
    without it a sequence is in a group with those that share half of its tokens. A batch holds at most `unique_tokens`,
    counted group by group; a group with more is split, and a longer sequence is a batch of its own. A group is split as
    well where ranks would have nothing to do in a step otherwise: five groups on four ranks make two full steps.

    Every sequence is in one batch of one rank, and every rank has as many batches: where there are more batches than
    sequences, the shortest are repeated, as torch's DistributedSampler does. Two batches of a step differ by no more
    unique tokens than the largest group, or part of one, has. With `shuffle` the steps come in another order
    each epoch, drawn from `seed` and the epoch that `set_epoch` tells.

    `num_replicas` and `rank` are those of the default process group, or 1 and 0 where there is none.

    Raises ValueError for a rank that there is not, for no sequences, for `groups` of another length, and what
    `plan_batches` raises.
    """

    def __init__(
        self,
        sequences: Sequence["Ids"],
        *,
        unique_tokens: int,
        groups: Sequence[int] | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        replicas = num_replicas or (distributed.get_world_size() if together else 1)
        rank = rank if rank is not None else distributed.get_rank() if together else 0
        if not 0 <= rank < replicas:
            raise ValueError(f"rank must be in 0..{replicas}, got {rank}")
        if not len(sequences):
            raise ValueError("there must be at least one sequence")
        if groups is not None and len(groups) != len(sequences):
            raise ValueError(f"groups must name the group of each of {len(sequences)} sequences, got {len(groups)}")
        units = _units(sequences, _groups(sequences, groups), unique_tokens)
        steps = _balanced(sequences, units, replicas, unique_tokens)
        super().__init__([step[rank] for step in steps], shuffle=shuffle, seed=seed)


# Indices of sequences that are computed together, and their unique tokens.
_Unit = tuple[list[int], int]


def _groups(sequences: Sequence["Ids"], names: Sequence[int] | None) -> list[list[int]]:
    """Indices of the sequences of each group."""
    if names is not None:
        groups: dict[int, list[int]] = {}
        for index, name in enumerate(names):
            groups.setdefault(name, []).append(index)
        return list(groups.values())
    # One batch of everything is in lexicographic order, where neighbours share most.
    (order,) = plan_batches(sequences, tokens=np.iinfo(np.int64).max)
    found: list[list[int]] = []
    before: np.ndarray[Any, Any] = np.zeros(0)
    for index in order:
        ids = np.asarray(sequences[index])
        length = min(len(ids), len(before))
        differ = np.flatnonzero(ids[:length] != before[:length])
        shared = int(differ[0]) if differ.size else length
        if not found or 2 * shared < len(ids):
            found.append([])
        found[-1].append(index)
        before = ids
    return found


def _unit(sequences: Sequence["Ids"], indices: list[int]) -> _Unit:
    return indices, Fold.from_sequences([sequences[index] for index in indices]).num_nodes


def _units(sequences: Sequence["Ids"], groups: list[list[int]], budget: int) -> list[_Unit]:
    """The groups, those that exceed `budget` in parts."""
    units = []
    for group in groups:
        parts = plan_batches([sequences[index] for index in group], unique_tokens=budget)
        units += [_unit(sequences, [group[place] for place in part]) for part in parts]
    return units


def _balanced(sequences: Sequence["Ids"], units: list[_Unit], replicas: int, budget: int) -> list[list[list[int]]]:
    """For each step the batches of all ranks."""
    steps = max(1, -(-sum(cost for _, cost in units) // (budget * replicas)))
    while True:
        while len(units) < steps * replicas:
            units = _with_one_more(sequences, units)
        batches, costs = _fill(units, steps * replicas)
        # A batch of one unit cannot get smaller.
        if all(cost <= budget or len(batch) == 1 for batch, cost in zip(batches, costs, strict=True)):
            break
        steps += 1
    order = sorted(range(len(batches)), key=lambda i: -costs[i])
    whole = [[index for unit in batches[i] for index in unit] for i in order]
    return [whole[start : start + replicas] for start in range(0, len(whole), replicas)]


def _fill(units: list[_Unit], bins: int) -> tuple[list[list[list[int]]], list[int]]:
    """Longest processing time first (Graham, 1969): the largest unit that is left goes where least is."""
    batches: list[list[list[int]]] = [[] for _ in range(bins)]
    heap = [(0, 0, place) for place in range(bins)]
    for indices, cost in sorted(units, key=lambda unit: -unit[1]):
        # Among equals the one that holds fewer units, so that none stays empty.
        load, held, place = heap[0]
        batches[place].append(indices)
        heapq.heapreplace(heap, (load + cost, held + 1, place))
    costs = [0] * bins
    for load, _, place in heap:
        costs[place] = load
    return batches, costs


def _with_one_more(sequences: Sequence["Ids"], units: list[_Unit]) -> list[_Unit]:
    """The largest unit of several sequences in two; where there is none, the smallest unit again."""
    several = [place for place, (indices, _) in enumerate(units) if len(indices) > 1]
    if not several:
        return [*units, min(units, key=lambda unit: unit[1])]
    place = max(several, key=lambda i: units[i][1])
    indices = units[place][0]
    half = len(indices) // 2
    return [*units[:place], _unit(sequences, indices[:half]), _unit(sequences, indices[half:]), *units[place + 1 :]]


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
