"""One call's tokens, packed and folded, and the way of its results back to the shape that was asked for."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp._host import TokenIds, token_ids, unsigned
from radix_mlp.fold import Fold
from radix_mlp.torch.eager import eager
from radix_mlp.torch.fold import to_device
from radix_mlp.transformers.attention import Level

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """A call's sequences, one after another, and where their tokens stand in what was passed in.

    `input_ids` and `position_ids` are [N], `offsets` [sequences + 1]. Without `position_ids` each sequence's tokens
    count from 0. Ids of int64 may be the caller's own memory, which the fold checks. Sequence s came from the flattened
    places `starts[s]:starts[s] + length` of `shape`, all others are padding. `span` is how many positions there
    are, from 0 to the largest, padding's among them.
    """

    input_ids: TokenIds
    position_ids: NDArray[np.uint32] | None
    offsets: Int64
    starts: Int64
    shape: tuple[int, int]
    span: int


@dataclass(frozen=True)
class Batch:
    """A folded call: `fold` is what is computed on `device`, at level "none" one that shares nothing.

    `copies` is the batch with nothing shared, at level "mlp" only.
    """

    packed: Packed
    fold: Fold
    copies: Fold | None
    device: torch.device

    @eager
    def inputs(self) -> dict[str, Tensor]:
        """`input_ids` and `position_ids` [1, rows], int64, on the device."""
        arrays = {"input_ids": self.fold.input_ids, "position_ids": self.fold.position_ids}
        inputs = {name: ids.unsqueeze(0) for name, ids in to_device(arrays, self.device, torch.int64).items()}
        # torch.compile takes where a slice begins for the number of rows where they are equal, and compiles again.
        inputs["position_ids"] = inputs["position_ids"].clone()
        return inputs

    @cached_property
    def host_places(self) -> Tensor:
        """The compact row of each place of the input, flat, and the number of rows at padding; int32 on the host.

        Made when it is first asked for: but for the choice of logits, that is when the device has work.
        """
        packed, (sequences, length) = self.packed, self.packed.shape
        places = torch.empty(sequences * length, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        index: Int32 = places.numpy()
        index.fill(self.fold.num_rows)
        scatter, bounds = self.fold.scatter_indices, packed.offsets.tolist()
        for start, begin, end in zip(packed.starts.tolist(), bounds, bounds[1:], strict=False):
            index[start : start + end - begin] = scatter[begin:end]
        return places

    @property
    def index(self) -> Int32:
        """`host_places` as an array [sequences, length]."""
        index: Int32 = self.host_places.numpy().reshape(self.packed.shape)
        return index

    @cached_property
    def places(self) -> Tensor:
        """`host_places` on the device."""
        return self.host_places.to(self.device, non_blocking=True)

    def restore(self, compact: Tensor, dim: int = 1) -> Tensor:
        """Compact rows in dimension `dim` of a [1, ...] tensor as a padded batch, zeros at padding."""
        padded = len(self.packed.input_ids) < len(self.host_places)
        return unfold_rows(compact, self.places, self.packed.shape, dim, padded=padded)


def unfold_rows(compact: Tensor, places: Tensor, shape: tuple[int, ...], dim: int, *, padded: bool) -> Tensor:
    """Rows of `compact` [1, ..., rows, ...] at `places`, as [shape[0], ..., shape[1], ...]; past the end are zeros."""
    rows = compact.squeeze(0)
    dim -= 1
    if padded:
        blank = rows.new_zeros(*rows.shape[:dim], 1, *rows.shape[dim + 1 :])
        rows = torch.cat([rows, blank], dim)
    whole = rows.index_select(dim, places)
    return whole.view(*whole.shape[:dim], *shape, *whole.shape[dim + 1 :]).movedim(dim, 0)


def pack_call(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lengths: Tensor | None,
    *,
    count_padding: bool,
) -> Packed:
    """Read a call's arguments on the host, in one copy from an accelerator.

    Where there are no `position_ids`, tokens count from 0, from the row's start with `count_padding`.

    Raises ValueError for arguments that do not go together, TypeError for what are not tensors of integers.
    """
    named = {"attention_mask": attention_mask, "position_ids": position_ids, "cu_seq_lengths": cu_seq_lengths}
    for name, values in {"input_ids": input_ids, **named}.items():
        if values is not None and not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a tensor, got a {type(values).__name__}")
    ids = input_ids.unsqueeze(0) if input_ids.ndim == 1 else input_ids
    if ids.ndim != 2:
        raise ValueError(f"input_ids must be [sequences, length], got shape {tuple(input_ids.shape)}")
    if cu_seq_lengths is not None and (attention_mask is not None or ids.shape[0] != 1):
        raise ValueError(
            "cu_seq_lengths marks the sequences of input_ids [1, N] and takes no attention_mask, "
            f"got input_ids {tuple(ids.shape)}"
        )
    parts = {"input_ids": ids}
    if position_ids is not None:
        parts["position_ids"] = _like_ids("position_ids", position_ids, ids)
    if cu_seq_lengths is not None:
        parts["cu_seq_lengths"] = cu_seq_lengths.to(ids.device)
    elif attention_mask is not None:
        spans = _spans(_like_ids("attention_mask", attention_mask, ids))
        parts |= {} if spans is None else {"spans": spans}
    host = _to_host(parts)
    sequences, length = ids.shape
    starts, lengths = _sequences(host, sequences, length, masked=attention_mask is not None)
    positions, span = None, length
    if position_ids is not None:
        span = int(host["position_ids"].max(initial=-1)) + 1
        positions = unsigned("position_ids", _join(host["position_ids"], starts, lengths))
    elif count_padding and cu_seq_lengths is None:
        positions = _join(np.arange(length, dtype=np.uint32), starts % max(length, 1), lengths)
    return Packed(
        token_ids("input_ids", _join(host["input_ids"], starts, lengths)),
        positions,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        starts,
        (sequences, length),
        span if cu_seq_lengths is None else int(lengths.max(initial=0)),
    )


def _like_ids(name: str, values: Tensor, ids: Tensor) -> Tensor:
    """`values` in the shape of `ids`, on its device."""
    if values.shape == ids.shape and values.device == ids.device:
        return values
    values = values.unsqueeze(0) if values.ndim == 1 else values
    if values.ndim != 2 or values.shape[1] != ids.shape[1] or values.shape[0] not in (1, ids.shape[0]):
        raise ValueError(f"{name} must be {list(ids.shape)} like input_ids, got shape {tuple(values.shape)}")
    return values.expand_as(ids).to(ids.device)


def _spans(mask: Tensor) -> Tensor | None:
    """Of each row of `mask`: where its ones start, where they end, and how many they are, [3, sequences].

    None where the host sees that nothing is padded.
    """
    if mask.shape[1] == 0:
        return torch.zeros(3, len(mask), dtype=torch.int64, device=mask.device)
    # The index of a largest value is that of the first of them.
    if mask.device.type != "cpu":
        kept = mask.bool().byte()
        return torch.stack([kept.argmax(1), mask.shape[1] - kept.flip(1).argmax(1), kept.sum(1)])
    # By NumPy: torch's threads take milliseconds to come together where other work has the cores.
    values = (mask.bool() if mask.is_floating_point() else mask).numpy()
    # Its fastest pass over integers, which makes no array.
    if values.size and values.min() > 0:
        return None
    bits = values != 0
    # NumPy stops at the first, and counts bits faster.
    spans = [bits.argmax(1), mask.shape[1] - bits[:, ::-1].argmax(1), np.count_nonzero(bits, axis=1)]
    return torch.from_numpy(np.stack(spans))


def _to_host(parts: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors of integers of one device, flat; from an accelerator as int32, in one copy."""
    for name, tensor in parts.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    flat = [tensor.flatten() for tensor in parts.values()]
    if flat[0].device.type == "cpu":
        return {name: tensor.numpy() for name, tensor in zip(parts, flat, strict=True)}
    # What int32 cannot hold must not wrap around to what a model has an embedding for.
    limit = torch.iinfo(torch.int32)
    packed = torch.cat([tensor.clamp(limit.min, limit.max).to(torch.int32) for tensor in flat])
    pinned = torch.empty(packed.shape, dtype=torch.int32, pin_memory=packed.is_cuda).copy_(packed)
    pieces = torch.split(pinned, [tensor.numel() for tensor in flat])
    return {name: piece.numpy() for name, piece in zip(parts, pieces, strict=True)}


def _sequences(host: dict[str, NDArray[Any]], rows: int, length: int, *, masked: bool) -> tuple[Int64, Int64]:
    """Where each sequence starts in the flattened input, and how many tokens it has.

    A call that is `masked` without spans has no padding.
    """
    if "cu_seq_lengths" in host:
        bounds = host["cu_seq_lengths"].astype(np.int64)
        if bounds.size < 1 or bounds[0] != 0 or bounds[-1] != length or (np.diff(bounds) < 0).any():
            raise ValueError(f"cu_seq_lengths must rise from 0 to {length}, the tokens of input_ids, got {bounds}")
        return bounds[:-1], bounds[1:] - bounds[:-1]
    begin = np.arange(rows, dtype=np.int64) * length
    if "spans" in host:
        first, last, lengths = host["spans"].reshape(3, rows).astype(np.int64)
        broken = np.flatnonzero((lengths > 0) & (last - first != lengths))
        if broken.size:
            row = int(broken[0])
            raise ValueError(
                f"attention_mask must be padding on one or both sides of each row's tokens, but row {row} has "
                f"{lengths[row]} tokens between {first[row]} and {last[row] - 1}"
            )
        return begin + first, lengths
    if "position_ids" in host and not masked:
        # As transformers packs a batch without mask: a new sequence where positions do not go on by one.
        positions = host["position_ids"].reshape(rows, length)
        breaks = np.ones(positions.shape, bool)
        breaks[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        starts = np.flatnonzero(breaks)
        return starts, np.diff(np.append(starts, positions.size)).astype(np.int64)
    return begin, np.full(rows, length, np.int64)


def _join(values: NDArray[Any], starts: Int64, lengths: Int64) -> NDArray[Any]:
    """The slices `starts[s]:starts[s] + lengths[s]` of `values`, one after another."""
    if lengths.sum() == len(values) and (starts[1:] == starts[:-1] + lengths[:-1]).all():
        return values
    pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
    return np.concatenate([values[:0], *(values[start : start + length] for start, length in pairs)])


def packed_values(packed: Packed, values: Tensor, *, after: int | None = None) -> Tensor:
    """Those of `values` [sequences, length] that belong to tokens, [N] on the CPU.

    With `after` each token gets the value of the next place in its row, and `after` at the row's end.

    Raises ValueError for another shape, TypeError for what are not integers.
    """
    values = values.unsqueeze(0) if values.ndim == 1 else values
    if values.shape != packed.shape:
        raise ValueError(f"labels must be {list(packed.shape)} like input_ids, got shape {tuple(values.shape)}")
    rows = _to_host({"labels": values})["labels"].reshape(packed.shape)
    if after is not None:
        rows = np.pad(rows[:, 1:], ((0, 0), (0, 1)), constant_values=after)
    lengths = packed.offsets[1:] - packed.offsets[:-1]
    return torch.from_numpy(_join(rows.reshape(-1), packed.starts, lengths))


def fold_call(packed: Packed, level: Level, device: torch.device, pad_multiple_of: int | None = None) -> Batch:
    """Fold `packed` for `level`: see `Batch`."""
    if not len(packed.input_ids):
        # No model takes a batch of no rows: this one nobody reads.
        return Batch(packed, Fold([0], [0], [0, 1], layout="depth_first"), None, device)
    folded = partial(Fold, packed.input_ids, packed.position_ids, packed.offsets, layout="depth_first")
    own = np.arange(len(packed.starts))
    fold = folded(pad_multiple_of=pad_multiple_of, salts=own if level == "none" else None)
    copies = folded(salts=own) if level == "mlp" else None
    return Batch(packed, fold, copies, device)
