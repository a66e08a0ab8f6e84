"""The README's tables of the REST benchmark, and its plot."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from readme import RESULTS

# Of models on a GPU, smallest first.
SHAPES = ("0.6b", "4b", "8b")
COLUMNS = "p50 | p90 | p99 | mean | tokens/s | N/N' | mean, times `none` |"
COLORS = {
    "none": "tab:gray",
    "mlp": "tab:blue",
    "full": "tab:green",
    "auto": "tab:olive",
    "sentence-transformers": "tab:orange",
    "vLLM": "tab:red",
}


def section(result: dict[str, Any]) -> str:
    """What the README says of servers on the CPU."""
    lines = [f"| server, batch tokens | {COLUMNS}", f"|{'---|' * 8}", *table(result)]
    return "\n\n".join(["\n".join(lines), told(result), verdict([result])])


def gpu_section(results: list[dict[str, Any]]) -> str:
    """What the README says of servers on a GPU, with models of several sizes."""
    lines = [f"| Qwen3 | server, batch tokens | {COLUMNS}", f"|{'---|' * 9}"]
    lines += [f"| {result['model']['shape'].upper()} {line}" for result in results for line in table(result)]
    each = [f"{model(result)}{result['threads']} threads: {told(result)}" for result in results]
    where = f"On one {results[0]['gpu']}, in {results[0]['dtype']}; {len(each)} runs:"
    count, *missed = verdict(results).splitlines()
    folded = "\n".join([f"<details>\n<summary>{count}</summary>\n", *missed, "\n</details>"]) if missed else count
    return "\n\n".join(["\n".join(lines), where, "\n".join(f"- {line}" for line in each), folded])


def told(result: dict[str, Any]) -> str:
    """What was asked of the servers."""
    return (
        f"{result['rounds']} rounds of {result['requests']} requests of {result['pairs']} texts, template "
        f"`{result['template']}`, {result['concurrency']} at a time; commit {result['commit']}."
    ) + (f" {result['note']}" if result.get("note") else "")


def table(result: dict[str, Any]) -> list[str]:
    """A line for each server."""
    lines = []
    for name, row in result["passages"].items():
        percentiles = " | ".join(f"{row[key]:.2f} s" for key in ("p50", "p90", "p99", "mean"))
        rate, ratio = f"{row['tokens_per_second']:,.0f}", f"{row['fold_ratio']:.2f}"
        base = result["passages"][reference(name)]["mean"]
        lines.append(f"| {name} | {percentiles} | {rate} | {ratio} | {base / row['mean']:.2f} |")
    return lines


def reference(name: str) -> str:
    """The unfolded server of the same batch tokens; of 16384 for servers that have no such limit."""
    _, _, tokens = name.partition(", ")
    return f"none, {tokens if tokens.isdigit() else 16384}"


def verdict(results: list[dict[str, Any]]) -> str:
    checks = [(result, check) for result in results for check in result["targets"]]
    missed = [
        f"- missed: {model(result) if len(results) > 1 else ''}{check['target']}, is {check['value']}, "
        f"{check['by_rate']} by requests a second"
        for result, check in checks
        if not check["met"]
    ]
    return "\n".join([f"Targets met: {len(checks) - len(missed)} of {len(checks)}.", *missed])


def model(result: dict[str, Any]) -> str:
    return f"{result['model']['shape'].upper()}, "


def sections() -> dict[str, str]:
    """By the name of the README's marker, what the committed results say."""
    found = {"rest": section(json.loads((RESULTS / "rest.json").read_text()))}
    files = [RESULTS / f"rest_gpu_{shape}.json" for shape in SHAPES]
    if results := [json.loads(file.read_text()) for file in files if file.exists()]:
        found["rest_gpu"] = gpu_section(results)
    return found


def most_folded(runs: dict[str, Any]) -> float:
    ratio: float = max(run["fold_ratio"] for run in runs.values())
    return ratio


def plot(result: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, row in result["passages"].items():
        level, _, tokens = name.partition(", ")
        style = "--" if tokens in ("65536", "prefix caching") else "-"
        latencies = np.sort(row["latencies"])
        share = np.arange(1, len(latencies) + 1) / len(latencies)
        left.plot(latencies, share, style, color=COLORS.get(level, "black"), label=name)
    left.set(xlabel="seconds to an answer", ylabel="part of the requests", xlim=(0, None))
    left.set_title(f"{result['requests']} requests of {result['pairs']} passages, {result['concurrency']} at a time")
    left.legend(fontsize=8)
    cases = list(result["sharing"].values())
    for name in cases[0]:
        points = sorted(((most_folded(runs), runs[name]) for runs in cases), key=lambda point: point[0])
        rates = [run["tokens_per_second"] for _, run in points]
        level = name.split(",")[0]
        right.plot([ratio for ratio, _ in points], rates, color=COLORS.get(level, "black"), marker=".", label=name)
    right.set(xlabel="N/N' of the scheduler's batches", ylabel="tokens/s asked for and answered", ylim=(0, None))
    right.set_title("texts that share prefixes of several lengths")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
