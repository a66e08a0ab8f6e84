"""The README's table of the REST benchmark, and its plot."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

START, END = "<!-- rest:start -->", "<!-- rest:end -->"
COLORS = {
    "none": "tab:gray",
    "mlp": "tab:blue",
    "full": "tab:green",
    "auto": "tab:olive",
    "sentence-transformers": "tab:orange",
    "vLLM": "tab:red",
}


def section(result: dict[str, Any]) -> str:
    """What stands between the README's markers."""
    told = (
        f"{result['rounds']} rounds of {result['requests']} requests of {result['pairs']} texts, template "
        f"`{result['template']}`, {result['concurrency']} at a time; commit {result['commit']}."
    )
    return "\n\n".join([table(result), told + (f" {result['note']}" if result.get("note") else ""), verdict(result)])


def table(result: dict[str, Any]) -> str:
    lines = [
        "| server, batch tokens | p50 | p90 | p99 | mean | tokens/s | N/N' | mean, times `none` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["passages"].items():
        percentiles = " | ".join(f"{row[key]:.2f} s" for key in ("p50", "p90", "p99", "mean"))
        rate, ratio = f"{row['tokens_per_second']:,.0f}", f"{row['fold_ratio']:.2f}"
        base = result["passages"][reference(name)]["mean"]
        lines.append(f"| {name} | {percentiles} | {rate} | {ratio} | {base / row['mean']:.2f} |")
    return "\n".join(lines)


def reference(name: str) -> str:
    """The unfolded server of the same batch tokens; of 16384 for servers that have no such limit."""
    _, _, tokens = name.partition(", ")
    return f"none, {tokens if tokens.isdigit() else 16384}"


def verdict(result: dict[str, Any]) -> str:
    checks = result["targets"]
    missed = [f"- missed: {check['target']}, is {check['value']}" for check in checks if not check["met"]]
    return "\n".join([f"Targets met: {len(checks) - len(missed)} of {len(checks)}.", *missed])


def into_readme(result: dict[str, Any], readme: Path) -> None:
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{section(result)}\n{END}{after}")


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
