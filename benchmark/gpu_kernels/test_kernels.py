"""The script runs on the CPU against programs that answer as the bundle's do; its targets, on rows made by hand."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_kernels.targets import targets

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "kernels"))

from bundle import SOURCES, refuse_other_sources, sources  # noqa: E402

PROGRAM = """#!{python}
import json, sys
for line in sys.stdin:
    print(json.dumps({{"ms": 2.0, "seconds": 1.0, "enqueued_seconds": 0.5, "tokens": 20, "nodes": 10}}), flush=True)
"""


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(HERE / script), run_name="__main__")


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_script_and_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("measure", "forward"):
        program = tmp_path / name
        program.write_text(PROGRAM.format(python=sys.executable))
        program.chmod(0o755)
    (tmp_path / SOURCES).write_text(json.dumps(sources()))
    result = tmp_path / "kernels.json"
    run(
        monkeypatch,
        "measure.py",
        *("--smoke", "--bundle", tmp_path, "--out", result, "--commit", "none", "--only", "32 x 2048+256"),
    )
    rows = json.loads(result.read_text())["rows"]
    assert [row["part"] for row in rows] == ["rows", "attention", "attention", "model"]
    assert rows[0]["ms"].keys() == {"ours", "candle", "torch", "copy"}
    assert rows[1]["ms"].keys() == {"ours none", "flash none"}
    assert rows[2]["ms"].keys() == {"ours none", "ours full", "flash none", "flash full", "flex"}
    assert rows[3]["ms"] | {"torch none": 0} == {
        "none": 1000.0,
        "mlp": 1000.0,
        "full": 1000.0,
        "torch none": 0,
        "enqueued": 500.0,
    }
    assert rows[3]["rested_ms"] == {"none": 1000.0, "full": 1000.0}
    run(monkeypatch, "plot.py", result)
    assert result.with_suffix(".png").stat().st_size > 0


def test_torch_is_left_out_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_kernels.measure import Program, steps_of_model

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    program = Program.__new__(Program)
    monkeypatch.setattr(Program, "ask", lambda *_: {"seconds": 1.0})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert steps_of_model(program, full, "a batch", [[1, 2]], {}).keys() == {"none", "mlp", "full"}


def test_a_program_that_ends_is_named(tmp_path: Path) -> None:
    from gpu_kernels.measure import Program

    program = tmp_path / "ends"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    with Program(program) as ended, pytest.raises((RuntimeError, BrokenPipeError)):
        ended.ask("anything")


def rows(*, ours: float, full: float) -> list[dict[str, Any]]:
    """A row of each part, of ways that take one millisecond but for ours."""
    attention = {"ours none": ours, "flash none": 1.0}
    shared = attention | {"ours full": full, "flash full": 1.0, "flex": 1.0}
    model = {"none": 8 * ours, "mlp": 4.0, "full": full, "torch none": 8.0, "enqueued": 0.5}
    common = {"shape": "qwen3-0.6b", "nodes": 10_000, "compression": 8.0, "flop_compression": 7.0}
    return [
        {"part": "rows", "name": "rows", "output_bytes": 1 << 30, "ms": {"ours": ours, "torch": 1.0, "copy": 0.9}},
        common | {"part": "attention", "name": "alone", "compression": 1, "ms": attention},
        common | {"part": "attention", "name": "shared", "ms": shared},
        common | {"part": "model", "name": "shared", "ms": model},
    ]


def test_a_bundle_of_other_sources_is_refused(tmp_path: Path) -> None:
    own = sources()
    assert {"Cargo.lock", "kernels/cuda/warp.cuh", "package/src/fold.rs", "kernels/examples/measure.rs"} <= own.keys()
    with pytest.raises(RuntimeError, match=r"another Cargo\.lock, .*run `make cuda-bundle` first"):
        refuse_other_sources(tmp_path)
    for change in ({"package/src/fold.rs": "other"}, {"package/src/gone.rs": "other"}):
        (tmp_path / SOURCES).write_text(json.dumps(own | change))
        with pytest.raises(RuntimeError, match=f"another {next(iter(change))}: run"):
            refuse_other_sources(tmp_path)
    (tmp_path / SOURCES).write_text(json.dumps(own))
    refuse_other_sources(tmp_path)


def test_targets_are_met_and_missed() -> None:
    met = targets(rows(ours=1.0, full=1.0))
    assert len(met) == 8
    assert all(check["met"] for check in met)
    missed = targets(rows(ours=1.6, full=2.0))
    assert [check["met"] for check in missed] == [False, False, False, False, False, False, False, True]
    assert targets([]) == []


def test_single_steps_are_held_to_the_same() -> None:
    *others, model = rows(ours=1.0, full=1.0)
    for rested, met in ((7.3, True), (7.1, False)):
        (check,) = [
            check
            for check in targets([*others, model | {"rested_ms": {"none": rested, "full": 1.0}}])
            if "rested" in check["target"]
        ]
        assert check["met"] == met
