"""How much a Qwen3 forward pass of about 100M parameters gains from the fold on the CPU, in f32 and last-token pooled.

Times `none`, `mlp` and `full` of the Rust model and transformers (sdpa, the faster of one padded batch and one
sequence at a time) in alternation on the same weights, token ids and number of threads. The real batches are the
first sequences of ../shared/data, at most MAX_SEQUENCES and MAX_TOKENS; their token ids are renumbered, so that a
small vocabulary holds them. Also fits the constants of package/src/qwen3/cost.rs.

    python benchmark/cpu_forward/run.py            # a quarter of an hour, on an idle machine; rewrites results/
    python benchmark/cpu_forward/run.py --quick    # one short round, writes nothing: does it run?
    python benchmark/cpu_forward/run.py --plot     # draws the plot from the JSON result
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))
THREADS = len(os.sched_getaffinity(0))
# Idle OpenMP threads would otherwise spin on the cores that the Rust model is timed on.
os.environ |= {"OMP_WAIT_POLICY": "passive", "RAYON_NUM_THREADS": str(THREADS)}

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

from flops import attention_flops, linear_flops  # noqa: E402
from machine import cpu, output_of  # noqa: E402
from radix_mlp import Fold  # noqa: E402
from real_batches import real_batches  # noqa: E402

WORK = ROOT / "target" / "cpu_forward"
RESULT = ROOT / "benchmark" / "results" / "cpu_forward.json"
LEVELS = ["none", "mlp", "full"]
MAX_SEQUENCES, MAX_TOKENS = 32, 16_384
ROUNDS = 3
CONFIG = transformers.Qwen3Config(
    vocab_size=16_384,
    hidden_size=768,
    intermediate_size=2304,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=16_384,
    tie_word_embeddings=True,
)
REAL = {
    "rerank_msmarco_dl19_bm25": "rerank",
    "fewshot_bbh_cot": "few-shot BBH",
    "tree_taubench_airline_gpt4o": "tau-bench turns",
}

Batch = list[list[int]]


def batches(quick: bool) -> dict[str, Batch]:
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return draw.choices(range(CONFIG.vocab_size), k=count)

    prefix = tokens(512)
    size = 4 if quick else 32
    result = {
        f"{size} × 512+64": [prefix + tokens(64) for _ in range(size)],
        "nothing shared": [tokens(288) for _ in range(size)],
    }
    real = real_batches()
    for file, name in REAL.items():
        if file in real:
            result[name] = cut(real[file], quick)
    if "grpo_gsm8k_4models" in real:
        result["one of each group"] = cut(real["grpo_gsm8k_4models"][::4], quick)
    return result


def cut(batch: Batch, quick: bool) -> Batch:
    kept: Batch = []
    tokens = 0
    for sequence in batch[:MAX_SEQUENCES]:
        tokens += len(sequence)
        if kept and tokens > (2048 if quick else MAX_TOKENS):
            break
        kept.append(sequence)
    numbers: dict[int, int] = {}
    return [[numbers.setdefault(token, len(numbers)) for token in sequence] for sequence in kept]


class Rust:
    """The example `forward` of the Rust package, which times on request."""

    def __init__(self, model: Path, inputs: Path) -> None:
        build = ["cargo", "build", "--release", "-p", "radix_mlp", "--features", "candle", "--example", "forward"]
        subprocess.run(build, cwd=ROOT, check=True)
        command = [ROOT / "target" / "release" / "examples" / "forward", model, inputs]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, name: str, level: str) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        print(name, level, sep="\t", file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


class Transformers:
    def __init__(self, model: Path) -> None:
        torch.set_num_threads(THREADS)
        loaded = transformers.Qwen3Model.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
        self.model = loaded.train(False)

    @torch.inference_mode()
    def run(self, batch: Batch, padded: bool) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        if not padded:
            last = [self.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1] for ids in batch]
            return time.perf_counter() - start, torch.stack(last)
        lengths = torch.tensor([len(ids) for ids in batch])
        width = int(lengths.max())
        ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in batch])
        # Equal lengths need no mask, which is faster.
        mask = None if bool((lengths == width).all()) else (torch.arange(width) < lengths[:, None]).long()
        states = self.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        return time.perf_counter() - start, states[torch.arange(len(batch)), lengths - 1]


def measure(rust: Rust, reference: Transformers, name: str, batch: Batch, rounds: int) -> dict[str, Any]:
    padded = min((True, False), key=lambda padded: reference.run(batch, padded)[0])
    seconds: dict[str, list[float]] = {level: [] for level in [*LEVELS, "transformers"]}
    for level in LEVELS:
        rust.run(name, level)  # warms up
    errors = []
    for _ in tqdm(range(rounds), desc=name, leave=False):
        elapsed, embeddings = reference.run(batch, padded)
        seconds["transformers"].append(elapsed)
        for level in LEVELS:
            answer = rust.run(name, level)
            seconds[level].append(answer["seconds"])
            difference = (torch.tensor(answer["embeddings"]) - embeddings).abs().max() / embeddings.abs().max()
            errors.append(float(difference))

    def ratio(slow: str, fast: str) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)), 3)

    return {
        "batch": name,
        "sequences": len(batch),
        "tokens": answer["tokens"],
        "nodes": answer["nodes"],
        "compression": round(answer["tokens"] / answer["nodes"], 3),
        "flop_compression": round(sum(costs(batch, False)[:2]) / sum(costs(batch, True)[:2]), 3),
        "seconds": {key: round(statistics.median(values), 4) for key, values in seconds.items()},
        "mlp_speedup": ratio("none", "mlp"),
        "full_speedup": ratio("none", "full"),
        "none_over_transformers": ratio("transformers", "none"),
        "transformers_form": "padded batch" if padded else "one sequence at a time",
        "chosen": answer["chosen"],
        # Python's max would forget NaN.
        "largest_relative_difference": torch.tensor(errors).max().item(),
    }


def costs(batch: Batch, folded: bool) -> list[float]:
    """What cost.rs counts, for all layers: flops of the projections, flops of the attention, key ranges × heads."""
    fold = Fold.from_sequences(batch, salts=None if folded else range(len(batch)))
    assert fold.query_lengths is not None
    ranges = 0
    for start, end, new in zip(fold.cu_seq_lengths, fold.cu_seq_lengths[1:], fold.query_lengths, strict=False):
        old = fold.scatter_indices[start : end - new].astype(np.int64)
        ranges += 1 + int(np.count_nonzero(np.diff(old, prepend=-2) != 1)) if new else 0
    kv_heads = CONFIG.num_key_value_heads or CONFIG.num_attention_heads
    flops = linear_flops(CONFIG, fold.num_nodes), attention_flops(CONFIG, fold)
    return [*map(float, flops), float(CONFIG.num_hidden_layers * ranges * kv_heads)]


def fit(inputs: dict[str, Batch], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Least squares of relative errors over `none` and `full`, in nanoseconds; a negative constant becomes 0."""
    pairs = [(row, level) for row in rows for level in ("none", "full")]
    features = np.array([costs(inputs[row["batch"]], level == "full") for row, level in pairs])
    scaled = features / np.array([[1e9 * row["seconds"][level]] for row, level in pairs])
    positive = [0, 1, 2]
    while True:
        constants = np.zeros(3)
        constants[positive] = np.linalg.lstsq(scaled[:, positive], np.ones(len(pairs)), rcond=None)[0]
        if (constants >= 0).all():
            break
        positive = [index for index in positive if constants[index] > 0]
    names = ["ns_per_projected_flop", "ns_per_attention_flop", "ns_per_key_range_and_head"]
    return {name: float(f"{value:.3g}") for name, value in zip(names, constants, strict=True)}


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu(),
        "threads": THREADS,
        "rustc": output_of("rustc", "--version"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": output_of("git", "describe", "--always", "--dirty"),
    }


def plot(result: dict[str, Any]) -> None:
    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    x = np.arange(len(rows))
    bars = {"transformers": "none_over_transformers", "mlp": "mlp_speedup", "full": "full_speedup"}
    for index, (label, key) in enumerate(bars.items()):
        heights = [1 / row[key] if label == "transformers" else row[key] for row in rows]
        axes.bar_label(axes.bar(x + 0.27 * (index - 1), heights, 0.25, label=label), fmt="%.2f", fontsize=7)
    axes.hlines([row["compression"] for row in rows], x - 0.42, x + 0.42, "black", "dashed", label="compression N/N'")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xticks(x, [row["batch"] for row in rows], fontsize=8)
    axes.set_ylabel("speed over unfolded Rust")
    axes.set_title(f"Qwen3, 100M parameters, f32, {result['machine']['threads']} threads of {result['machine']['cpu']}")
    axes.legend()
    figure.savefig(RESULT.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(json.loads(RESULT.read_text()))
        return
    inputs = batches(arguments.quick)
    model = WORK / "model"
    torch.manual_seed(0)
    transformers.Qwen3Model(CONFIG).save_pretrained(model)
    (WORK / "batches.json").write_text(json.dumps(inputs))
    rust, reference = Rust(model, WORK / "batches.json"), Transformers(model)
    result: dict[str, Any] = {"machine": machine(), "config": CONFIG.to_diff_dict(), "rows": []}
    print(f"{'batch':20}{'fold':>7}{'mlp':>7}{'full':>7}{'none/transformers':>19}  seconds of none, chosen level")
    for name, batch in inputs.items():
        row = measure(rust, reference, name, batch, 1 if arguments.quick else ROUNDS)
        result["rows"].append(row)
        speeds = f"{row['compression']:7.2f}{row['mlp_speedup']:7.2f}{row['full_speedup']:7.2f}"
        print(f"{name:20}{speeds}{row['none_over_transformers']:19.2f}  {row['seconds']['none']}, {row['chosen']}")
    result["cost"] = fit(inputs, result["rows"])
    if not arguments.quick:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        plot(result)
    print(json.dumps(result["cost"]))


if __name__ == "__main__":
    main()
