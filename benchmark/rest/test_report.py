"""How the REST benchmark compares servers, what it tells of them, and that the README tells the same."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from readme import REPORT, with_sections
from real_batches import DATA
from rest import report, run
from rest.client import Run, Target, drive
from rest.models import write_model
from rest.servers import BINARY, ROOT, VLLM_BLOCK, Machine, Server, cache_counters, radix_mlp, serving, vllm
from rest.targets import targets
from rest.traffic import Request


def serves(binary: Path) -> bool:
    """Whether it is there and was built with the server: the demo's was not."""
    return binary.exists() and subprocess.run([binary, "serve", "--help"], capture_output=True).returncode == 0


BINARIES = [path for path in (BINARY, ROOT / "target" / "debug" / "radix-mlp") if serves(path)]


def row(mean: float, ratio: float) -> dict[str, Any]:
    times = dict.fromkeys(("p50", "p90", "p99"), mean)
    rate = 16 / mean
    return {
        **times,
        "mean": mean,
        "requests_per_second": rate,
        "tokens_per_second": 1000.0,
        "fold_ratio": ratio,
        "latencies": [mean, 2 * mean],
    }


@pytest.fixture
def result() -> dict[str, Any]:
    passages = {"vLLM": row(5, 1), "none, 16384": row(4, 1), "full, 16384": row(2, 2), "none, 65536": row(8, 1)}
    sharing = {
        "nothing": {"none, 16384": row(1, 1), "full, 16384": row(1.01, 1), "auto, 16384": row(1.1, 1)},
        "16 tokens": {"none, 16384": row(4, 1), "full, 16384": row(2, 3), "auto, 16384": row(1, 3)},
    }
    made: dict[str, Any] = {"passages": passages, "sharing": sharing, "requests": 2, "pairs": 4, "concurrency": 2}
    made |= {"rounds": 3, "template": "plain", "commit": "abc"}
    return made | {"targets": targets(made)}


def test_targets(result: dict[str, Any]) -> None:
    assert [(check["value"], check["met"]) for check in result["targets"]] == [
        (1.0, True),
        (0.99, True),
        (0.909, False),
        (0.667, False),
        (1.333, True),
    ]


def test_latency_binds_and_the_rate_is_told(result: dict[str, Any]) -> None:
    run = result["sharing"]["16 tokens"]["full, 16384"]
    run["requests_per_second"] = 12.0
    changed = targets(result)[3]
    assert (changed["value"], changed["by_rate"], changed["met"]) == (0.667, 1.0, False)
    run["mean"] = 1.0
    assert targets(result)[3] == changed | {"value": 1.333, "met": True}


def test_the_table_compares_with_the_unfolded_server_of_the_same_batches(result: dict[str, Any]) -> None:
    lines = report.table(result)
    assert [line.split(" | ")[-1] for line in lines] == ["0.80 |", "1.00 |", "2.00 |", "1.00 |"]
    assert lines[2] == "| full, 16384 | 2.00 s | 2.00 s | 2.00 s | 2.00 s | 1,000 | 2.00 | 2.00 |"
    assert "\n3 rounds of 2 requests of 4 texts, template `plain`, 2 at a time; commit abc.\n" in report.section(result)
    assert "commit abc. Slow day.\n" in report.section(result | {"note": "Slow day."})
    assert "Targets met: 3 of 5." in report.section(result)
    assert "- missed: nothing: auto, 16384: speed-up ≥ 0.98, is 0.909, 0.909 by requests a second" in report.section(
        result
    )


def test_the_gpu_table_names_the_models(result: dict[str, Any]) -> None:
    results = [
        result | {"model": {"shape": shape}, "gpu": "a GPU", "dtype": "bf16", "threads": 8} for shape in ("0.6b", "4b")
    ]
    told = report.gpu_section(results)
    assert "| 0.6B | full, 16384 | 2.00 s | 2.00 s | 2.00 s | 2.00 s | 1,000 | 2.00 | 2.00 |" in told
    assert "On one a GPU, in bf16; 2 runs:\n\n- 0.6B, 8 threads: 3 rounds of 2 requests" in told
    assert "Targets met: 6 of 10." in told
    assert "- missed: 4B, nothing: auto, 16384: speed-up ≥ 0.98, is 0.909, 0.909 by requests a second" in told


def test_plot(result: dict[str, Any], tmp_path: Path) -> None:
    report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_tells_the_committed_results() -> None:
    text = REPORT.read_text(encoding="utf-8")
    assert with_sections(text, report.sections()) == text


def test_servers_are_left_out_by_name() -> None:
    found = {name: Server() for name in ("none, 16384", "full, 16384", "auto, 16384")}
    assert list(run.chosen(found, ["full, 16384"])) == ["none, 16384", "auto, 16384"]
    for wrong in ("ful", "none, 16384"):
        with pytest.raises(SystemExit, match=f"--without {wrong}: there are auto, 16384; full, 16384 to leave out"):
            run.chosen(found, [wrong])


def test_servers_on_a_gpu_are_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    @contextmanager
    def starting(server: Server) -> Iterator[Callable[[], str]]:
        events.append(f"start {server.command[0]}")
        yield lambda: f"http://{server.command[0]}"
        events.append(f"end {server.command[0]}")

    monkeypatch.setattr(run, "starting", starting)
    configured = {"a": Server(["a"]), "vLLM": Server(["vllm"], openai_model="m"), "b": Server(["b"])}
    with run.kept_running(configured, "cuda:0") as running:
        assert [server.url for server in running.values()] == ["http://a", None, "http://b"]
        assert events == ["start a", "start b"]
    assert events[2:] == ["end b", "end a"]
    with run.kept_running(configured, "cpu") as running:
        assert running == configured


def vectors(value: float) -> list[Any]:
    return [np.array([[value]], np.float32)]


def test_compare_takes_medians_of_alternating_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    means = iter([3.0, 9.0, 1.0, 8.0, 2.0, 1.0])

    def measured(*_: Any) -> tuple[Run, dict[str, float]]:
        return Run([next(means)], 1.0, 10, 5, {}, [], vectors(0.5)), {}

    monkeypatch.setattr(run, "measured", measured)
    found = run.compare([Request(["a"])], {"none, 1": Server(), "full, 1": Server()}, 3, 1e-4)
    assert found["none, 1"]["mean_of_each_round"] == [3, 1, 2]
    assert (found["none, 1"]["mean"], found["full, 1"]["mean"], found["full, 1"]["fold_ratio"]) == (2, 8, 2)
    assert sorted(found["full, 1"]["latencies"]) == [1, 8, 9]


@pytest.mark.parametrize("value", [0.6, float("nan")])
def test_other_vectors_are_refused(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([Run([1.0], 1.0, 1, 0, {}, [], vectors(0.5)), Run([1.0], 1.0, 1, 0, {}, [], vectors(value))])
    monkeypatch.setattr(run, "measured", lambda *_: (next(runs), {}))
    with pytest.raises(RuntimeError, match="full gives other vectors"):
        run.compare([Request(["a"])], {"none": Server(), "full": Server()}, 1, 1e-4)


def test_only_what_the_tree_builds_becomes_the_committed_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "changes", lambda: " M package/src/fold.rs")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit, match=r"fold\.rs"):
        run.arguments()
    monkeypatch.setattr(run, "changes", lambda: "")
    assert run.arguments().out == run.RESULT
    for elsewhere in (["--binary", "other"], ["--commit", "abc"], ["--url", "none=http://host"]):
        monkeypatch.setattr(sys, "argv", ["run.py", *elsewhere])
        with pytest.raises(SystemExit, match="--out"):
            run.arguments()
    monkeypatch.setattr(sys, "argv", ["run.py", "--url", "full=http://host", "--out", "other.json"])
    with pytest.raises(SystemExit, match="none="):
        run.arguments()
    monkeypatch.setattr(sys, "argv", ["run.py", "--url", "none=http://host", "--without", "x", "--out", "other.json"])
    with pytest.raises(SystemExit, match="--without"):
        run.arguments()
    monkeypatch.setattr(run, "changes", lambda: " M package/src/fold.rs")
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", "other.json"])
    assert run.arguments().out == Path("other.json")


def test_servers_are_started_as_they_are_named() -> None:
    machine = Machine(Path("model"), "cpu", "f32", 1)
    for level in ("none", "mlp", "full", "auto"):
        assert f"--fold {level} --max-batch-tokens 16384 --threads 1 " in radix_mlp(machine, level, 16384).told()
    told = vllm("/somewhere/vllm", machine, prefix_caching=True).told()
    assert f"--block-size {VLLM_BLOCK} --enable-prefix-caching" in told
    assert "OMP_NUM_THREADS=1" in told
    assert "/" not in told


def test_a_server_that_ends_is_told() -> None:
    server = Server(["python3", "-c", "import sys; sys.exit('no model, ' + ' '.join(sys.argv[1:2]))"])
    with pytest.raises(RuntimeError, match="ended with 1: no model, --port"), serving(server):
        pass


@contextmanager
def own_server(tmp_path: Path, *options: str) -> Iterator[str]:
    server = radix_mlp(Machine(write_model("tiny", tmp_path / "tiny"), "cpu", "f32", 1), "full", 16384, BINARIES[0])
    with serving(Server([*server.command, *options], server.environment)) as url:
        yield url


@pytest.mark.skipif(not BINARIES, reason="no server is built: cargo build -p radix_mlp --features server")
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no tokenizer at {DATA}")
def test_our_server_is_driven_by_both_routes(tmp_path: Path) -> None:
    bodies = [Request(["one two three four", "one two three five"]), Request(["six"])]
    with own_server(tmp_path, "--api-key", "key") as url:
        plain = asyncio.run(drive(Target(url, api_key="key"), bodies))
        openai = asyncio.run(drive(Target(url, "openai", "any", "key"), bodies))
        refused = asyncio.run(drive(Target(url), bodies))
        assert cache_counters(url) == {}
    assert plain.errors == openai.errors == []
    assert (plain.tokens, plain.folded) == (9, 3)
    # Vectors of length 1, from the same batch or another.
    for one, other in zip(plain.vectors, openai.vectors, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-4)
    assert len(refused.errors) == 2
