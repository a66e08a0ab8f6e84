"""How long requests wait, and how much is computed, with the server's scheduler and with first-come batching.

Arrivals of real texts (../shared/data) run through both in simulated time, at several loads; a batch takes
BATCH_SECONDS and TOKEN_SECONDS a row, about what Qwen3-0.6B takes on an H200 (results/gpu_forward.json). A load of 1 is
as much as a server that folds nothing can compute. Same seed, same numbers: nothing is timed.

    python benchmark/scheduler/simulate.py          # a minute; rewrites results/scheduler.json and the plot
    python benchmark/scheduler/simulate.py --plot   # draws the plot from the JSON result
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))

from machine import output_of  # noqa: E402
from real_batches import DATA, groups  # noqa: E402

RESULT = ROOT / "benchmark" / "results" / "scheduler.json"
BUDGET, WINDOW = 16_384, 0.002
BATCH_SECONDS, TOKEN_SECONDS = 5e-3, 5e-6
LOADS = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0]
POLICIES = ["first-come", "first-come, folded", "scheduler"]

# Sequences and when they arrive, in seconds, ascending.
Trace = tuple[list[list[int]], np.ndarray[Any, np.dtype[np.float64]]]


def clients(file: str, most: int, together: float, seed: int) -> Trace:
    """Each group of a file is a client, whose sequences arrive within about `together` seconds of its start, which is
    anywhere in a second."""
    draw = np.random.default_rng(seed)
    arrivals: list[tuple[float, list[int]]] = []
    for _, sequences in groups(DATA / file):
        start = draw.uniform(0, 1)
        gaps = draw.exponential(together / len(sequences), len(sequences))
        arrivals += zip((start + np.cumsum(gaps)).tolist(), sequences, strict=True)
        if len(arrivals) >= most:
            break
    arrivals.sort(key=lambda arrival: arrival[0])
    return [ids for _, ids in arrivals], np.array([second for second, _ in arrivals])


def strangers(files: list[str], most: int, seed: int) -> Trace:
    """One sequence of each group: what is shared is a template at most."""
    draw = np.random.default_rng(seed)
    sequences = [group[0] for file in files for _, group in groups(DATA / file)][:most]
    random.Random(seed).shuffle(sequences)
    return sequences, np.cumsum(draw.exponential(1 / len(sequences), len(sequences)))


def traces() -> dict[str, Trace]:
    return {
        "rerank: 43 queries of 100 passages": clients("rerank_msmarco_dl19_bm25.dev.jsonl", 4300, 0.2, 0),
        "agents: tau-bench turns": clients("tree_taubench_airline_gpt4o.dev.jsonl", 1500, 1.0, 1),
        "nothing in common": strangers(["grpo_gsm8k_4models.dev.jsonl", "grpo_math_qwen_8samples.dev.jsonl"], 700, 2),
    }


def simulate(trace: Trace, load: float) -> dict[str, Any]:
    sequences, seconds = trace
    tokens = sum(map(len, sequences))
    # What an unfolded server takes for all of it, in full batches.
    capacity = tokens * TOKEN_SECONDS + tokens / BUDGET * BATCH_SECONDS
    scaled = seconds / seconds[-1] * capacity / load
    request = {
        "sequences": sequences,
        "seconds": scaled.tolist(),
        "budget": BUDGET,
        "window": WINDOW,
        "batch_seconds": BATCH_SECONDS,
        "token_seconds": TOKEN_SECONDS,
    }
    example = ROOT / "target" / "release" / "examples" / "simulate_scheduler"
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
    subprocess.run(
        [
            "cargo",
            "build",
            "--release",
            "-q",
            "-p",
            "radix_mlp",
            "--features",
            "candle",
            "--example",
            "simulate_scheduler",
        ],
        check=True,
        cwd=ROOT,
    )
    results = {}
    for name, trace in tqdm(traces().items(), desc="traces"):
        rows = [{"load": load, **simulate(trace, load)} for load in tqdm(LOADS, desc=name, leave=False)]
        sequences, tokens = len(trace[0]), sum(map(len, trace[0]))
        results[name] = {"sequences": sequences, "tokens": tokens, "loads": rows}
    return {
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
        "budget_tokens": BUDGET,
        "window_seconds": WINDOW,
        "batch_seconds": BATCH_SECONDS,
        "token_seconds": TOKEN_SECONDS,
        "traces": results,
    }


def plot(result: dict[str, Any]) -> None:
    traces = result["traces"]
    figure, axes = plt.subplots(2, len(traces), figsize=(4.5 * len(traces), 7), sharex=True, layout="constrained")
    for column, (name, trace) in enumerate(traces.items()):
        loads = [row["load"] for row in trace["loads"]]
        for policy, color in zip(POLICIES, ["tab:gray", "tab:blue", "tab:green"], strict=True):
            for quantile, style in [("p50_ms", "-"), ("p99_ms", "--")]:
                values = [row[policy][quantile] for row in trace["loads"]]
                label = f"{policy}, {quantile[:3]}"
                axes[0, column].plot(loads, values, style, color=color, label=label, marker=".")
            ratios = [row[policy]["fold_ratio"] for row in trace["loads"]]
            axes[1, column].plot(loads, ratios, color=color, label=policy, marker=".")
        axes[0, column].set(title=name, yscale="log")
        axes[1, column].set(xlabel="load, 1 = all an unfolded server can do", ylim=(0, None))
    axes[0, 0].set_ylabel("ms from arrival to answer")
    axes[1, 0].set_ylabel("tokens asked for / computed")
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
    plot(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
