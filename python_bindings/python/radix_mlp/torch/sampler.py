"""Batches for a DataLoader in which sequences that share prefixes meet."""

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import Sampler

from radix_mlp._host import is_tensor
from radix_mlp.batching import plan_batches
from radix_mlp.fold import arrays

if TYPE_CHECKING:
    from radix_mlp.fold import Ids, UInt32

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
    prompt, stay in one batch, where what they share is computed once: `groups` [sequences] names the group of each, in
    a list, an array or a tensor, and without it a sequence is in a group with those that share half of its tokens. A
    batch holds at most `unique_tokens`, the nodes of the trie of its sequences; a group with more is split, and a
    longer sequence is a batch of its own. A group is split as well where ranks would have nothing to do in a step
    otherwise: five groups on four ranks make two full steps.

    Every sequence is in one batch of one rank, and every rank has as many batches: where there are more batches than
    sequences, the shortest are repeated, as torch's DistributedSampler does, fewer than there are ranks. Two batches
    differ by no more unique tokens than the largest group, or part of one, has, also where groups share with each
    other, as the examples that all prompts begin with. With `shuffle` the steps come in another order each epoch,
    drawn from `seed` and the epoch that `set_epoch` tells.

    `num_replicas` and `rank` are those of the default process group, or 1 and 0 where there is none.

    Raises ValueError for a rank that there is not, for no sequences, for `groups` of another length, and what
    `plan_batches` raises.
    """

    def __init__(
        self,
        sequences: Sequence["Ids"],
        *,
        unique_tokens: int,
        groups: Sequence[int] | Tensor | np.ndarray[Any, Any] | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        world = distributed.get_world_size() if together else 1
        replicas = world if num_replicas is None else num_replicas
        rank = rank if rank is not None else distributed.get_rank() if together else 0
        if not 0 <= rank < replicas:
            raise ValueError(f"rank must be in 0..{replicas}, got {rank}")
        if not len(sequences):
            raise ValueError("there must be at least one sequence")
        if groups is not None and len(groups) != len(sequences):
            raise ValueError(f"groups must name the group of each of {len(sequences)} sequences, got {len(groups)}")
        ids = arrays(sequences)
        lengths = [len(row) for row in ids]
        order, shared = _neighbours(ids)
        trie = _trie(order, shared, lengths)
        units = _units(ids, _groups(order, shared, lengths) if groups is None else _named(groups), trie, unique_tokens)
        steps = _balanced(units, trie, replicas, unique_tokens)
        super().__init__([step[rank] for step in steps], shuffle=shuffle, seed=seed)


class _Trie(NamedTuple):
    """The trie of all sequences, in runs of tokens within which none ends and none leaves; run 0 is an empty root."""

    last: list[int]  # of each sequence, the run it ends with
    above: list[int]  # of each run, the one before it
    tokens: list[int]  # of each run, how many


class _Unit(NamedTuple):
    """Sequences that are computed together, the runs they take and their unique tokens."""

    indices: list[int]
    runs: list[int]
    cost: int


def _neighbours(ids: list["UInt32"]) -> tuple[list[int], list[int]]:
    """The sequences in lexicographic order, where neighbours share most, and what each shares with the one before."""
    (order,) = plan_batches(ids, tokens=np.iinfo(np.int64).max)
    shared = [0]
    for before, index in pairwise(order):
        length = min(len(ids[before]), len(ids[index]))
        differ = np.flatnonzero(ids[before][:length] != ids[index][:length])
        shared.append(int(differ[0]) if differ.size else length)
    return order, shared


def _trie(order: list[int], shared: list[int], lengths: list[int]) -> _Trie:
    last, above, ends, path = [0] * len(order), [0], [0], [0]

    def go_down(end: int) -> None:
        """Lengthen the path by a run to depth `end`, if it is not there."""
        if ends[path[-1]] < end:
            above.append(path[-1])
            ends.append(end)
            path.append(len(ends) - 1)

    for index, common in zip(order, shared, strict=True):
        left = None
        while ends[path[-1]] > common:
            left = path.pop()
        # Within a run that it leaves there, the path so far is another.
        go_down(common)
        if left is not None:
            above[left] = path[-1]
        go_down(lengths[index])
        last[index] = path[-1]
    return _Trie(last, above, [end - ends[run] for end, run in zip(ends, above, strict=True)])


def _groups(order: list[int], shared: list[int], lengths: list[int]) -> list[list[int]]:
    """Indices of the sequences of each group: of neighbours that share half of their tokens."""
    found: list[list[int]] = []
    for index, common in zip(order, shared, strict=True):
        if not found or 2 * common < lengths[index]:
            found.append([])
        found[-1].append(index)
    return found


def _named(names: Iterable[Any]) -> list[list[int]]:
    """Indices of the sequences of each name."""
    groups: dict[Any, list[int]] = {}
    for index, name in enumerate(names):
        # Tensors are equal by what they hold, but hash by which they are.
        groups.setdefault(name.item() if is_tensor(name) else name, []).append(index)
    return list(groups.values())


def _unit(indices: list[int], trie: _Trie) -> _Unit:
    runs: set[int] = set()
    for index in indices:
        run = trie.last[index]
        while run not in runs:
            runs.add(run)
            run = trie.above[run]
    return _Unit(indices, list(runs), sum(trie.tokens[run] for run in runs))


def _units(ids: list["UInt32"], groups: list[list[int]], trie: _Trie, budget: int) -> list[_Unit]:
    """The groups, those that exceed `budget` in parts."""
    units = []
    for group in groups:
        parts = plan_batches([ids[index] for index in group], unique_tokens=budget)
        units += [_unit([group[place] for place in part], trie) for part in parts]
    return units


def _balanced(units: list[_Unit], trie: _Trie, replicas: int, budget: int) -> list[list[list[int]]]:
    """For each step the batches of all ranks, in about as few steps as `budget` allows."""

    def fill(steps: int) -> list[list[int]] | None:
        return _fill(_at_least(units, steps * replicas, trie), steps * replicas, trie, budget)

    # So many have a batch for each unit, which always fits.
    most = -(-len(units) // replicas)
    batches = fill(1 + bisect_left(range(1, most), True, key=lambda steps: fill(steps) is not None))
    assert batches is not None
    return [batches[start : start + replicas] for start in range(0, len(batches), replicas)]


def _at_least(units: list[_Unit], count: int, trie: _Trie) -> list[_Unit]:
    """The largest units of several sequences halved until there are `count`; where none has, the smallest again."""

    def entry(unit: _Unit) -> tuple[bool, int, list[int], _Unit]:
        return len(unit.indices) == 1, -unit.cost, unit.indices, unit

    heap = [entry(unit) for unit in units]
    heapq.heapify(heap)
    while len(heap) < count and len(heap[0][2]) > 1:
        indices = heap[0][2]
        half = len(indices) // 2
        heapq.heapreplace(heap, entry(_unit(indices[:half], trie)))
        heapq.heappush(heap, entry(_unit(indices[half:], trie)))
    found = sorted((unit for *_, unit in heap), key=lambda unit: unit.cost)
    return found + list(islice(cycle(found), max(0, count - len(found))))


def _fill(units: list[_Unit], bins: int, trie: _Trie, budget: int) -> list[list[int]] | None:
    """Batches of all units, the largest first; None where several units in a batch would exceed `budget`.

    The largest unit that is left goes where least is (Graham, 1969), counted with all that units share. No batch gets
    smaller by another unit: the one that ends largest was no larger than any, before its last.
    """
    batches: list[list[int]] = [[] for _ in range(bins)]
    taken: list[set[int]] = [set() for _ in range(bins)]
    # Among equals the one that holds fewer units, so that none stays empty.
    heap = [(0, 0, place) for place in range(bins)]
    for unit in sorted(units, key=lambda unit: -unit.cost):
        load, held, place = heap[0]
        new = [run for run in unit.runs if run not in taken[place]]
        load += sum(trie.tokens[run] for run in new)
        if held and load > budget:
            return None
        batches[place] += unit.indices
        taken[place].update(new)
        heapq.heapreplace(heap, (load, held + 1, place))
    return [batches[place] for *_, place in sorted(heap, reverse=True)]


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
