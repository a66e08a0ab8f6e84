"""The walks of the key gradient, against each pair of row and key that it is the sum of."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from radix_mlp import Fold  # noqa: E402
from radix_mlp.torch import walks  # noqa: E402
from radix_mlp.torch.tree_mask import Tiles  # noqa: E402
from radix_mlp.torch.walks import walk_arrays  # noqa: E402


@st.composite
def folds(draw: st.DrawFn) -> Fold:
    prefix = draw(st.integers(0, 60))
    own = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    sequences = [[0] * prefix + [1 + sequence] * length for sequence, length in enumerate(own)]
    multiple = draw(st.sampled_from([None, 16]))
    return Fold.from_sequences(sequences, layout="depth_first", pad_multiple_of=multiple)


@given(
    fold=folds(),
    tiles=st.sampled_from([Tiles(16, 8, 4, 1), Tiles(8, 16, 4, 1), Tiles(64, 64, 4, 1)]),
    group=st.sampled_from([1, 2, 3]),
    longest=st.one_of(st.none(), st.integers(1, 100)),
    aligned=st.booleans(),
)
# Blocks that begin within a step.
@example(
    fold=Fold.from_sequences([[0] * 60], layout="depth_first"),
    tiles=Tiles(16, 8, 4, 1),
    group=3,
    longest=20,
    aligned=True,
)
def test_every_row_that_sees_a_key_is_walked_once(
    fold: Fold, tiles: Tiles, group: int, longest: int | None, aligned: bool
) -> None:
    arrays = walk_arrays(fold, tiles, group, 2, 264, aligned=aligned, longest=longest)
    step = tiles.tile // group
    blocks = -(-fold.num_rows // tiles.key_block)
    walked = np.zeros((blocks, fold.num_rows + step), int)
    for block, first, end in zip(arrays["key_block"], arrays["first_step"], arrays["walk_end"], strict=True):
        start = block * tiles.key_block
        start = (start // step * step if aligned else start) + first * step
        assert longest is None or end - start <= -(-longest // step) * step
        walked[block, start:end] += 1
    assert fold.subtree_end is not None
    for key, last in enumerate(fold.subtree_end.tolist()):
        assert (walked[key // tiles.key_block, key:last] == 1).all()
    assert walked.max() == 1


@given(folds(), st.integers(1, 100))
def test_parts_of_a_block_follow_each_other(fold: Fold, longest: int) -> None:
    arrays = walk_arrays(fold, Tiles(8, 16, 4, 1), 1, 2, 264, aligned=False, longest=longest)
    key_block, part = arrays["key_block"], arrays["part"]
    assert set(key_block) == set(range(-(-fold.num_rows // 16)))
    bounds = arrays["first_part"]
    for block, first, last in zip(arrays["split_block"], bounds[:-1], bounds[1:], strict=True):
        assert part[key_block == block].tolist() == list(range(first + 1, last + 1))
        assert last - first > 1
    whole = ~np.isin(key_block, arrays["split_block"])
    assert not part[whole].any()
    assert len(np.unique(key_block[whole])) == whole.sum()
    assert bounds[-1] == (~whole).sum()


def test_a_long_walk_is_shared_out() -> None:
    tiles, group, kv_heads = Tiles(64, 64, 4, 2), 2, 8
    fold = Fold.from_sequences([[0] * 64 + [sequence] * 60 for sequence in range(1, 101)], layout="depth_first")
    arrays = walk_arrays(fold, tiles, group, kv_heads, 264, aligned=False)
    walked = [end - first * 32 for first, end in zip(arrays["first_step"], arrays["walk_end"], strict=True)]
    assert max(walked[: arrays["first_part"][1]]) == walks.MIN_WALK // group
    # Where every program's share is more, there is no need.
    assert not walk_arrays(fold, tiles, group, kv_heads, 1, aligned=False)["part"].any()
