from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from radix_mlp._host import TokenIds

Layout = Literal["first_occurrence", "depth_first"]
Csr = tuple[NDArray[np.uintp], NDArray[np.uint32]]

__version__: str

def cuda_sources() -> dict[str, str]: ...
def compute_fold_and_scatter(
    input_ids: TokenIds,
    position_ids: NDArray[np.uint32],
    offsets: NDArray[np.uint32],
    pad: int | None,
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]: ...
def plan_batches(sequences: list[NDArray[np.uint32]], budget: int, unique: bool) -> list[list[int]]: ...

class Fold:
    def __new__(
        cls,
        input_ids: TokenIds,
        position_ids: NDArray[np.uint32] | None,
        cu_seq_lengths: NDArray[np.uint32],
        layout: Layout,
        pad_multiple_of: int | None,
        salts: NDArray[np.uint64] | None,
    ) -> Self: ...
    def _counts(self) -> tuple[int, int, int, int]: ...
    def _array(self, name: str) -> NDArray[np.uint32] | None: ...
    def draw(self, label: Callable[[list[int]], str]) -> str: ...

def block_mask(fold: Fold, query_block: int, key_block: int) -> list[Csr]: ...
def path_mask(
    fold: Fold, query_block: int, key_block: int, window: int | None
) -> tuple[list[NDArray[np.uint32]], list[Csr]]: ...
