"""Text in, vectors out, over HTTP: the server unfolded, at the paper's level and folded, and sentence-transformers.

Each configuration is a server of its own, with all cores, started in turn; rounds alternate, so that a slow moment of
the machine meets all of them. The model is a Qwen3 of 100M parameters with random weights. Where vLLM's CPU build is on
the PATH, it is measured too, without and with its cache of prefixes.

    python benchmark/rest/run.py           # half an hour, on an idle machine; rewrites results/rest.json
    python benchmark/rest/run.py --quick   # two requests, writes nothing: does it run?
    python benchmark/rest/run.py --plot    # draws the plot from the JSON result
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModel, PreTrainedTokenizerFast, Qwen3Config  # noqa: E402

from machine import cpu, output_of  # noqa: E402
from real_batches import DATA  # noqa: E402
from rest.client import Run, drive  # noqa: E402
from rest.servers import Server, radix_mlp, sentence_transformers, serving, vllm  # noqa: E402
from rest.traffic import Texts, requests, shared_prefixes  # noqa: E402

RESULT = ROOT / "benchmark" / "results" / "rest.json"
MODEL = ROOT / "target" / "rest" / "model"
ROUNDS, REQUESTS, PAIRS, CONCURRENCY = 2, 32, 16, 16
# Of vectors of length 1: sums of 768 terms in another order, in f32, through 12 layers.
TOLERANCE = 1e-4
SHARED_WORDS = [0, 8, 32, 96]
COLORS = {
    "none": "tab:gray",
    "mlp": "tab:blue",
    "full": "tab:green",
    "sentence-transformers": "tab:orange",
    "vLLM": "tab:red",
}


def configurations() -> dict[str, Server]:
    servers = {"sentence-transformers": sentence_transformers(MODEL)}
    if executable := shutil.which("vllm"):
        servers["vLLM"] = vllm(executable, MODEL, prefix_caching=False)
        servers["vLLM, prefix caching"] = vllm(executable, MODEL, prefix_caching=True)
    for tokens in ("16384", "65536"):
        for level in ("none", "mlp", "full"):
            # "auto" is what users have who say nothing: folded where that gains.
            fold = "auto" if level == "full" else level
            servers[f"{level}, {tokens}"] = radix_mlp(MODEL, "--fold", fold, "--max-batch-tokens", tokens)
    return servers


def make_model() -> None:
    if (MODEL / "config.json").exists():
        return
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(MODEL)  # type: ignore[no-untyped-call]
    file = str(DATA / "qwen3-tokenizer" / "tokenizer.json")
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=file, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    ).save_pretrained(MODEL)


def measured(server: Server, bodies: list[Texts]) -> Run:
    with serving(server) as url:
        # Another text, so that caches of prefixes stay empty, but for what finds everything cold.
        asyncio.run(drive(url, [["a first text"]], openai_model=server.openai_model))
        run = asyncio.run(drive(url, bodies, concurrency=CONCURRENCY, openai_model=server.openai_model))
    if run.errors:
        raise RuntimeError(f"{server.command}: {len(run.errors)} errors, the first: {run.errors[0]}")
    return run


def compare(bodies: list[Texts], servers: dict[str, Server], rounds: int) -> dict[str, Any]:
    """For each server the run of median mean latency, and all latencies of it."""
    runs: dict[str, list[Run]] = {name: [] for name in servers}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for name, server in tqdm(servers.items(), desc="servers", leave=False, disable=None):
            runs[name].append(measured(server, bodies))
    reference = next(found[0] for name, found in runs.items() if name.startswith("none"))
    result = {}
    for name, found in runs.items():
        difference = max(float(np.abs(a - b).max()) for a, b in zip(found[0].vectors, reference.vectors, strict=True))
        if not difference < TOLERANCE:
            raise RuntimeError(f"{name} gives other vectors: they differ by {difference:.1e}")
        means = [float(np.mean(run.latencies)) for run in found]
        middle = found[means.index(statistics.median_low(means))]
        result[name] = {
            **{key: round(value, 4) for key, value in middle.summary(reference.tokens).items()},
            "mean_of_each_round": [round(mean, 4) for mean in means],
            "largest_difference": difference,
            "latencies": [round(latency, 4) for latency in middle.latencies],
        }
    return result


def measure(quick: bool) -> dict[str, Any]:
    build = "cargo build --release -q -p radix_mlp --features server"
    output_of(*build.split())
    make_model()
    count, rounds = (2, 1) if quick else (REQUESTS, ROUNDS)
    bodies = requests("recorded", "reranker", PAIRS, count)
    passages = compare(bodies, configurations(), rounds)
    levels = {name: server for name, server in configurations().items() if name in ("none, 16384", "full, 16384")}
    words = SHARED_WORDS[:2] if quick else SHARED_WORDS
    sharing = {
        number: compare(shared_prefixes(number, 12, PAIRS, max(2, count // 8)), levels, rounds)
        for number in tqdm(words, desc="prefixes", disable=None)
    }
    for runs in sharing.values():
        for run in runs.values():
            del run["latencies"]
    return {
        "cpu": cpu(),
        "threads": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "vllm": output_of("env", "VLLM_TARGET_DEVICE=cpu", "vllm", "--version") if shutil.which("vllm") else None,
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
        "requests": count,
        "pairs": PAIRS,
        "concurrency": CONCURRENCY,
        "rounds": rounds,
        "passages": passages,
        "shared_words": sharing,
    }


def table(result: dict[str, Any]) -> str:
    """The Markdown table of the README."""
    lines = [
        "| server | p50 | p90 | p99 | mean | tokens/s | N/N' | mean, times `none` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = result["passages"]["none, 16384"]["mean"]
    for name, row in result["passages"].items():
        percentiles = " | ".join(f"{row[key]:.2f} s" for key in ("p50", "p90", "p99", "mean"))
        rate, ratio = f"{row['tokens_per_second']:,.0f}", f"{row['fold_ratio']:.2f}"
        lines.append(f"| {name} | {percentiles} | {rate} | {ratio} | {base / row['mean']:.2f} |")
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, row in result["passages"].items():
        level, _, tokens = name.partition(", ")
        style = "--" if tokens in ("65536", "prefix caching") else "-"
        latencies = np.sort(row["latencies"])
        share = np.arange(1, len(latencies) + 1) / len(latencies)
        left.plot(latencies, share, style, color=COLORS[level], label=name)
    left.set(xlabel="seconds to an answer", ylabel="part of the requests", xlim=(0, None))
    left.set_title(f"{result['requests']} requests of {result['pairs']} passages, {result['concurrency']} at a time")
    left.legend(fontsize=8)
    ratios = [runs["full, 16384"]["fold_ratio"] for runs in result["shared_words"].values()]
    for name in ("none, 16384", "full, 16384"):
        rates = [runs[name]["tokens_per_second"] for runs in result["shared_words"].values()]
        right.plot(ratios, rates, color=COLORS[name.split(",")[0]], marker=".", label=name)
    right.set(xlabel="N/N' of the scheduler's batches", ylabel="tokens/s asked for and answered", ylim=(0, None))
    right.set_title("texts that share prefixes of several lengths")
    right.legend(fontsize=8)
    figure.savefig(RESULT.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two requests, writes nothing")
    parser.add_argument("--plot", action="store_true", help="draw the plot from the JSON result")
    options = parser.parse_args()
    if options.plot:
        result = json.loads(RESULT.read_text())
    elif not DATA.is_dir():
        sys.exit(f"no recorded passages at {DATA}")
    else:
        result = measure(options.quick)
    print(table(result))
    if options.quick:
        return
    if not options.plot:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    plot(result)


if __name__ == "__main__":
    main()
