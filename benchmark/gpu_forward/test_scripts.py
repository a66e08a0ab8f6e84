"""The scripts that measure the GPU run on the CPU, on tiny models, and their results can be drawn."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_forward.flips import ONE_MORE
from gpu_forward.targets import OTHER_SIZES

BENCHMARK = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of tiny models, several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(BENCHMARK / script), run_name="__main__")


def smoke(monkeypatch: pytest.MonkeyPatch, script: str, result: Path, *arguments: str) -> list[dict[str, Any]]:
    run(monkeypatch, script, "--smoke", "--out", result, "--commit", "none", *arguments)
    written = json.loads(result.read_text())
    assert isinstance(written["targets"], list)
    rows: list[dict[str, Any]] = written["rows"]
    return rows


def test_forward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = tmp_path / "forward.json"
    rows = smoke(monkeypatch, "gpu_forward/measure.py", result, "--only", "32 x 2048+256", "nothing shared")
    assert [row["batch"] for row in rows] == ["32 x 2048+256", "nothing shared"]
    for row in rows:
        levels = {"padded", "none", "mlp", "full", "padded compiled", "none compiled", "full compiled"}
        assert levels <= row["wall_ms"].keys()
        assert row["flips"]["decisions"]["last"] == row["sequences"]
        compared = {name: counts["last"] for name, counts in row["flips"].items() if " from " in name}
        ways = {"full", "padded"} | ({"query_folded"} if torch.cuda.is_available() else set())
        by_tree = ("full", *OTHER_SIZES, ONE_MORE) if torch.cuda.is_available() else ()
        expected = {f"{way} from none" for way in (*ways, *OTHER_SIZES, ONE_MORE)}
        expected |= {f"tree {way} from tree none" for way in by_tree}
        assert compared.keys() == expected | {f"{way} from float32" for way in (*ways, "none")}
        assert max(compared.values()) <= row["sequences"]
    assert {"full", "unshared"} <= rows[0]["beside_unshared"]["wall_ms"].keys()
    assert "unshared" not in rows[0]["wall_ms"]
    run(monkeypatch, "gpu_forward/plot.py", result)
    assert result.with_suffix(".png").stat().st_size > 0


def test_forward_of_some_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = ("--only", "32 x 2048+256", "--ways", "none", "full", "unshared")
    (row,) = smoke(monkeypatch, "gpu_forward/measure.py", tmp_path / "forward.json", *chosen)
    assert row["wall_ms"].keys() == {"none", "full"}
    assert row["beside_unshared"]["wall_ms"].keys() == {"full", "unshared"}


@pytest.mark.parametrize("script", ["gpu_forward/measure.py", "gpu_training/measure.py"])
def test_ways_that_there_are_not_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    with pytest.raises(SystemExit):
        smoke(monkeypatch, script, tmp_path / "result.json", "--ways", "none", "ful")
    assert "invalid choice: 'ful'" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = tmp_path / "attention.json"
    (row,) = smoke(monkeypatch, "gpu_attention/measure.py", result, "--only", "32 x 2048+256")
    assert row["measured"].keys() == {"none", "none tree", "query_folded", "tree", "flex"}
    assert row["work"]["tree"].keys() == {"flops", "tiles"}
    assert min(row["work"]["tree"].values()) > 0
    run(monkeypatch, "gpu_attention/measure.py", "--plot", "--out", result)
    assert result.with_suffix(".png").stat().st_size > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning")
# Dynamo looks at all attributes of what it compiles.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# It makes one of each operation that has its own gradient.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = tmp_path / "training.json"
    rows = smoke(monkeypatch, "gpu_training/measure.py", result, "--only", "4 x 8 x 1024+512")
    assert [row["loss"] for row in rows] == ["all", "completions"]
    for row in rows:
        own = {"none", "mlp", "full", "none compiled", "full compiled"}
        assert own | {"transformers folded", "transformers padded"} <= row["speedup"].keys()
        assert row["flop_compression"] > 1
    run(monkeypatch, "gpu_training/plot.py", result)
    assert result.with_suffix(".png").stat().st_size > 0


def test_gradients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (row,) = smoke(monkeypatch, "gpu_training/gradients.py", tmp_path / "gradients.json", "--only", "4 x 8 x 256+256")
    assert min(row["error"].values()) > 0
    assert row["worst_ratio"] >= row["ratio"] > 0
