"""The masks of tree attention in memory that holds those of any fold of as many rows."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

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


@given(folds_of_as_many_rows(), st.sampled_from([1, 2, 3]), st.one_of(st.none(), st.integers(1, 50)))
@pytest.mark.parametrize("kind", [TreeMask, PathBlocks])
def test_no_array_is_longer_than_what_it_is_given(kind: Any, fold: Fold, group: int, window: int | None) -> None:
    assert fold.num_rows == ROWS
    tiles = Tiles(24, 8, 4, 1)
    most = kind.most(ROWS, tiles, group)
    chain = Fold.from_sequences([range(ROWS)], layout="depth_first")
    same = {name: len(array) for name, array in kind.arrays(chain, tiles, group, window).items()}
    for name, array in kind.arrays(fold, tiles, group, window).items():
        if name in most:
            assert len(array) <= most[name]
        else:
            assert len(array) == same[name]


def test_leaves_below_one_branch_fill_what_there_is() -> None:
    """Each is a block of its own, that lists what stands above it."""
    tiles = Tiles(24, 8, 4, 1)
    sequences = [[*range(7), own] for own in range(ROWS - 7)]
    arrays = PathBlocks.arrays(Fold.from_sequences(sequences, layout="depth_first"), tiles, 1, None)
    # The first leaf has the rows before it in its block.
    assert len(arrays["blocks"]) == 4 * (ROWS - 7)
    assert len(arrays["above"]) == 7 * (ROWS - 8)
    assert np.diff(arrays["partial"]).tolist() == [24 - 7, 24, 24, 24]
