"""Times the fold against the published package radix-mlp 0.0.2: same arrays, one process, in alternation.

Installs the published wheel into a folder of its own under target/, and loads it beside this project's
package. Both go through their Python function; equality is asserted before anything is timed. Copying
four N-long uint32 arrays, which is what the fold returns at most, is timed in the same rounds.

    python benchmark/fold_vs_published.py            # minutes, on an idle machine; rewrites results/
    python benchmark/fold_vs_published.py --quick    # fewer rounds, writes nothing: does it run?
    python benchmark/fold_vs_published.py --plot     # draws the plot from the JSON result
"""

import argparse
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import radix_mlp as ours
from machine import ROOT, cpu, output_of
from real_batches import real_batches

REQUIREMENTS = Path(__file__).with_suffix(".requirements.txt")
SHAPES = ROOT / "package" / "benches" / "shapes.json"
RESULT = ROOT / "benchmark" / "results" / "fold_vs_published.json"
# What the published crate's own bench varies.
OWN_TABLE = ("batch size", "length", "sharing", "padding", "single sequence")

Ids = NDArray[np.uint32]


@dataclass
class Batch:
    group: str
    name: str
    input_ids: Ids
    position_ids: Ids
    cu_seq_lengths: Ids
    pad_multiple_of: int | None = None


@dataclass
class Row:
    """Medians over the rounds, in nanoseconds for each of the batch's tokens."""

    group: str
    name: str
    tokens: int
    nodes: int
    ours: float
    published: float
    copy: float

    @property
    def ratio(self) -> float:
        return self.published / self.ours

    @property
    def copies(self) -> float:
        return self.ours / self.copy

    def rounded(self) -> dict[str, Any]:
        values = asdict(self) | {"ratio": self.ratio, "copies": self.copies}
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}


def batch_of_shape(group: str, sequences: int, length: int, shared: float, pad_multiple_of: int | None = None) -> Batch:
    """A prefix of the share `shared` that all sequences have, then tokens of each one's own."""
    i = np.arange(length)
    own = 1_000_000 + np.arange(sequences)[:, None] * 10_000 + i
    ids = np.where(i < int(length * shared), i % 1000 + 1, own)
    return Batch(
        group,
        f"{sequences} × {length}, {shared:g} shared",
        ids.astype(np.uint32).ravel(),
        np.tile(i, sequences).astype(np.uint32),
        np.arange(0, ids.size + 1, length, dtype=np.uint32),
        pad_multiple_of,
    )


def real_batch(name: str, sequences: list[list[int]]) -> Batch:
    return Batch(
        "real",
        name,
        np.concatenate([np.array(ids, np.uint32) for ids in sequences]),
        np.concatenate([np.arange(len(ids), dtype=np.uint32) for ids in sequences]),
        np.cumsum([0, *map(len, sequences)]).astype(np.uint32),
    )


def load_published() -> Any:
    """The published package, which has this project's module name."""
    folder = ROOT / "target" / "published"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), "-r", str(REQUIREMENTS)], check=True)
    mine = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "radix_mlp"}
    for name in mine:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    published = importlib.import_module("radix_mlp")
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "radix_mlp"]:
        del sys.modules[name]
    sys.modules.update(mine)
    assert str(published.__file__).startswith(str(folder)), published.__file__
    return published


def seconds(call: Callable[[], object], loops: int) -> float:
    """Of one call, its result's release included."""
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def measure(batch: Batch, published: Any, rounds: int, round_seconds: float) -> Row:
    arrays = (batch.input_ids, batch.position_ids, batch.cu_seq_lengths, batch.pad_multiple_of)
    ids = batch.input_ids
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.compute_fold_and_scatter(*arrays),
        "published": lambda: published.compute_fold_and_scatter(*arrays),
        "copy": lambda: [ids.copy() for _ in range(4)],
    }
    folded = ours.compute_fold_and_scatter(*arrays)
    for mine, theirs in zip(folded, published.compute_fold_and_scatter(*arrays), strict=True):
        np.testing.assert_array_equal(mine, theirs, strict=True)

    loops = {name: max(1, int(round_seconds / seconds(call, 2))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, loops[name]))
    nodes = int(folded[2].max()) + 1
    medians = {name: statistics.median(values) / ids.size * 1e9 for name, values in times.items()}
    return Row(batch.group, batch.name, ids.size, nodes, **medians)


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    own = [row.ratio for row in rows if row.group in OWN_TABLE]
    wide = [row.ratio for row in rows if row.name.startswith("100000 ×")]
    large = [row.ratio for row in rows if row.tokens >= 1_000_000]
    medium = [row.ratio for row in rows if 2048 <= row.tokens < 1_000_000]
    copies = [row.copies for row in rows if row.tokens >= 2048]
    calls = [row.ours * row.tokens / 1000 for row in rows if row.tokens == 512]
    checks = [
        ("median ratio over the published bench's shapes ≥ 25", statistics.median(own), 25, True),
        ("least ratio of 2,048 to a million tokens ≥ 10", min(medium), 10, True),
        ("least ratio from a million tokens on ≥ 5", min(large), 5, True),
        ("ratio at 100,000 sequences ≥ 100", min(wide), 100, True),
        ("most copies' time from 2,048 tokens on ≤ 3", max(copies), 3, False),
        ("most microseconds for 512 tokens ≤ 10", max(calls), 10, False),
    ]
    return [
        {"target": text, "value": round(value, 2), "met": value >= limit if at_least else value <= limit}
        for text, value, limit, at_least in checks
    ]


def environment() -> dict[str, Any]:
    published = REQUIREMENTS.read_text().strip()
    return {
        "hardware": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        },
        "versions": {
            "radix_mlp": ours.__version__,
            "published": published,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "rustc": output_of("rustc", "--version"),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "commit": output_of("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(output_of("git", "status", "--porcelain", "package/src", "python_bindings")),
    }


def plot(result: dict[str, Any]) -> None:
    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(9, 0.22 * len(rows) + 1.5), layout="constrained")
    heights = np.arange(len(rows))
    marks = {"published": "o", "ours": "D", "copy": "|"}
    labels = {"published": "published 0.0.2", "ours": "this package", "copy": "copying four arrays of N"}
    for name, mark in marks.items():
        axes.plot([row[name] for row in rows], heights, mark, label=labels[name], alpha=0.8)
    axes.set_yticks(heights, [f"{row['group']}: {row['name']}" for row in rows], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"nanoseconds a token (median), {result['hardware']['cpu']}")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.04), ncols=3, frameon=False)
    figure.savefig(RESULT.with_suffix(".png"), dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--quick", action="store_true", help="fewer rounds, and write nothing")
    only.add_argument("--plot", action="store_true", help="only draw the plot from the JSON result")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(json.loads(RESULT.read_text()))
        return

    rounds, round_seconds = (3, 0.0005) if arguments.quick else (21, 0.005)
    published = load_published()
    batches = [batch_of_shape(**shape) for shape in json.loads(SHAPES.read_text())]
    batches += [real_batch(name, sequences) for name, sequences in real_batches().items()]
    gc.disable()
    rows = [measure(batch, published, rounds, round_seconds) for batch in tqdm(batches, unit="batch")]

    print(f"{'batch':52}{'tokens':>9}{'nodes':>9}{'published':>11}{'ours':>8}{'copy':>8}{'ratio':>8}{'copies':>8}")
    for row in rows:
        print(
            f"{row.group + ': ' + row.name:52}{row.tokens:9}{row.nodes:9}{row.published:11.2f}{row.ours:8.3f}"
            f"{row.copy:8.3f}{row.ratio:8.1f}{row.copies:8.2f}"
        )
    print("times in nanoseconds a token")
    checked = targets(rows)
    result = {
        **environment(),
        "command": "python benchmark/fold_vs_published.py",
        "unit": "nanoseconds a token, median of rounds",
        "rounds": rounds,
        "targets": checked,
        "rows": [row.rounded() for row in rows],
    }
    if not arguments.quick:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        plot(result)
    for check in checked:
        print(f"{'met   ' if check['met'] else 'MISSED'} {check['target']}: {check['value']}")
    print(json.dumps({key: result[key] for key in ("commit", "hardware", "targets")}, ensure_ascii=False))


if __name__ == "__main__":
    main()
