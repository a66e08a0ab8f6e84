"""Batches for data-parallel training: every rank computes as many unique tokens."""

from typing import Any

import pytest
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


def test_many_small_groups_balance_a_large_one() -> None:
    large = [[0, *range(10, 19)]]
    small = [[index] for index in range(1, 11)]
    # The large one comes last, and is still placed first.
    (step,) = steps(small + large, 2, unique_tokens=10)
    assert [cost(small + large, batch) for batch in step] == [10, 10]


def test_a_group_that_exceeds_the_budget_is_split() -> None:
    sequences = [[1, 2, 3, tail] for tail in range(10)]
    found = [batch for step in steps(sequences, 2, unique_tokens=8) for batch in step]
    assert sorted(index for batch in found for index in batch) == list(range(10))
    assert all(cost(sequences, batch) <= 8 for batch in found)


def test_ranks_without_a_sequence_repeat_one() -> None:
    ((first, second),) = steps([[5, 6]], 2, unique_tokens=8)
    assert first == second == [0]


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
    assert all(cost(sequences, batch) <= budget or len(batch) == 1 for batch in batches)


@given(st.lists(st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=6), min_size=1, max_size=8))
@pytest.mark.parametrize("replicas", [2, 3])
def test_the_ranks_of_a_step_differ_by_a_group_at_most(replicas: int, groups: list[list[list[int]]]) -> None:
    # Groups share nothing with each other, so that a batch costs what its groups cost.
    sequences = [[10 + name, *sequence] for name, group in enumerate(groups) for sequence in group]
    names = [name for name, group in enumerate(groups) for _ in group]
    largest = max(cost(sequences, [i for i, name in enumerate(names) if name == group]) for group in range(len(groups)))
    for step in steps(sequences, replicas, unique_tokens=40, groups=names):
        costs = [cost(sequences, batch) for batch in step]
        assert max(costs) - min(costs) <= largest
