"""What the cost model reads off a fold, and what is picked by it."""

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from radix_mlp import Fold  # noqa: E402
from radix_mlp.torch import cost, dispatch, pick_backend  # noqa: E402
from radix_mlp.torch.cost import Rates, flash_seconds, flash_work, tree_seconds, tree_work  # noqa: E402
from radix_mlp.torch.tree_mask import Tiles, TreeMask  # noqa: E402

TILES = Tiles(128, 64, 4, 2)


def batch(prefix: int, own: int, count: int) -> Fold:
    """`count` sequences that share `prefix` tokens."""
    ids = iter(range(1, 10**6))
    shared = [next(ids) for _ in range(prefix)]
    return Fold.from_sequences([shared + [next(ids) for _ in range(own)] for _ in range(count)], layout="depth_first")


def test_time_is_the_hosts_or_the_devices() -> None:
    rates = Rates(2.0, {"flops": 0.5, "tiles": 3.0})
    assert rates.seconds({"flops": 1, "tiles": 0, "bytes": 99}) == 2.0
    assert rates.seconds({"flops": 4, "tiles": 1, "bytes": 99}) == 5.0


def test_tree_work() -> None:
    work = tree_work(100, 7, TILES, kv_heads=8, group=2, head_dim=16)
    assert work == {"flops": 7 * 8 * 4 * 16 * 128 * 64, "tiles": 2 * 8}


def test_flash_work() -> None:
    # One tile of 128 queries for the first sequence, over itself; one for the second, over 100 keys and itself.
    fold = batch(100, 10, 2)
    half_a_block = 32
    scores = 128 * ((128 + half_a_block) + (100 + 128 + half_a_block))
    work = flash_work(fold, heads=4, kv_heads=2, head_dim=16, window=None)
    assert work == {"flops": 4 * 16 * 4 * scores, "tiles": 8, "bytes": 8 * 220 * 2 * 16, "gathers": 1}


def test_flash_gathers_nothing_where_nothing_is_shared() -> None:
    work = flash_work(batch(0, 10, 2), heads=4, kv_heads=2, head_dim=16, window=None)
    assert (work["bytes"], work["gathers"]) == (0, 0)


def test_window_spares_flash_work() -> None:
    fold = batch(4000, 100, 4)
    whole, narrow = (flash_seconds(fold, 32, 8, 128, window) for window in (None, 64))
    assert narrow < whole


def test_training_costs_more() -> None:
    fold = batch(4000, 100, 32)
    assert flash_seconds(fold, 32, 8, 128, None, training=True) > 2 * flash_seconds(fold, 32, 8, 128, None)
    sizes: dict[str, Any] = {"kv_heads": 8, "group": 4, "head_dim": 128}
    assert 2 * tree_seconds(7200, 8000, TILES, **sizes) < tree_seconds(7200, 8000, TILES, **sizes, training=True)


def on_cuda(rows: int, heads: int, *, training: bool = False) -> Any:
    """What `pick_backend` asks of a tensor, [rows, heads, 128] in bfloat16 on a GPU that need not be there."""

    class Stub(SimpleNamespace):
        def __len__(self) -> int:
            return rows

    shape = (rows, heads, 128)
    return Stub(device=torch.device("cuda"), dtype=torch.bfloat16, shape=shape, ndim=3, requires_grad=training)


def forward_mask(fold: Fold, _q: Any, _k: Any, window: None) -> Any:
    return SimpleNamespace(tiles=TILES, pairs=len(TreeMask.arrays(fold, TILES, 4, window)["blocks"]))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the tree kernels are compiled for, where nothing can be."""
    calls: list[Any] = []
    pytest.importorskip("triton")
    monkeypatch.setattr("radix_mlp.torch.tree.compile_kernels", lambda *variant: calls.append(variant))
    monkeypatch.setattr(dispatch, "forward_mask", forward_mask)
    return calls


@pytest.mark.parametrize("slow", ["TREE_TRAINING", "FLASH_TRAINING"])
@pytest.mark.usefixtures("compiled")
def test_training_is_picked_by_its_own_costs(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = batch(100, 60, 8)
    k = on_cuda(fold.num_rows, 8)
    forward = pick_backend(on_cuda(fold.num_rows, 32), k, k, fold)
    monkeypatch.setattr(cost, slow, Rates(1.0, {}))
    q = on_cuda(fold.num_rows, 32, training=True)
    assert pick_backend(q, k, k, fold) == ("query_folded" if slow == "TREE_TRAINING" else "tree")
    with torch.no_grad():
        assert pick_backend(q, k, k, fold) == forward


def test_training_compiles_the_tree_kernels_whatever_is_picked(compiled: list[Any]) -> None:
    fold = batch(100, 60, 8)
    k = on_cuda(fold.num_rows, 8)
    pick_backend(on_cuda(fold.num_rows, 32), k, k, fold)
    assert not compiled
    for _layer in range(2):
        assert pick_backend(on_cuda(fold.num_rows, 32, training=True), k, k, fold) == "query_folded"
    assert compiled == [(torch.device("cuda"), torch.bfloat16, 32, 8, 128, False)]


@pytest.mark.parametrize(
    ("prefix", "own", "count", "expected"),
    [
        (4000, 100, 32, "tree"),
        # The host takes longer to launch the tree kernel than FlashAttention to be done.
        (100, 60, 8, "query_folded"),
    ],
)
def test_picks_the_cheaper(prefix: int, own: int, count: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = batch(prefix, own, count)
    monkeypatch.setattr(dispatch, "forward_mask", forward_mask)
    q, k = on_cuda(fold.num_rows, 32), on_cuda(fold.num_rows, 8)
    assert pick_backend(q, k, k, fold) == expected
    # A second is more than either takes.
    monkeypatch.setattr(cost, "TREE" if expected == "tree" else "FLASH", Rates(1.0, {}))
    assert pick_backend(q, k, k, batch(prefix, own, count)) != expected


def test_picks_what_can_run() -> None:
    fold = batch(100, 60, 8)
    q, k = on_cuda(fold.num_rows, 32), on_cuda(fold.num_rows, 8)
    assert pick_backend(q, k, k, fold, softcap=50.0) == "tree"
    in_order = Fold.from_sequences([[1, 2], [1, 3]])
    q, k = on_cuda(in_order.num_rows, 32), on_cuda(in_order.num_rows, 8)
    assert pick_backend(q, k, k, in_order) == "query_folded"
    assert pick_backend(q, k, k, in_order, softcap=50.0) == "sequential"
