"""How fast the CUDA kernels and the Rust model on them are on a GPU, against torch on the same one.

Two programs of `make cuda-bundle` time what is ours, on request and in turn with torch, so that both meet the same
state of the GPU. A time is that of several calls enqueued together, until the device is done, over their number.

- rows: rows by index; ours, candle's index_select, torch's; "copy" is a device-to-device copy of as many bytes;
- attention: of one layer in bfloat16; our tree kernel on every copy ("ours none") and on the folded batch ("ours
  full"), FlashAttention-2 on every copy ("flash none") and query-folded ("flash full"), FlexAttention ("flex") with
  prepared block lists;
- model: last-token states of a Qwen3 of random weights, tokens to result, each way in its own steady state; the Rust
  model at each level, "enqueued" is when all kernels of `full` were launched; "torch none" is the model of train/,
  compiled, with FlashAttention. "mhz" is the clock that the GPU had at each way, and
  "rested_ms" the time of single steps on a GPU that rested before each.

    make cuda-bundle    # where there is no GPU
    python benchmark/gpu_kernels/measure.py --bundle target/cuda-bundle --batches-file target/gpu_batches.json
    python benchmark/gpu_kernels/measure.py --bundle target/cuda-bundle --parts rows attention
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "train"), str(ROOT / "kernels")]

from bundle import refuse_other_sources  # noqa: E402
from flops import flop_compression  # noqa: E402
from gpu_attention.measure import HEAD_DIM, HEADS, attend, fold, inputs  # noqa: E402
from gpu_forward.batches import Batch, load  # noqa: E402
from gpu_forward.models import SHAPES  # noqa: E402
from gpu_forward.record import Record  # noqa: E402
from gpu_kernels.targets import targets  # noqa: E402
from gpu_training.steps import own_model  # noqa: E402
from machine import output_of  # noqa: E402
from radix_torch_varlen import Batch as TorchBatch  # noqa: E402
from steady import REST_SECONDS, SPAN_SECONDS, clock_rates, rested, settled, turns  # noqa: E402

RESULT = ROOT / "benchmark" / "results" / "gpu_kernels.json"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# https://crates.io/crates/candle-index-select-cu: shape of the rows, number of ids.
ROWS = [
    ([100, 128], 200),
    ([16_000, 1024], 12_000),
    ([16_000, 1024], 70_000),
    ([100_000, 2048], 500_000),
    ([2000, 64, 256], 10_000),
]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CAUSAL = "16 x 4096, nothing shared"
LEVELS = ("none", "mlp", "full")
LONG_ENOUGH_SECONDS = 0.02
MOST_CALLS = 200
# In which a row's rounds begin.
MAX_SECONDS = 10

Row = dict[str, Any]


class Program:
    """A program of the bundle that answers a line with a line of JSON."""

    def __init__(self, *command: str | Path) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line: str) -> Row:
        assert self.process.stdin
        assert self.process.stdout
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()} on {line!r}")
        found: Row = json.loads(answer)
        return found

    def milliseconds(self, **request: Any) -> float:
        return float(self.ask(json.dumps(request))["ms"])

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], object]) -> float:
    """As the Rust program measures: of calls enqueued together, after two."""

    def together(calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        return time.perf_counter() - start

    together(1)
    calls = min(max(int(LONG_ENOUGH_SECONDS / together(1)), 1), MOST_CALLS)
    return 1e3 * together(calls) / calls


def in_turn(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians over the rounds, in each of which every way is measured once."""
    times = [{way: call() for way, call in ways.items()} for _ in turns(rounds, MAX_SECONDS)]
    return {way: round(statistics.median(one[way] for one in times), 5) for way in ways}


def row_of_rows(program: Program, shape: list[int], ids: int, dtype: str, rounds: int) -> Row:
    x = torch.ones(shape, dtype=DTYPES[dtype], device=DEVICE)
    index = torch.randint(shape[0], (ids,), device=DEVICE)
    size = ids * x[0].numel() * x.element_size()
    # As many bytes, from one place to another.
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)

    def ours(way: str) -> Callable[[], float]:
        return lambda: program.milliseconds(op="rows", way=way, shape=shape, ids=ids, dtype=dtype)

    ways = {
        "ours": ours("ours"),
        "candle": ours("candle"),
        "torch": lambda: milliseconds(lambda: x.index_select(0, index)),
        "copy": lambda: milliseconds(lambda: target.copy_(source)),
    }
    name = f"{shape} → {ids}, {dtype}"
    return {"part": "rows", "name": name, "shape": "", "output_bytes": size, "ms": in_turn(ways, rounds)}


@torch.no_grad()
def row_of_attention(program: Program, name: str, batch: Batch, heads: int, kv_heads: int, rounds: int) -> Row:
    def ours(level: str) -> Callable[[], float]:
        request = {"batch": name, "level": level, "heads": heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM}
        return lambda: program.milliseconds(op="attention", **request)

    def theirs(method: str) -> Callable[[], float]:
        folded = fold(batch, method)
        qkv = [x.detach() for x in inputs(folded, heads, kv_heads)]
        call = attend(method, folded)
        return lambda: milliseconds(lambda: call(*qkv))

    shared = fold(batch, "tree")
    ways = {"ours none": ours("none"), "flash none": theirs("none")}
    if shared.compression > 1:
        full = {"ours full": ours("full"), "flash full": theirs("query_folded"), "flex": theirs("flex")}
        ways |= full
    return {
        "part": "attention",
        "name": name,
        "shape": f"{heads}/{kv_heads}",
        "tokens": shared.num_tokens,
        "nodes": shared.num_nodes,
        "compression": round(shared.compression, 4),
        # Two products of two operations for each query head and each pair that causality leaves.
        "flops none": 4 * heads * HEAD_DIM * sum(len(own) * (len(own) + 1) // 2 for own in batch),
        "ms": in_turn(ways, rounds),
    }


@torch.inference_mode()
def rows_of_model(
    bundle: Path, shape: str, batches: dict[str, Batch], file: Path, rounds: int, seconds: float
) -> Iterator[Row]:
    """The Rust process and torch's model share the GPU's memory: both keep their weights on it."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(SHAPES[shape].to_dict()))
        with Program(bundle / "forward", directory, file, "cuda") as program:
            model = own_model(shape)
            model.backend = "query_folded" if DEVICE.type == "cuda" else None
            compiled = torch.compile(model, dynamic=True) if DEVICE.type == "cuda" else model
            for name, batch in batches.items():
                yield row_of_model(program, compiled, shape, name, batch, rounds, seconds)


def row_of_model(
    program: Program, compiled: Any, shape: str, name: str, batch: Batch, rounds: int, seconds: float
) -> Row:
    answers: dict[str, Row] = {}
    mhz: dict[str, list[int]] = {}
    steps = steps_of_model(program, compiled, name, batch, answers)

    def steady(way: str) -> float:
        with clock_rates() as rates:
            (milliseconds,) = settled(lambda: (steps[way](),), seconds)
        # The later half, at least, is of spans that agree.
        mhz.setdefault(way, []).extend(rates[len(rates) // 2 :])
        return milliseconds

    times = in_turn({way: partial(steady, way) for way in steps}, rounds)
    alone = {way: round(rested(steps[way], min(seconds, REST_SECONDS)), 5) for way in ("none", "full")}
    full = answers["full"]
    return {
        "part": "model",
        "name": name,
        "shape": shape,
        "tokens": full["tokens"],
        "nodes": full["nodes"],
        "compression": round(full["tokens"] / full["nodes"], 4),
        "flop_compression": round(flop_compression(SHAPES[shape], batch, None), 4),
        "ms": times | {"enqueued": round(1e3 * full["enqueued_seconds"], 4)},
        "rested_ms": alone,
        "span_seconds": seconds,
        "mhz": {way: round(statistics.median(rates)) for way, rates in mhz.items() if rates},
        "limits": limits(),
    }


def steps_of_model(
    program: Program, compiled: Any, name: str, batch: Batch, answers: dict[str, Row]
) -> dict[str, Callable[[], float]]:
    """Each way, which returns its milliseconds; those of the Rust model leave their last answer in `answers`.

    torch's is left out where it does not fit beside what the Rust process keeps of its largest batch.
    """

    def ours(level: str) -> float:
        answers[level] = program.ask(f"{name}\t{level}")
        return 1e3 * float(answers[level]["seconds"])

    def theirs() -> float:
        synchronize()
        start = time.perf_counter()
        packed = TorchBatch.from_sequences(batch, level="none", device=DEVICE)
        ends = torch.tensor([len(own) for own in batch], device=DEVICE).cumsum(0) - 1
        compiled(packed)[ends].float().cpu()
        return 1e3 * (time.perf_counter() - start)

    steps: dict[str, Callable[[], float]] = {level: partial(ours, level) for level in LEVELS}
    ours("none")
    try:
        theirs()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return steps
    return steps | {"torch none": theirs}


def limits() -> dict[str, float]:
    """What bounds the GPU's clock: its power limit in watts, and the highest clock in MHz."""
    if DEVICE.type != "cuda":
        return {}
    query = "--query-gpu=enforced.power.limit,clocks.max.sm"
    watts, mhz = output_of("nvidia-smi", query, "--format=csv,noheader,nounits").split(", ")
    return {"watts": float(watts), "mhz": float(mhz)}


def causal(scale: int) -> Batch:
    """16 sequences of 4096 tokens that share nothing: their first tokens differ."""
    length = 4096 // scale
    return [[first] + [0] * (length - 1) for first in range(16)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="the folder that `make cuda-bundle` makes")
    parser.add_argument("--parts", nargs="+", choices=["rows", "attention", "model"], help="default: all of them")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-0.6b", "qwen3-4b", "qwen3-8b"])
    parser.add_argument("--batches-file", type=Path, help="what gpu_forward/batches.py wrote; none: the synthetic ones")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the batches to run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT, help="keeps the other rows of the file")
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--smoke", action="store_true", help="small batches, one round")
    given = parser.parse_args()
    if given.smoke:
        given.shapes, given.rounds = ["tiny"], 1
        if given.out == RESULT:
            parser.error("--smoke measures nothing: name another file with --out")
    return given


def main() -> None:
    given = parse()
    refuse_other_sources(given.bundle)
    record = Record(given.out, given.commit, ("part", "name", "shape"))
    parts = given.parts or ["rows", "attention", "model"]
    batches = load(given.batches_file, given.only, smoke=given.smoke)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "batches.json"
        file.write_text(json.dumps(batches | {CAUSAL: causal(64 if given.smoke else 1)}))
        with Program(given.bundle / "measure", file) as program:
            if "rows" in parts:
                cases = [(shape, ids, dtype) for shape, ids in ROWS for dtype in DTYPES]
                for shape, ids, dtype in tqdm(cases[:1] if given.smoke else cases, desc="rows"):
                    record.add(row_of_rows(program, shape, ids, dtype, given.rounds))
            if "attention" in parts:
                every = {CAUSAL: causal(64 if given.smoke else 1)} | batches
                for heads, kv_heads in HEADS[:1] if given.smoke else HEADS:
                    for name in tqdm(every, desc=f"attention, {heads}/{kv_heads}"):
                        record.add(row_of_attention(program, name, every[name], heads, kv_heads, given.rounds))
        seconds = 0 if given.smoke else SPAN_SECONDS
        for shape in given.shapes if "model" in parts else []:
            rows = rows_of_model(given.bundle, shape, batches, file, given.rounds, seconds)
            for row in tqdm(rows, desc=shape, total=len(batches)):
                record.add(row)
    for row in record.result["rows"]:
        print(f"{row['part']:10}{row['shape']:12}{row['name']:40}{row['ms']}")
    record.conclude(targets(record.result["rows"]))


if __name__ == "__main__":
    main()
