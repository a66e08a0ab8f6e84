"""The fold over NumPy arrays and lists, against the naive fold."""

import gc
import itertools
import re
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import radix_mlp
import radix_mlp.fold as fold_module
from oracle import Batch, batches, naive_fold, naive_paths, paddings
from radix_mlp import Fold, compute_fold_and_scatter

# Two sequences that share their first two tokens.
BATCH = Batch([1, 2, 3, 1, 2, 4], [0, 1, 2, 0, 1, 2], [0, 3, 6], [0, 0])
FOLDED = ([1, 2, 3, 4], [0, 1, 2, 2], [0, 1, 2, 0, 1, 3], [0, 1, 2, 5])


def lists(arrays: Any) -> tuple[list[int], ...]:
    return tuple(array.tolist() for array in arrays)


def strided(array: NDArray[Any]) -> NDArray[Any]:
    """The same values, every third element of a larger buffer."""
    wide = np.full(3 * len(array), 99, array.dtype)
    wide[::3] = array
    return wide[::3]


def unaligned(array: NDArray[Any]) -> NDArray[Any]:
    """The same values, one byte off any aligned address."""
    return np.frombuffer(b"\0" + array.tobytes(), array.dtype, offset=1)


@given(batches(), paddings)
def test_compute_equals_naive(batch: Batch, pad_multiple_of: int | None) -> None:
    folded = compute_fold_and_scatter(*batch.arrays(), pad_multiple_of)
    assert lists(folded) == naive_fold(batch, pad_multiple_of)
    assert all(array.dtype == np.uint32 and array.flags.writeable for array in folded)


@given(batches(), paddings, st.booleans())
def test_fold_equals_naive(batch: Batch, pad_multiple_of: int | None, salted: bool) -> None:
    salts = batch.salts if salted else None
    fold = Fold(*batch.arrays(), pad_multiple_of=pad_multiple_of, salts=salts)
    ids, positions, scatter, gather = naive_fold(batch, pad_multiple_of, salted=salted)
    assert fold.input_ids.tolist() == ids
    assert fold.position_ids.tolist() == positions
    assert fold.scatter_indices.tolist() == scatter
    assert fold.fold_gather.tolist() == gather
    assert fold.cu_seq_lengths.tolist() == batch.cu_seq_lengths
    assert fold.layout == "first_occurrence"
    assert fold.subtree_end is None
    assert fold.row_order is None
    nodes = len(set(scatter))
    shape = (fold.num_tokens, fold.num_sequences, fold.num_nodes, fold.num_rows)
    assert shape == (len(scatter), len(batch.salts), nodes, len(ids))
    assert fold.compression == (len(scatter) / nodes if nodes else 1)
    assert fold.gamma == pytest.approx(1 / fold.compression, rel=1e-15)

    assert fold.query_lengths is not None
    new_tokens = [
        i
        for end, length in zip(batch.cu_seq_lengths[1:], fold.query_lengths.tolist(), strict=True)
        for i in range(end - length, end)
    ]
    assert new_tokens == gather[:nodes]


@given(batches(), paddings, st.sampled_from([1, 2, 5]), st.sampled_from([1, 2, 5]))
def test_depth_first_equals_naive(batch: Batch, pad_multiple_of: int | None, query_block: int, key_block: int) -> None:
    fold = Fold(*batch.arrays(), layout="depth_first", pad_multiple_of=pad_multiple_of)
    assert (fold.layout, fold.query_lengths) == ("depth_first", None)
    assert fold.row_order is not None
    assert fold.subtree_end is not None
    naive = naive_fold(batch, pad_multiple_of)
    assert fold.input_ids.tolist() == np.array(naive[0], int)[fold.row_order].tolist()
    assert fold.row_order[fold.scatter_indices].tolist() == naive[2]

    paths = naive_paths(batch)
    seen = np.zeros((fold.num_rows, fold.num_rows), bool)
    for q, kv in np.ndindex(fold.num_nodes, fold.num_nodes):
        query, key = paths[fold.fold_gather[q]], paths[fold.fold_gather[kv]]
        seen[q, kv] = query[: len(key)] == key
    seen[range(fold.num_nodes, fold.num_rows), range(fold.num_nodes, fold.num_rows)] = True
    rows = np.arange(fold.num_rows)
    mask = (rows <= rows[:, None]) & (rows[:, None] < fold.subtree_end)
    assert (mask == seen).all()

    blocks = fold.block_mask(query_block, key_block)
    assert (blocks.query_block, blocks.key_block) == (query_block, key_block)
    assert blocks.num_blocks == -(-fold.num_rows // query_block)
    for q in range(blocks.num_blocks):
        band = seen[q * query_block : (q + 1) * query_block]
        for kv in range(-(-fold.num_rows // key_block)):
            block = band[:, kv * key_block : (kv + 1) * key_block]
            whole, part = (
                kv in indices[offsets[q] : offsets[q + 1]] for offsets, indices in (blocks.full, blocks.partial)
            )
            uncut = block.shape[1] == key_block
            assert whole == bool(uncut and block.all())
            assert part == bool(block.any() and not whole)


@given(
    batches(),
    paddings,
    st.sampled_from([1, 2, 5]),
    st.sampled_from([1, 2, 5]),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_path_masks_are_the_paths(
    batch: Batch, pad_multiple_of: int | None, query_block: int, key_block: int, window: int | None
) -> None:
    fold = Fold(*batch.arrays(), layout="depth_first", pad_multiple_of=pad_multiple_of)
    mask = fold.path_mask(query_block, key_block, window)
    assert (mask.query_block, mask.key_block, mask.window) == (query_block, key_block, window)
    paths = [[*range(fold.num_nodes, row + 1)] for row in range(fold.num_rows)]
    for start, end in itertools.pairwise(fold.cu_seq_lengths.tolist()):
        path = fold.scatter_indices[start:end].tolist()
        for length, row in enumerate(path, 1):
            paths[row] = path[:length]
    assert mask.depth.tolist() == [len(path) - 1 for path in paths]
    for row, path in enumerate(paths):
        seen = []
        for offsets, indices in (mask.full, mask.partial):
            listed = slice(*offsets[row // query_block :][:2].tolist())
            for first, end, depth, above in mask.blocks[indices[listed]].tolist():
                shared = depth % key_block
                keys = [*mask.above[above : above + shared].tolist(), *range(first, first + key_block - shared)]
                places = range(depth - shared, depth - shared + key_block)
                if first <= row < end:
                    seen += [(place, key) for place, key in zip(places, keys, strict=True) if key <= row]
        nearest = 0 if window is None else max(0, len(path) - window)
        expected = [*enumerate(path)][nearest:]
        assert sorted(seen)[-len(expected) :] == expected
        assert window or len(seen) == len(path)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "uint32", "uint64", ">i4"])
@pytest.mark.parametrize("arrange", [np.asarray, strided, unaligned, lambda array: array.tolist()])
def test_takes_any_integers(dtype: str, arrange: Any) -> None:
    ids, positions, offsets = (arrange(array.astype(dtype)) for array in BATCH.arrays())
    assert lists(compute_fold_and_scatter(ids, positions, offsets)) == FOLDED
    assert Fold(ids, positions, offsets).scatter_indices.tolist() == FOLDED[2]


@given(batches(), st.sampled_from(["first_occurrence", "depth_first"]), st.booleans(), st.booleans())
def test_int64_folds_as_uint32(batch: Batch, layout: Any, counted: bool, salted: bool) -> None:
    ids, positions, offsets = batch.arrays()
    options: Any = {"layout": layout, "salts": batch.salts if salted else None}
    narrow, wide = (
        Fold(array, None if counted else positions, offsets, **options) for array in (ids, ids.astype(np.int64))
    )
    for name in ("input_ids", "position_ids", "scatter_indices", "fold_gather", "query_lengths", "subtree_end"):
        np.testing.assert_array_equal(getattr(wide, name), getattr(narrow, name), strict=True)


def test_int64_reaches_the_core_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = np.array([[1, 2, 3], [1, 2, 4]]), np.ones((2, 3), int)
    offsets = np.array([0, 3, 6], np.uint32)
    core, seen = fold_module._call, []

    def spy(new: Any, *arguments: Any, **options: Any) -> Any:
        def look(input_ids: Any, *rest: Any) -> Any:
            seen.append(input_ids)
            return new(input_ids, *rest)

        return core(look, *arguments, **options)

    monkeypatch.setattr(fold_module, "_call", spy)
    flat = ids.ravel()
    folds = [
        Fold(flat, None, offsets),
        Fold(flat, None, [0, 3, 6]),
        Fold.from_padded(ids, mask),
        Fold.from_sequences(list(ids)),
    ]
    assert all(fold.input_ids.tolist() == [1, 2, 3, 4] for fold in folds)
    assert all(array.dtype == np.int64 for array in seen)
    # Sequences are put one after another, once.
    assert [np.shares_memory(array, ids) for array in seen] == [True, True, True, False]
    compute_fold_and_scatter(flat, [0, 1, 2] * 2, offsets)
    assert np.shares_memory(seen[-1], ids)


@pytest.mark.parametrize("arrange", [np.asarray, strided, unaligned, lambda array: array.tolist()])
@pytest.mark.parametrize("value", [-1, 2**32, 2**32 | 2, -(2**63), 2**63 - 1])
def test_names_the_first_id_out_of_range(value: int, arrange: Any) -> None:
    _, positions, offsets = BATCH.arrays()
    for index in range(6):
        ids = np.array(BATCH.input_ids)
        ids[index:] = value
        message = re.escape(f"input_ids[{index}] is {value}, which is not in 0..=4294967295")
        for function in (compute_fold_and_scatter, Fold):
            with pytest.raises(ValueError, match=message):
                function(arrange(ids), positions, offsets)


@pytest.mark.parametrize("arrange", [np.asarray, lambda array: array.tolist()])
def test_counts_positions_that_are_not_given(arrange: Any) -> None:
    ids, _, offsets = map(arrange, BATCH.arrays())
    fold = Fold(ids, None, offsets)
    assert lists((fold.input_ids, fold.position_ids, fold.scatter_indices, fold.fold_gather)) == FOLDED


@pytest.mark.parametrize("arrange", [np.asarray, lambda array: array.tolist()])
def test_names_what_is_missing(arrange: Any) -> None:
    ids, positions, offsets = map(arrange, BATCH.arrays())
    missing: Any = None
    for name, batch in (
        ("input_ids", (missing, positions, offsets)),
        ("position_ids", (ids, missing, offsets)),
        ("cu_seq_lengths", (ids, positions, missing)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be 1-dimensional, got shape \(\)"):
            compute_fold_and_scatter(*batch)
        if name != "position_ids":
            with pytest.raises(ValueError, match=rf"{name} must be 1-dimensional, got shape \(\)"):
                Fold(*batch)


def test_takes_read_only_arrays() -> None:
    arrays = BATCH.arrays()
    for array in arrays:
        array.flags.writeable = False
    assert lists(compute_fold_and_scatter(*arrays)) == FOLDED


def test_bound_checks_has_no_effect() -> None:
    for bound_checks in (None, False, True):
        assert lists(compute_fold_and_scatter(*BATCH.arrays(), None, bound_checks)) == FOLDED


@pytest.mark.parametrize("offsets", [[], [0], [0, 0, 0]])
def test_empty_batches(offsets: list[int]) -> None:
    assert lists(compute_fold_and_scatter([], [], offsets, 4)) == ([], [], [], [])
    fold = Fold([], [], offsets)
    assert (fold.num_tokens, fold.num_sequences) == (0, max(len(offsets) - 1, 0))
    assert fold.fold(np.zeros((0, 3))).shape == (0, 3)


ERRORS = [
    ({"input_ids": [1, -2, 3]}, ValueError, r"input_ids\[1\] is -2"),
    ({"input_ids": [1, 2, 2**32]}, ValueError, r"input_ids\[2\] is 4294967296"),
    ({"input_ids": [1, 2, 2**70]}, TypeError, f"input_ids must hold integers.*{2**70}"),
    ({"input_ids": [1, 2.5, 3]}, TypeError, "input_ids must hold integers.*float64"),
    ({"input_ids": [True, False, True]}, TypeError, "input_ids must hold integers.*bool with True"),
    ({"input_ids": ["a", "b", "c"]}, TypeError, "input_ids must hold integers.*'a'"),
    ({"input_ids": [[1, 2, 3]]}, ValueError, r"input_ids must be 1-dimensional.*\(1, 3\)"),
    ({"input_ids": 5}, ValueError, r"input_ids must be 1-dimensional, got shape \(\)"),
    ({"position_ids": [0, -1, 2]}, ValueError, r"position_ids\[1\] is -1"),
    ({"position_ids": [0, 1]}, ValueError, "must have same length: 3 != 2"),
    ({"cu_seq_lengths": [1, 3]}, ValueError, "must start at 0, starts at 1"),
    ({"cu_seq_lengths": [0, 3, 2, 3]}, ValueError, "entry 2 is 2 after 3"),
    ({"cu_seq_lengths": [0, 2]}, ValueError, "number of tokens, 3, ends at 2"),
    ({"cu_seq_lengths": [0, 2**33]}, ValueError, r"cu_seq_lengths\[1\] is 8589934592"),
    ({"cu_seq_lengths": [0, -1]}, ValueError, r"cu_seq_lengths\[1\] is -1"),
    ({"cu_seq_lengths": []}, ValueError, "ends at 0"),
    ({"pad_multiple_of": 0}, ValueError, "multiple of 0"),
    ({"pad_multiple_of": -8}, ValueError, "pad_multiple_of must be positive, got -8"),
    ({"pad_multiple_of": 2**40}, ValueError, f"got {2**40}"),
    ({"pad_multiple_of": 1.5}, TypeError, "float"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_compute_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "input_ids": [1, 2, 3],
        "position_ids": [0, 1, 2],
        "cu_seq_lengths": [0, 3],
    }
    for function in (compute_fold_and_scatter, Fold):
        with pytest.raises(error, match=message):
            function(**(arguments | change))


FOLD_ERRORS = [
    ({"salts": [1, 2, 3]}, ValueError, "3 salts for 2 sequences"),
    ({"salts": [1, -2]}, ValueError, r"salts\[1\] is -2"),
    ({"salts": [1.0, 2.0]}, TypeError, "salts must hold integers"),
    ({"layout": "breadth_first"}, ValueError, "'breadth_first'"),
    ({"layout": None}, TypeError, "None"),
]


@pytest.mark.parametrize(("change", "error", "message"), FOLD_ERRORS)
def test_fold_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Fold(*BATCH.arrays(), **change)


def test_block_mask_errors() -> None:
    with pytest.raises(ValueError, match="first-occurrence layout"):
        Fold(*BATCH.arrays()).block_mask(4)
    tree = Fold(*BATCH.arrays(), layout="depth_first")
    with pytest.raises(ValueError, match="0 rows"):
        tree.block_mask(0)
    with pytest.raises(ValueError, match="query_block must be positive, got -1"):
        tree.block_mask(-1)


def test_path_mask_errors() -> None:
    with pytest.raises(ValueError, match="first-occurrence layout"):
        Fold(*BATCH.arrays()).path_mask(4, 4)
    tree = Fold(*BATCH.arrays(), layout="depth_first")
    with pytest.raises(ValueError, match="0 rows"):
        tree.path_mask(4, 0)
    with pytest.raises(ValueError, match="key_block must be positive, got -1"):
        tree.path_mask(4, -1)
    for window in (0, 2**32):
        with pytest.raises(ValueError, match=f"window must be positive and fit in a uint32, got {window}"):
            tree.path_mask(4, 4, window)


def test_arrays_are_read_only_views_that_outlive_the_fold() -> None:
    fold = Fold(*BATCH.arrays())
    ids = fold.input_ids
    base: Any = ids.base
    assert base is fold
    assert np.shares_memory(ids, fold.input_ids)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 7
    with pytest.raises(ValueError, match="WRITEABLE"):
        ids.flags.writeable = True
    del fold, base
    gc.collect()
    assert ids.tolist() == FOLDED[0]


@given(batches(), st.booleans(), st.data())
def test_from_padded(batch: Batch, given_positions: bool, data: st.DataObject) -> None:
    lengths = np.diff(batch.cu_seq_lengths)
    width = int(lengths.max(initial=0)) + data.draw(st.integers(0, 2))
    ids, mask, positions = (np.full((len(lengths), width), fill, int) for fill in (7, 0, -1))
    expected = Batch(list(batch.input_ids), [], batch.cu_seq_lengths, batch.salts)
    for row, length in enumerate(lengths):
        left = width - length if data.draw(st.booleans(), "left") else 0
        own = slice(batch.cu_seq_lengths[row], batch.cu_seq_lengths[row + 1])
        ids[row, left : left + length] = batch.input_ids[own]
        mask[row, left : left + length] = 1
        positions[row, left : left + length] = batch.position_ids[own]
        expected.position_ids += batch.position_ids[own] if given_positions else range(length)
    fold = Fold.from_padded(ids, mask, positions if given_positions else None)
    arrays = (fold.input_ids, fold.position_ids, fold.scatter_indices, fold.fold_gather)
    assert lists(arrays) == naive_fold(expected)
    assert fold.cu_seq_lengths.tolist() == expected.cu_seq_lengths
    # Original space is what the mask keeps.
    assert fold.unfold(fold.fold(ids[mask.astype(bool)])).tolist() == batch.input_ids


def test_from_padded_broadcasts_positions_and_takes_bool_masks() -> None:
    fold = Fold.from_padded([[1, 2, 9], [1, 2, 3]], np.array([[1, 1, 0], [1] * 3], bool), [[4, 5, 6]])
    assert fold.position_ids.tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([1, 2], [1, 1], r"got \(2,\) and \(2,\)"),
        ([[1, 2]], [1, 1], r"got \(1, 2\) and \(2,\)"),
        ([[1, 2]], [[1, 3]], "0 and 1, got 3"),
        ([[1, -2]], [[1, 1]], r"input_ids\[1\] is -2"),
    ],
)
def test_from_padded_errors(ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fold.from_padded(ids, mask)


@pytest.mark.parametrize("mask", [np.ones((1, 2)), np.full((1, 2), 0.5, np.float32), [[1, 0.0]], [["1", "0"]]])
def test_from_padded_takes_no_mask_of_floats(mask: Any) -> None:
    with pytest.raises(TypeError, match=r"attention_mask must hold integers or booleans, got dtype \S+ with (1|0\.5)"):
        Fold.from_padded([[1, 2]], mask)


@pytest.mark.parametrize("positions", [[0, 1, 2], [[0], [1], [2]], [[[0, 1]], [[0, 1]]]])
def test_from_padded_names_the_shape_of_positions(positions: Any) -> None:
    shape = re.escape(str(np.shape(positions)))
    with pytest.raises(ValueError, match=rf"position_ids must broadcast to \(2, 2\).*input_ids, got {shape}"):
        Fold.from_padded([[1, 2], [1, 3]], np.ones((2, 2), int), positions)


@given(batches())
def test_from_sequences(batch: Batch) -> None:
    bounds = zip(batch.cu_seq_lengths[:-1], batch.cu_seq_lengths[1:], strict=True)
    sequences = [batch.input_ids[start:end] for start, end in bounds]
    batch.position_ids = [position for ids in sequences for position in range(len(ids))]
    fold = Fold.from_sequences(sequences)
    arrays = (fold.input_ids, fold.position_ids, fold.scatter_indices, fold.fold_gather)
    assert lists(arrays) == naive_fold(batch)
    assert fold.cu_seq_lengths.tolist() == batch.cu_seq_lengths


def test_from_sequences_names_the_bad_one() -> None:
    with pytest.raises(ValueError, match=r"sequences\[1\]\[2\] is -5"):
        Fold.from_sequences([[1, 2], [1, 2, -5]])
    with pytest.raises(ValueError, match="3 salts for 2 sequences"):
        Fold.from_sequences([[1, 2], [1, 2, 5]], salts=[1, 2, 3])


def test_from_sequences_takes_rows_of_several_types() -> None:
    fold = Fold.from_sequences([np.array([1, 2**32 - 1], np.uint32), np.array([1, 5]), [], np.array([1], np.uint8)])
    assert fold.input_ids.tolist() == [1, 2**32 - 1, 5]


@given(batches(), paddings, st.sampled_from(["first_occurrence", "depth_first"]))
def test_fold_and_unfold_values(batch: Batch, pad_multiple_of: int | None, layout: Any) -> None:
    fold = Fold(*batch.arrays(), pad_multiple_of=pad_multiple_of, layout=layout)
    # What a causal model computes is a function of the path.
    paths = naive_paths(batch)
    states = np.array([[hash(path), len(path)] for path in paths], float).reshape(-1, 1, 2)
    compact = fold.fold(states)
    assert compact.shape == (fold.num_rows, 1, 2)
    assert (fold.unfold(compact) == states).all()
    assert (compact[: fold.num_nodes] == states[fold.fold_gather[: fold.num_nodes]]).all()


@pytest.mark.parametrize("values", [np.zeros((5, 2)), np.zeros(()), []])
def test_fold_and_unfold_errors(values: Any) -> None:
    fold = Fold(*BATCH.arrays())
    with pytest.raises(ValueError, match="expected 6 rows, got shape"):
        fold.fold(values)
    with pytest.raises(ValueError, match="expected 4 rows, got shape"):
        fold.unfold(values)


def test_repr() -> None:
    assert repr(Fold(*BATCH.arrays())) == (
        "Fold(sequences=2, tokens=6, nodes=4, compression=1.50, layout='first_occurrence')"
    )
    padded = Fold(*BATCH.arrays(), pad_multiple_of=8, layout="depth_first")
    assert repr(padded) == ("Fold(sequences=2, tokens=6, nodes=4, rows=8, compression=1.50, layout='depth_first')")


def test_draw() -> None:
    picture = Fold.from_sequences([[1, 2, 3], [1, 2, *range(10, 20)]]).draw()
    assert [line.split(" · ")[0] for line in picture.splitlines()] == [
        "1 2",
        "├─ 3",
        "└─ 10 11 12 13 14 15 16 17 …",
    ]
    runs: list[list[int]] = []

    def label(ids: list[int]) -> str:
        runs.append(ids)
        return "x"

    assert Fold(*BATCH.arrays()).draw(label).count("x") == 3
    assert runs == [[1, 2], [3], [4]]


def test_draw_passes_the_label_s_error_on() -> None:
    calls = 0

    def label(ids: list[int]) -> str:
        nonlocal calls
        calls += 1
        raise KeyError(ids[0])

    with pytest.raises(KeyError, match="1"):
        Fold(*BATCH.arrays()).draw(label)
    assert calls == 1
    with pytest.raises(TypeError):
        Fold(*BATCH.arrays()).draw(lambda ids: ids)  # type: ignore[arg-type,return-value]


def test_threads_fold_at_once() -> None:
    arrays = BATCH.arrays()
    results: list[Any] = []

    def fold_often() -> None:
        results.extend(lists(compute_fold_and_scatter(*arrays)) for _ in range(200))

    threads = [threading.Thread(target=fold_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [FOLDED] * 800


def test_version() -> None:
    assert radix_mlp.__version__.count(".") == 2
