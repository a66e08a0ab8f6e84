"""Copies of folds, in this process or another."""

import copy
import pickle
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from oracle import Batch, batches, paddings
from radix_mlp import Fold

ARRAYS = (
    "input_ids",
    "position_ids",
    "scatter_indices",
    "fold_gather",
    "cu_seq_lengths",
    "query_lengths",
    "subtree_end",
    "row_order",
)


@given(batches(), paddings, st.sampled_from(["first_occurrence", "depth_first"]), st.booleans())
def test_copies_are_equal(batch: Batch, pad_multiple_of: int | None, layout: Any, salted: bool) -> None:
    salts = batch.salts if salted else None
    fold = Fold(*batch.arrays(), layout=layout, pad_multiple_of=pad_multiple_of, salts=salts)
    for other in (pickle.loads(pickle.dumps(fold)), copy.deepcopy(fold)):
        assert repr(other) == repr(fold)
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(other, name), getattr(fold, name))
