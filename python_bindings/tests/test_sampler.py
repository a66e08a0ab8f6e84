"""Batches for data-parallel training: every rank computes as many unique tokens."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radix_mlp import Fold
from radix_mlp.torch import BalancedBatchSampler

GROUPED = [[group, 7, 7, 7, tail] for tail in range(4) for group in range(6)]


def cost(sequences: list[list[int]], batch: list[int]) -> int:
    return Fold.from_sequences([sequences[index] for index in batch]).num_nodes


def steps(sequences: list[list[int]], replicas: int, **options: Any) -> list[list[list[int]]]:
    """For each step the batches of all ranks."""
    ranks = [
        list(BalancedBatchSampler(sequences, num_replicas=replicas, rank=rank, **options)) for rank in range(replicas)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    return [list(step) for step in zip(*ranks, strict=True)]


def test_groups_stay_together_on_ranks_of_equal_cost() -> None:
    found = steps(GROUPED, 3, unique_tokens=8)
    assert len(found) == 2
    for batch in (batch for step in found for batch in step):
        assert {GROUPED[index][0] for index in batch} == {GROUPED[batch[0]][0]}
        assert cost(GROUPED, batch) == 8


def test_named_groups_stay_together() -> None:
    """Without a token in common."""
    sequences = [[index] for index in range(8)]
    names = [0, 1, 0, 1, 0, 1, 0, 1]
    found = steps(sequences, 2, unique_tokens=4, groups=names)
    assert sorted(sorted(batch) for step in found for batch in step) == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda names: list(torch.tensor(names))])
def test_groups_have_the_same_names_in_all_forms(form: Callable[[list[int]], Any]) -> None:
    (step,) = steps([[index] for index in range(8)], 2, unique_tokens=4, groups=form([0, 0, 0, 1, 1, 1, 1, 0]))
    assert sorted(map(sorted, step)) == [[0, 1, 2, 7], [3, 4, 5, 6]]


def test_many_small_groups_balance_a_large_one() -> None:
    large = [[0, *range(10, 19)]]
    small = [[index] for index in range(1, 11)]
    # The large one comes last, and is still placed first.
    (step,) = steps(small + large, 2, unique_tokens=10)
    assert [cost(small + large, batch) for batch in step] == [10, 10]


def test_what_groups_share_is_counted_once() -> None:
    # Half of the groups begin with the same examples, which a batch computes once.
    sequences = [[1] * 90 + [name] * 10 if name % 2 else [name] * 100 for name in range(2, 42)]
    (step,) = steps(sequences, 2, unique_tokens=1250, groups=range(40))
    costs = [cost(sequences, batch) for batch in step]
    # The examples in both batches, the ends of 20 groups and 20 groups that share nothing.
    assert sum(costs) == 2 * 90 + 20 * 10 + 20 * 100
    assert max(costs) - min(costs) <= 100


def test_a_group_that_exceeds_the_budget_is_split() -> None:
    sequences = [[1, 2, 3, tail] for tail in range(10)]
    found = [batch for step in steps(sequences, 2, unique_tokens=8) for batch in step]
    assert sorted(index for batch in found for index in batch) == list(range(10))
    assert all(cost(sequences, batch) <= 8 for batch in found)


def test_ranks_without_a_sequence_repeat_one() -> None:
    ((first, second),) = steps([[5, 6]], 2, unique_tokens=8)
    assert first == second == [0]


def test_the_shortest_are_repeated() -> None:
    (step,) = steps([[5, 6, 7], [5], [5, 6]], 5, unique_tokens=8)
    assert sorted(step) == [[0], [1], [1], [2], [2]]


def test_a_sequence_that_exceeds_the_budget_is_not_repeated() -> None:
    assert steps([[1] * 100, [2]], 1, unique_tokens=2) == [[[0]], [[1]]]


def test_an_epoch_shuffles_steps_alike_on_all_ranks() -> None:
    plain = steps(GROUPED, 2, unique_tokens=8)
    orders = []
    for epoch in range(8):
        ranks = []
        for rank in range(2):
            sampler = BalancedBatchSampler(GROUPED, unique_tokens=8, num_replicas=2, rank=rank, shuffle=True, seed=3)
            sampler.set_epoch(epoch)
            ranks.append(list(sampler))
        orders.append([plain.index(list(step)) for step in zip(*ranks, strict=True)])
        assert sorted(orders[-1]) == list(range(len(plain)))
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "num_replicas": 2}, r"rank must be in 0\.\.2, got 2"),
        ({"num_replicas": 0}, r"rank must be in 0\.\.0, got 0"),
        ({"rank": -1}, "got -1"),
        ({"groups": [1]}, "each of 24 sequences, got 1"),
        ({"unique_tokens": 0}, "at least one token, got 0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedBatchSampler(GROUPED, **{"unique_tokens": 8, **options})


def test_no_sequences() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        BalancedBatchSampler([], unique_tokens=8)


def test_one_process_has_everything() -> None:
    sampler = BalancedBatchSampler(GROUPED, unique_tokens=1000)
    assert [sorted(batch) for batch in sampler] == [list(range(24))]
    assert len(sampler) == 1


SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=20)


@given(SEQUENCES, st.integers(1, 4), st.integers(1, 30), st.booleans())
def test_every_sequence_once_within_the_budget_in_balance(
    sequences: list[list[int]], replicas: int, budget: int, named: bool
) -> None:
    names = [len(sequence) % 3 for sequence in sequences] if named else None
    found = steps(sequences, replicas, unique_tokens=budget, groups=names)
    batches = [batch for step in found for batch in step]
    assert all(batches)
    held = sorted(index for batch in batches for index in batch)
    assert set(held) == set(range(len(sequences)))
    # Repeated are only those that fill ranks that would have none.
    assert len(held) == len(sequences) or len(held) == len(batches)
    assert len(held) - len(sequences) < replicas
    assert all(cost(sequences, batch) <= budget or len(batch) == 1 for batch in batches)


@given(st.lists(st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=6), min_size=1, max_size=8))
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("replicas", [2, 3])
def test_the_ranks_of_a_step_differ_by_a_group_at_most(
    replicas: int, alike: bool, groups: list[list[list[int]]]
) -> None:
    # Groups share nothing with each other, so that a batch costs what its groups cost, or every other begins alike.
    length = 12 if alike else 1
    names = [name for name, group in enumerate(groups) for _ in group]
    beginnings = [[9 if alike and name % 2 else 10 + name] * length for name in names]
    rest = [sequence for group in groups for sequence in group]
    sequences = [[*beginning, *sequence] for beginning, sequence in zip(beginnings, rest, strict=True)]
    largest = max(cost(sequences, [i for i, name in enumerate(names) if name == group]) for group in range(len(groups)))
    found = steps(sequences, replicas, unique_tokens=40 * length, groups=names)
    costs = [cost(sequences, batch) for step in found for batch in step]
    assert max(costs) - min(costs) <= largest


def calls(make: Callable[[], object]) -> int:
    """How many functions, of Python and C, are called."""
    count = 0

    def called(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        make()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("together", [False, True], ids=["a batch each", "one group to split"])
def test_four_times_the_sequences_are_not_sixteen_times_the_work(together: bool) -> None:
    def work(count: int) -> int:
        sequences = [[index] + [7] * 5 for index in range(count)]
        # Six tokens a sequence: none fits with another, or there is a rank for each.
        budget, replicas = (6 * count, count) if together else (10, 1)
        names = [0 if together else index for index in range(count)]
        return calls(
            lambda: BalancedBatchSampler(sequences, unique_tokens=budget, groups=names, num_replicas=replicas, rank=0)
        )

    assert work(1600) < 6 * work(400)
