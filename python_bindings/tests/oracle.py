"""A naive fold, and the batches to compare it on."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Node = tuple[int, ...]
UInt32 = NDArray[np.uint32]


@dataclass
class Batch:
    """A packed batch as Python lists."""

    input_ids: list[int]
    position_ids: list[int]
    cu_seq_lengths: list[int]
    salts: list[int]

    def arrays(self) -> tuple[UInt32, UInt32, UInt32]:
        ids, positions = np.array(self.input_ids, np.uint32), np.array(self.position_ids, np.uint32)
        return ids, positions, np.array(self.cu_seq_lengths, np.uint32)


def naive_paths(batch: Batch, *, salted: bool = False) -> list[Node]:
    """What identifies each token's node: everything that its state depends on."""
    paths = []
    for sequence, salt in enumerate(batch.salts):
        path: Node = (salt,) if salted else ()
        for i in range(batch.cu_seq_lengths[sequence], batch.cu_seq_lengths[sequence + 1]):
            path = (*path, batch.input_ids[i], batch.position_ids[i])
            paths.append(path)
    return paths


def naive_fold(
    batch: Batch, pad_multiple_of: int | None = None, *, salted: bool = False
) -> tuple[list[int], list[int], list[int], list[int]]:
    """`compute_fold_and_scatter` with a dictionary of whole paths."""
    row_of: dict[Node, int] = {}
    gather = []
    scatter = []
    for i, path in enumerate(naive_paths(batch, salted=salted)):
        if path not in row_of:
            row_of[path] = len(row_of)
            gather.append(i)
        scatter.append(row_of[path])
    ids = [batch.input_ids[i] for i in gather]
    positions = [batch.position_ids[i] for i in gather]
    padding = [0] * (-len(gather) % (pad_multiple_of or 1))
    return ids + padding, positions + padding, scatter, gather + padding


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Few different tokens, some far apart, so that sequences share, repeat, branch and end early."""
    token = st.sampled_from([0, 1, 2, 2**32 - 1])
    sequences = draw(st.lists(st.lists(token, max_size=8), max_size=8))
    batch = Batch([], [], [0], [])
    for ids in sequences:
        start = draw(st.sampled_from([0, 0, 7]))
        batch.input_ids += ids
        batch.position_ids += range(start, start + len(ids))
        batch.cu_seq_lengths.append(len(batch.input_ids))
        batch.salts.append(draw(st.sampled_from([0, 2**64 - 1])))
    return batch


paddings = st.sampled_from([None, 1, 4, 64])
