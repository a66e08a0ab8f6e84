"""A batch folded onto its prefix trie, over NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radix_mlp import _core
from radix_mlp._host import is_tensor, to_host, token_ids, unsigned

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from radix_mlp.torch import FoldTensors

    Ids = ArrayLike | torch.Tensor
    UInt32 = NDArray[np.uint32]

T = TypeVar("T")


def compute_fold_and_scatter(
    input_ids: Ids,
    position_ids: Ids,
    cu_seq_lengths: Ids,
    pad_multiple_of: int | None = None,
    bound_checks: bool | None = None,
) -> tuple[UInt32, UInt32, UInt32, UInt32]:
    """Fold a batch in first-occurrence layout, in the form of the published package 0.0.x.

    `input_ids` and `position_ids` are [N], `cu_seq_lengths` [sequences + 1]: integers of any width,
    in arrays, lists or tensors. Returns uint32 arrays `(compact_input_ids, compact_position_ids,
    scatter_indices, fold_gather)`: `scatter_indices` is [N], the others are [rows].

    `bound_checks` has no effect: input is always checked. Raises ValueError for input that is not a
    batch, TypeError for what are not integers. `Fold` gives the same with names, and more.
    """
    batch = (input_ids, position_ids, cu_seq_lengths)
    return _call(_core.compute_fold_and_scatter, batch, pad_multiple_of)


class BlockMask(NamedTuple):
    """The mask of tree attention in blocks: which key blocks each query block sees whole, and which in part.

    Query block b is the rows `b * query_block:(b + 1) * query_block`, the last one cut at the number of rows; key
    blocks likewise. `full` and `partial` are compressed sparse rows `(offsets [num_blocks + 1], indices)`: the key
    blocks of query block b are `indices[offsets[b]:offsets[b + 1]]`, ascending. A key block that is cut is one that is
    seen in part. The form is that of FlexAttention's `BlockMask`.
    """

    query_block: int
    key_block: int
    full: _core.Csr
    partial: _core.Csr

    @property
    def num_blocks(self) -> int:
        """Number of query blocks."""
        return len(self.full[0]) - 1


class PathMask(NamedTuple):
    """The mask of tree attention in blocks of paths: keys are cut where a row's path comes to a multiple of their size.

    Paths are counted from their roots, wherever in the batch their rows lie: sums over these blocks are those of a
    sequence alone. `blocks` [blocks, 4] has `first`, `end`, `depth` and `above` of each: its keys are the
    `depth % key_block` rows from `above[above]` on, then row `first`, which has `depth` rows above it, and those that
    follow, `key_block` in all. Rows `first:end` have the block on their path, and see its keys up to themselves.

    `partial` and `full` are compressed sparse rows `(offsets [query blocks + 1], indices)`: of which blocks some row of
    a query block does not see some key, and which all see whole but for the window, the deepest first. Those that lie
    beyond the `window` of all its rows are not listed. `depth` [rows] has the number of rows above each.
    """

    query_block: int
    key_block: int
    window: int | None
    depth: NDArray[np.uint32]
    blocks: NDArray[np.uint32]
    above: NDArray[np.uint32]
    partial: _core.Csr
    full: _core.Csr


class Fold(_core.Fold):
    """A batch folded onto its prefix trie: N tokens of original space, N' rows of compact space.

    Two tokens share a row if and only if the whole paths of (token id, position id) pairs from the
    start of their sequences to them are equal, and their sequences' salts.

    Its arrays are read-only uint32 views of the fold's own memory, and None where the layout does not have them. It can
    be copied and pickled.
    """

    _salts: NDArray[np.uint64] | None = None

    def __new__(
        cls,
        input_ids: Ids,
        position_ids: Ids | None,
        cu_seq_lengths: Ids,
        *,
        layout: _core.Layout = "first_occurrence",
        pad_multiple_of: int | None = None,
        salts: Ids | None = None,
    ) -> Self:
        """Fold the packed batch of `input_ids` and `position_ids` [N].

        Without `position_ids`, each sequence's tokens are at positions 0, 1, 2 and so on. Sequence s is the tokens
        `cu_seq_lengths[s]:cu_seq_lengths[s + 1]`. `layout` orders the rows: "first_occurrence" for query-folded
        attention, "depth_first" for tree attention. `pad_multiple_of` rounds the number of rows up; padding rows are
        token 0 at position 0. Sequences of different `salts` [sequences] share nothing, as with another adapter or
        another image behind the same tokens.

        Raises ValueError for input that is not a batch, TypeError for what are not integers. Other
        threads run meanwhile; they must not write to the arrays.
        """
        batch = (input_ids, position_ids, cu_seq_lengths)
        if salts is not None:
            salts = unsigned("salts", to_host({"salts": salts})["salts"], np.uint64)
        new = partial(super().__new__, cls)
        fold = _call(new, batch, layout, pad_multiple_of, salts, counts_positions=position_ids is None)
        if salts is not None:
            fold._salts = salts.copy()
        return fold

    def __reduce__(self) -> tuple[Any, ...]:
        """The batch that it was made of, of which a copy or another process makes the same fold."""
        padded = self.num_rows if self.num_rows > self.num_nodes else None
        again = partial(type(self), layout=self.layout, pad_multiple_of=padded, salts=self._salts)
        return again, (self.unfold(self.input_ids), self.unfold(self.position_ids), self.cu_seq_lengths)

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Ids],
        *,
        layout: _core.Layout = "first_occurrence",
        pad_multiple_of: int | None = None,
        salts: Ids | None = None,
    ) -> Self:
        """Fold sequences of token ids, each at positions 0, 1, 2 and so on."""
        rows = [token_ids(name, ids) for name, ids in _named(sequences).items()]
        try:
            return cls(
                np.concatenate(rows) if rows else np.empty(0, np.uint32),
                None,
                _offsets([len(row) for row in rows]),
                layout=layout,
                pad_multiple_of=pad_multiple_of,
                salts=salts,
            )
        except ValueError:
            # Where it is an id's, the error names the sequence.
            arrays(sequences)
            raise

    @classmethod
    def from_padded(
        cls,
        input_ids: Ids,
        attention_mask: Ids,
        position_ids: Ids | None = None,
        *,
        layout: _core.Layout = "first_occurrence",
        pad_multiple_of: int | None = None,
        salts: Ids | None = None,
    ) -> Self:
        """Fold a padded batch: `input_ids` and `attention_mask` [sequences, length].

        Each row's tokens where the mask is 1 are one sequence, padded on whichever side; original
        space is `values[attention_mask.astype(bool)]`. `position_ids`, broadcast to the same shape,
        count each row's tokens from 0 where they are not given.

        Raises ValueError for shapes or devices that differ and for values that are no mask or no ids, TypeError for
        what are not integers.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if position_ids is not None:
            given["position_ids"] = position_ids
        host = {name: np.asarray(values) for name, values in to_host(given).items()}
        ids, mask = host["input_ids"], host["attention_mask"]
        if ids.ndim != 2 or mask.shape != ids.shape:
            raise ValueError(
                "input_ids and attention_mask must have one shape [sequences, length], "
                f"got {ids.shape} and {mask.shape}"
            )
        kept = mask.astype(bool)
        if mask.size and mask.dtype.kind not in "biu":
            raise TypeError(
                f"attention_mask must hold integers or booleans, got dtype {mask.dtype} with {mask.flat[0]}"
            )
        if mask.dtype != bool and (stray := mask[mask != kept]).size:
            raise ValueError(f"attention_mask must hold 0 and 1, got {stray[0]}")
        offsets = _offsets(np.count_nonzero(kept, axis=1))
        positions = None
        if position_ids is not None:
            positions = _broadcast("position_ids", host["position_ids"], ids.shape)[kept]
        return cls(
            ids.ravel() if kept.all() else ids[kept],
            positions,
            offsets,
            layout=layout,
            pad_multiple_of=pad_multiple_of,
            salts=salts,
        )

    @property
    def layout(self) -> _core.Layout:
        """How the rows are ordered."""
        return "first_occurrence" if self.subtree_end is None else "depth_first"

    @cached_property
    def _sizes(self) -> tuple[int, int, int, int]:
        return self._counts()

    @property
    def num_tokens(self) -> int:
        """N, the tokens of original space."""
        return self._sizes[0]

    @property
    def num_sequences(self) -> int:
        """Sequences, empty ones as well."""
        return self._sizes[1]

    @property
    def num_nodes(self) -> int:
        """N', the nodes of the trie."""
        return self._sizes[2]

    @property
    def num_rows(self) -> int:
        """N' rounded up to the padding."""
        return self._sizes[3]

    @property
    def compression(self) -> float:
        """N / N', 1 for no tokens."""
        return self.num_tokens / self.num_nodes if self.num_nodes else 1.0

    @property
    def gamma(self) -> float:
        """N' / N, the share of the work that is left; 1 for no tokens."""
        return 1 / self.compression

    @property
    def input_ids(self) -> UInt32:
        """Token ids of the compact batch [rows]."""
        return self._present("input_ids")

    @property
    def position_ids(self) -> UInt32:
        """Position ids of the compact batch [rows]."""
        return self._present("position_ids")

    @property
    def scatter_indices(self) -> UInt32:
        """The row of each token [N]: `original[i] == compact[scatter_indices[i]]`."""
        return self._present("scatter_indices")

    @property
    def fold_gather(self) -> UInt32:
        """The first token of each row [rows]: `compact[j] == original[fold_gather[j]]`."""
        return self._present("fold_gather")

    @property
    def cu_seq_lengths(self) -> UInt32:
        """Where sequences start and end in original space [sequences + 1]."""
        return self._present("cu_seq_lengths")

    @property
    def query_lengths(self) -> UInt32 | None:
        """In first-occurrence layout, how many new rows each sequence brings [sequences].

        They are its last tokens, and stand in compact space in the order of the sequences.
        """
        return self._array("query_lengths")

    @property
    def subtree_end(self) -> UInt32 | None:
        """In depth-first layout [rows]: row q attends to row kv if and only if `kv <= q < subtree_end[kv]`."""
        return self._array("subtree_end")

    @property
    def row_order(self) -> UInt32 | None:
        """In depth-first layout [rows]: row j is row `row_order[j]` of the other layout."""
        return self._array("row_order")

    def _present(self, name: str) -> UInt32:
        found = self._array(name)
        assert found is not None
        return found

    @overload
    def fold(self, original: torch.Tensor) -> torch.Tensor: ...
    @overload
    def fold(self, original: ArrayLike) -> NDArray[Any]: ...
    def fold(self, original: Any) -> Any:
        """Take values from original to compact space, [N, ...] to [rows, ...].

        Padding rows copy token 0. A tensor stays on its device and in its graph.
        """
        return self._select("fold_gather", original, self.num_tokens)

    @overload
    def unfold(self, compact: torch.Tensor) -> torch.Tensor: ...
    @overload
    def unfold(self, compact: ArrayLike) -> NDArray[Any]: ...
    def unfold(self, compact: Any) -> Any:
        """Take values from compact to original space, [rows, ...] to [N, ...]."""
        return self._select("scatter_indices", compact, self.num_rows)

    def _select(self, indices: str, values: Any, rows: int) -> Any:
        values = values if is_tensor(values) else np.asarray(values)
        if values.ndim == 0 or len(values) != rows:
            raise ValueError(f"expected {rows} rows, got shape {tuple(values.shape)}")
        if is_tensor(values):
            return values.index_select(0, getattr(self.tensors(values.device), indices))
        return values.take(getattr(self, indices), axis=0)

    def tensors(self, device: torch.device | str = "cpu") -> FoldTensors:
        """The fold's arrays as int32 tensors on `device`, in one transfer at the first call."""
        import torch

        from radix_mlp.torch.fold import fold_tensors

        device = torch.device(device)
        return self.derived(("tensors", device), lambda: fold_tensors(self, device))

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when `key` was first asked for: what attention makes of a fold, it keeps here."""
        if key not in self._derived:
            import torch

            # What is made in inference mode no backward pass could save, and the fold may be trained on later.
            with torch.inference_mode(False):
                self._derived[key] = make()
        return cast("T", self._derived[key])

    @cached_property
    def _derived(self) -> dict[Hashable, Any]:
        return {}

    def block_mask(self, query_block: int, key_block: int | None = None) -> BlockMask:
        """The mask of tree attention, from a fold in depth-first layout, in blocks of so many rows.

        `key_block` is `query_block` where it is not given. Raises ValueError for the other layout and for blocks that
        are not positive.
        """
        key_block = query_block if key_block is None else key_block
        return BlockMask(query_block, key_block, *_core.block_mask(self, query_block, key_block))

    def path_mask(self, query_block: int, key_block: int, window: int | None = None) -> PathMask:
        """The mask of tree attention in blocks of paths, from a fold in depth-first layout, for queries in blocks of so
        many rows and keys in blocks of so many.

        With a `window` a row sees no more than so many rows of its path, itself included. Raises ValueError for the
        other layout, for blocks that are not positive and for a window that is not or that a uint32 cannot hold.
        """
        if window is not None and not 0 < window < 2**32:
            raise ValueError(f"window must be positive and fit in a uint32, got {window}")
        (depth, blocks, above), (partial, full) = _core.path_mask(self, query_block, key_block, window)
        return PathMask(query_block, key_block, window, depth, blocks.reshape(-1, 4), above, partial, full)

    def draw(self, label: Callable[[list[int]], str] | None = None) -> str:
        """A picture of the trie in text, one line for each run of tokens that sequences share.

        `label` renders the ids of a run: `tokenizer.decode`, say. The first ids without it.
        """
        return super().draw(_first_ids if label is None else label)

    def __repr__(self) -> str:
        rows = f", rows={self.num_rows}" if self.num_rows != self.num_nodes else ""
        return (
            f"{type(self).__name__}(sequences={self.num_sequences}, tokens={self.num_tokens}, "
            f"nodes={self.num_nodes}{rows}, compression={self.compression:.2f}, "
            f"layout={self.layout!r})"
        )


def arrays(sequences: Sequence[Ids]) -> list[UInt32]:
    """The ids of each sequence."""
    return [unsigned(name, ids) for name, ids in _named(sequences).items()]


def _named(sequences: Sequence[Ids]) -> dict[str, Any]:
    """The sequences on the host, by the names that errors give them."""
    return to_host({f"sequences[{i}]": ids for i, ids in enumerate(sequences)})


def _call(
    core: Callable[..., T], batch: tuple[Ids, Ids | None, Ids], *options: Any, counts_positions: bool = False
) -> T:
    """`core` on `batch`, once its ids, positions and offsets are the contiguous integers it reads.

    With `counts_positions` there are none of these.
    """
    if getattr(batch[0], "dtype", None) == np.uint32:
        try:
            return core(*batch, *options)
        except TypeError:
            pass
    names = ("input_ids", "position_ids", "cu_seq_lengths")
    given = dict(zip(names, batch, strict=True))
    if counts_positions:
        del given["position_ids"]
    host = to_host(given)
    arrays = {name: (token_ids if name == "input_ids" else unsigned)(name, values) for name, values in host.items()}
    return core(*(arrays.get(name) for name in names), *options)


def _offsets(lengths: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _broadcast(name: str, values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to {shape}, the shape of input_ids, got {values.shape}") from None


def _first_ids(ids: list[int]) -> str:
    shown = " ".join(map(str, ids[:8]))
    return shown if len(ids) <= 8 else f"{shown} …"
