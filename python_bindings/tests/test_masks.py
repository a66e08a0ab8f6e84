"""The masks of tree attention in memory that holds those of any fold of as many rows."""

import itertools
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch

from radix_mlp import Fold
from radix_mlp.torch.path_blocks import PathBlocks
from radix_mlp.torch.tree_mask import Tiles, TreeMask

ROWS = 96


@st.composite
def folds_of_as_many_rows(draw: st.DrawFn) -> Fold:
    """A trie of which each row hangs below one of those before it, or is a root."""
    parents = draw(st.lists(st.integers(0, ROWS), min_size=ROWS, max_size=ROWS))
    paths: list[list[int]] = []
    for row, parent in enumerate(parents):
        above = paths[parent % row] if row and parent < ROWS else []
        paths.append([*above, row])
    return Fold.from_sequences(paths, layout="depth_first")


CHAIN = Fold.from_sequences([range(ROWS)], layout="depth_first")
groups, windows = st.sampled_from([1, 2, 3]), st.one_of(st.none(), st.integers(1, 50))


@given(fold=folds_of_as_many_rows(), group=groups, window=windows)
# All query blocks of few rows, which see many blocks of keys.
@example(fold=CHAIN, group=3, window=None)
@pytest.mark.parametrize("kind", [TreeMask, PathBlocks])
def test_no_array_is_longer_than_what_it_is_given(kind: Any, fold: Fold, group: int, window: int | None) -> None:
    assert fold.num_rows == ROWS
    tiles = Tiles(24, 4, 4, 1)
    most = kind.most(ROWS, tiles, group)
    same = {name: len(array) for name, array in kind.arrays(CHAIN, tiles, group, window).items()}
    for name, array in kind.arrays(fold, tiles, group, window).items():
        if name in most:
            assert len(array) <= most[name]
        else:
            assert len(array) == same[name]


@given(folds=st.tuples(*[folds_of_as_many_rows()] * 2), group=groups, window=windows)
@pytest.mark.parametrize("kind", [TreeMask, PathBlocks])
def test_a_fixed_mask_is_that_of_the_fold_that_was_loaded_last(
    kind: Any, folds: tuple[Fold, Fold], group: int, window: int | None
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    from radix_mlp.transformers.graphs import FixedMask

    tiles = Tiles(24, 8, 4, 1)
    q, k = torch.empty(ROWS, 2 * group, 16), torch.empty(ROWS, 2, 16)
    with patch("radix_mlp.transformers.graphs.mask_kind", lambda _: (kind, tiles)):
        fixed = FixedMask(folds[0], q, k, window)
    addresses = {name: getattr(fixed.mask, name).data_ptr() for name in kind.arrays(CHAIN, tiles, group, window)}
    fixed.load(folds[1])
    assert (fixed.mask.tiles, fixed.mask.window) == (tiles, window)
    for name, array in kind.arrays(folds[1], tiles, group, window).items():
        held = getattr(fixed.mask, name)
        assert held[: len(array)].tolist() == array.tolist()
        assert held.data_ptr() == addresses[name]


@given(fold=folds_of_as_many_rows(), group=groups, window=windows)
# Query blocks that see key blocks whole.
@example(fold=CHAIN, group=2, window=20)
def test_path_blocks_are_those_of_the_mask(fold: Fold, group: int, window: int | None) -> None:
    tiles = Tiles(24, 8, 4, 1)
    mask, arrays = fold.path_mask(24 // group, 8, window), PathBlocks.arrays(fold, tiles, group, window)
    assert arrays["blocks"].tolist() == mask.blocks.ravel().tolist()
    assert arrays["above"].tolist() == mask.above.tolist()
    assert arrays["depth"].tolist() == ([] if window is None else mask.depth.tolist())
    for name, (offsets, indices) in (("partial", mask.partial), ("full", mask.full)):
        assert len(arrays[name]) == len(offsets)
        bounds = zip(itertools.pairwise(arrays[name].tolist()), itertools.pairwise(offsets.tolist()), strict=True)
        for own, given_ones in bounds:
            assert arrays["listed"][slice(*own)].tolist() == indices[slice(*given_ones)].tolist()


def test_leaves_below_one_branch_fill_what_there_is() -> None:
    """Each is a block of its own, that lists what stands above it."""
    tiles = Tiles(24, 8, 4, 1)
    sequences = [[*range(7), own] for own in range(ROWS - 7)]
    arrays = PathBlocks.arrays(Fold.from_sequences(sequences, layout="depth_first"), tiles, 1, None)
    # The first leaf has the rows before it in its block.
    assert len(arrays["blocks"]) == 4 * (ROWS - 7)
    assert len(arrays["above"]) == 7 * (ROWS - 8)
    assert np.diff(arrays["partial"]).tolist() == [24 - 7, 24, 24, 24]
