"""How long requests wait, and how much is computed, with the server's scheduler and with first-come batching.

The texts are recorded ones (../shared/data), and so are the moments at which requests arrive (arrivals.json), those of
a code completion service. They are of different records, and which client's request comes next is drawn. All policies
meet them in simulated time, at several loads. What a batch takes is a line through the measured times of Qwen3-0.6B on
an H200 (results/gpu_forward.json, `full`). A load of 1 is as much as a server that folds nothing can compute. Same
seed, same numbers: nothing is timed.

    python benchmark/scheduler/simulate.py          # a minute; rewrites results/scheduler.json, its plot, the README
    python benchmark/scheduler/simulate.py --plot   # draws the plot and the table from the JSON result
"""

import argparse
import json
import random
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))

from machine import output_of  # noqa: E402
from readme import REPORT, RESULTS, write_sections  # noqa: E402
from real_batches import DATA, groups  # noqa: E402

RESULT = RESULTS / "scheduler.json"
ARRIVALS = Path(__file__).with_name("arrivals.json")
COSTS = RESULTS / "gpu_forward.json"
# The server's defaults, in tokens and seconds.
BUDGET, WINDOW = 16_384, 0.002
LOADS = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0]
TOLD = [0.5, 1.0, 3.0]
FIGURES = ["fold_ratio", "p50_ms", "p99_ms", "tokens_per_second"]
POLICIES = ["first-come", "first-come, folded", "scheduler"]

# Sequences that arrive together.
Request = list[list[int]]
# Sequences and when they arrive, in seconds, ascending.
Trace = tuple[list[list[int]], np.ndarray[Any, np.dtype[np.float64]]]


def interleaved(clients: list[list[Request]], at_once: int, seed: int) -> Iterator[Request]:
    """Each client's requests in their order; of those that have some left, the first `at_once`, one is drawn."""
    draw = random.Random(seed)
    left = [deque(requests) for requests in clients]
    while left:
        client = draw.randrange(min(at_once, len(left)))
        yield left[client].popleft()
        if not left[client]:
            del left[client]


def groups_of(*files: str) -> list[list[list[int]]]:
    return [sequences for file in files for _, sequences in groups(DATA / file)]


def traces() -> dict[str, Trace]:
    queries = groups_of("rerank_msmarco_dl19_bm25.dev.jsonl")
    passages = [[own[start : start + 8] for start in range(0, len(own), 8)] for own in queries]
    turns = [[[turn] for turn in own] for own in groups_of("tree_taubench_airline_gpt4o.dev.jsonl")]
    alone = [[[own[0]]] for own in groups_of("grpo_gsm8k_4models.dev.jsonl", "grpo_math_qwen_8samples.dev.jsonl")]
    ordered = {
        "rerank: 8 passages a request, 8 queries at once": interleaved(passages, 8, 0),
        "agents: 32 at once, a turn a request": interleaved(turns, 32, 1),
        "nothing in common": interleaved(alone, len(alone), 2),
    }
    return {name: at_recorded_times(requests) for name, requests in ordered.items()}


def at_recorded_times(requests: Iterable[Request]) -> Trace:
    """One request at each recorded moment, as long as there are both."""
    seconds = np.array(json.loads(ARRIVALS.read_text())["milliseconds"]) / 1e3
    pairs = [(second, sequence) for second, request in zip(seconds, requests, strict=False) for sequence in request]
    return [sequence for _, sequence in pairs], np.array([second for second, _ in pairs])


@dataclass(frozen=True)
class Cost:
    """Seconds of a batch: `batch_seconds` and `token_seconds` for each row that is computed."""

    batch_seconds: float
    token_seconds: float


def points(measured: dict[str, Any]) -> list[tuple[int, float]]:
    """Rows that the folded forward pass of Qwen3-0.6B computed, and milliseconds."""
    rows = [row for row in measured["rows"] if row["shape"] == "qwen3-0.6b" and "full" in row["wall_ms"]]
    return sorted((row["nodes"], row["wall_ms"]["full"]) for row in rows)


def fitted(found: list[tuple[int, float]]) -> Cost:
    """The line of least squares."""
    nodes, milliseconds = zip(*found, strict=True)
    slope, start = np.polyfit(nodes, milliseconds, 1).tolist()
    return Cost(round(start / 1e3, 6), round(slope / 1e3, 10))


def simulate(trace: Trace, load: float, cost: Cost) -> dict[str, Any]:
    sequences, seconds = trace
    tokens = sum(map(len, sequences))
    # What an unfolded server takes for all of it, in full batches.
    capacity = tokens * cost.token_seconds + tokens / BUDGET * cost.batch_seconds
    scaled = seconds / seconds[-1] * capacity / load
    request = {
        "sequences": sequences,
        "seconds": scaled.tolist(),
        "budget": BUDGET,
        "window": WINDOW,
        **asdict(cost),
    }
    example = ROOT / "target" / "debug" / "examples" / "simulate_scheduler"
    answer = subprocess.run([example], input=json.dumps(request), capture_output=True, text=True, check=True)
    return {policy: summary(outcome, tokens) for policy, outcome in json.loads(answer.stdout).items()}


def summary(outcome: dict[str, Any], tokens: int) -> dict[str, float]:
    p50, p99 = np.percentile(outcome["waits"], [50, 99])
    return {
        "p50_ms": round(p50 * 1e3, 2),
        "p99_ms": round(p99 * 1e3, 2),
        "tokens_per_second": round(tokens / outcome["end"]),
        "fold_ratio": round(tokens / outcome["computed_tokens"], 3),
        "batches": outcome["batches"],
    }


def measure() -> dict[str, Any]:
    # Optimised as well: the profile for development is.
    build = "cargo build -q -p radix_mlp --features candle --example simulate_scheduler"
    output_of(*build.split())
    costs = points(json.loads(COSTS.read_text()))
    cost = fitted(costs)
    results = {}
    for name, trace in tqdm(traces().items(), desc="traces", disable=None):
        rows = [{"load": load, **simulate(trace, load, cost)} for load in tqdm(LOADS, desc=name, leave=False)]
        sequences, tokens = len(trace[0]), sum(map(len, trace[0]))
        results[name] = {"sequences": sequences, "tokens": tokens, "loads": rows}
    return {
        "commit": output_of("git", "describe", "--always", "--dirty", "--exclude=*"),
        "texts": "recorded",
        "arrivals": json.loads(ARRIVALS.read_text())["source"] + "; stretched to each load",
        "budget_tokens": BUDGET,
        "window_seconds": WINDOW,
        **asdict(cost),
        "cost_points": {"of": f"{COSTS.name}: qwen3-0.6b, full, [nodes, wall_ms]", "points": costs},
        "traces": results,
    }


def table(result: dict[str, Any]) -> str:
    """The README's: first-come batching that folds as well, beside the scheduler."""
    lines = [
        "| texts | load | N/N' | p50, ms | p99, ms | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, trace in result["traces"].items():
        for row in trace["loads"]:
            if row["load"] in TOLD:
                pairs = [(row["first-come, folded"][key], row["scheduler"][key]) for key in FIGURES]
                lines.append(f"| {name} | {row['load']} | {' | '.join(f'{a:,} → {b:,}' for a, b in pairs)} |")
    worst = max(
        (row["scheduler"]["p99_ms"] / row["first-come, folded"]["p99_ms"] - 1, name, row["load"])
        for name, trace in result["traces"].items()
        for row in trace["loads"]
    )
    return "\n".join([*lines, "", f"The scheduler's worst p99 is {worst[0]:+.0%}: {worst[1]}, load {worst[2]}."])


def plot(result: dict[str, Any]) -> None:
    traces = result["traces"]
    figure, axes = plt.subplots(3, len(traces), figsize=(4.5 * len(traces), 10), sharex=True, layout="constrained")
    for column, (name, trace) in enumerate(traces.items()):
        loads = [row["load"] for row in trace["loads"]]
        for policy, color in zip(POLICIES, ["tab:gray", "tab:blue", "tab:green"], strict=True):
            for quantile, style in [("p50_ms", "-"), ("p99_ms", "--")]:
                values = [row[policy][quantile] for row in trace["loads"]]
                label = f"{policy}, {quantile[:3]}"
                axes[0, column].plot(loads, values, style, color=color, label=label, marker=".")
            for line, figure_name in [(1, "fold_ratio"), (2, "tokens_per_second")]:
                values = [row[policy][figure_name] for row in trace["loads"]]
                axes[line, column].plot(loads, values, color=color, label=policy, marker=".")
        axes[0, column].set(title=name, yscale="log")
        axes[1, column].set(ylim=(0, None))
        axes[2, column].set(xlabel="load, 1 = all an unfolded server can do", ylim=(0, None))
    axes[0, 0].set_ylabel("ms from arrival to answer")
    axes[1, 0].set_ylabel("tokens asked for / computed")
    axes[2, 0].set_ylabel("tokens/s asked for and answered")
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    figure.savefig(RESULT.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="draw the plot from the JSON result")
    if not parser.parse_args().plot:
        if not DATA.is_dir():
            sys.exit(f"no real texts at {DATA}")
        RESULT.write_text(json.dumps(measure(), indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    plot(result)
    write_sections(REPORT, {"scheduler": table(result)})


if __name__ == "__main__":
    main()
