"""How much transformers' Qwen3 gains from the fold on a GPU, in bfloat16 and last-token pooled.

Times in alternation, each column in its own steady state (steady.py), on the same weights and token ids, which start on
the CPU as a tokenizer gives them:

- padded: the model as it is (sdpa, one batch padded on the right);
- none, mlp, full: the levels of radix_mlp.transformers.fold, `none` with FlashAttention's varlen kernel;
- none graphs, full graphs: the same as CUDA graphs, for batches of which they compute few enough rows, and all with
  the tree kernel, which on unshared sequences is the faster one too;
- padded compiled, none compiled, full compiled: with layers by torch.compile, which fuses what lies between products
  and attention; as CUDA graphs too where `none` or `full` can be;
- unshared: `none` on a batch of as many random tokens as the fold leaves, in sequences of similar lengths, where
  these are fewer than SMALL. It alternates with the folded ways alone ("beside_unshared"), which gives it more rounds
  than beside columns that take a hundred times as long.

"device_ms" is the time between two CUDA events around the call, "wall_ms" that until the device is done; the fold on
the host lies within both. "peak_gib" is what the first call allocates beside the weights, its output included.
"flips" counts decisions that differ, "flop_compression" is how many times fewer flops the fold leaves, "unshared_flops"
how many the unshared batch takes for each that it leaves.

    python benchmark/gpu_forward/measure.py --batches-file target/gpu_batches.json
    python benchmark/gpu_forward/measure.py --shapes qwen3-4b --only rerank "nothing shared"
    python benchmark/gpu_forward/measure.py --shapes qwen3-8b --only "256 x 2048+16" --ways none full "full graphs"
    python benchmark/gpu_forward/measure.py --smoke --out target/smoke.json    # a tiny model: does it run?
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen3Config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))

from flops import flop_compression, forward_flops  # noqa: E402
from gpu_forward.batches import Batch, load, unshared  # noqa: E402
from gpu_forward.flips import flips  # noqa: E402
from gpu_forward.models import SHAPES, padded, random_model, twin  # noqa: E402
from gpu_forward.record import Record, arguments  # noqa: E402
from gpu_forward.targets import FOLDED, UNFOLDED, UNSHARED, targets  # noqa: E402
from radix_mlp import Fold  # noqa: E402
from radix_mlp.torch import pick_backend  # noqa: E402
from radix_mlp.transformers import UnsupportedModelError, fold  # noqa: E402
from steady import SPAN_SECONDS, settled, turns  # noqa: E402

RESULT = ROOT / "benchmark" / "results" / "gpu_forward.json"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Without a GPU there is nothing to time: a smoke test compiles what it can within seconds.
COMPILER = "inductor" if torch.cuda.is_available() else "aot_eager"
# Below so many unique tokens, weights and launches bind the GPU: `full` is held to an unshared batch instead.
SMALL = 8000
# In which a batch's rounds begin.
MAX_SECONDS = 10
WAYS = ("mlp", *UNFOLDED, *FOLDED, *UNSHARED)
# Columns without graphs of their own kind to be held against.
OVER_NONE = ("padded", "mlp", "full", "padded compiled", "none compiled", "full compiled")

Call = Callable[[], Tensor]


class Column:
    """One way to compute the last tokens' states of a batch, [sequences, hidden]."""

    def __init__(
        self, model: PreTrainedModel, batch: Batch, level: Any = None, *, graphs: bool = False, compiled: bool = False
    ) -> None:
        """At `level` None the model as it is."""
        self.folded = level is not None
        backend: Any = "query_folded" if level == "none" and not graphs and DEVICE.type == "cuda" else None
        self.model = twin(model) if self.folded or compiled else model
        if self.folded:
            fold(self.model, level=level, backend=backend, cuda_graphs=graphs)
        if compiled:
            layers: Any = self.model.layers
            compile_layers(layers)
        self.ids, self.mask = padded(batch)
        self.last = torch.arange(len(batch), device=DEVICE), (self.mask.sum(1) - 1).to(DEVICE)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        # A folded model reads the ids on the host.
        ids, mask = (self.ids, self.mask) if self.folded else (self.ids.to(DEVICE), self.mask.to(DEVICE))
        states: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return states[self.last]


def compile_layers(layers: nn.ModuleList, options: dict[str, Any] | None = None) -> None:
    """By torch.compile, for all shapes at once: other models of the same sizes find what one compiled.

    Not all of the model: transformers makes no mask where nothing is padded, but does where it is compiled.
    """
    for layer in layers:
        layer.compile(dynamic=True, backend=COMPILER, options=options)


def columns(model: PreTrainedModel, batch: Batch, folded: Fold) -> dict[str, Call]:
    calls: dict[str, Call] = {"padded": Column(model, batch)}
    calls |= {level: Column(model, batch, level) for level in ("none", "mlp", "full")}
    if takes_graph(folded.num_tokens):
        calls["none graphs"] = Column(model, batch, "none", graphs=True)
    if takes_graph(folded.num_nodes):
        calls["full graphs"] = Column(model, batch, "full", graphs=True)
    calls["padded compiled"] = Column(model, batch, compiled=True)
    for level, rows in (("none", folded.num_tokens), ("full", folded.num_nodes)):
        calls[f"{level} compiled"] = Column(model, batch, level, graphs=takes_graph(rows), compiled=True)
    if has_unshared(folded):
        same = unshared(batch, folded.num_nodes)
        calls["unshared"] = Column(model, same, "none")
        graphs = takes_graph(folded.num_nodes)
        if graphs:
            calls["unshared graphs"] = Column(model, same, "none", graphs=True)
        calls["unshared compiled"] = Column(model, same, "none", graphs=graphs, compiled=True)
    return calls


def takes_graph(rows: int) -> bool:
    if DEVICE.type != "cuda":
        return False
    from radix_mlp.transformers.graphs import MAX_ROWS

    return rows <= MAX_ROWS


def warm_up(calls: dict[str, Call]) -> tuple[dict[str, float], dict[str, str], dict[str, Tensor]]:
    """Of each column its peak memory in GiB and its states; of those that cannot run the reason, and they go."""
    peaks, skipped, states = {}, {}, {}
    for name, call in list(calls.items()):
        try:
            before = allocated()
            states[name] = call().float().cpu()
            peaks[name] = round((allocated(peak=True) - before) / 2**30, 3)
        except (torch.OutOfMemoryError, UnsupportedModelError) as error:
            skipped[name] = str(error).split(". ")[0]
            del calls[name]
            release()
    return peaks, skipped, states


def allocated(*, peak: bool = False) -> int:
    """Bytes of the GPU: those in use, or the most since this was last asked for; 0 on the CPU."""
    if DEVICE.type != "cuda":
        return 0
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most if peak else torch.cuda.memory_allocated()


def release() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def timed(call: Call) -> tuple[float, float]:
    """Milliseconds between two events around the call, and until the device is done."""
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        call()
        return (1e3 * (time.perf_counter() - start),) * 2
    begin, end = event(), event()
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), 1e3 * (time.perf_counter() - start)


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def measure(
    model: PreTrainedModel, batch: Batch, rounds: int, seconds: float, ways: list[str] | None
) -> dict[str, Any]:
    """A row's times, of all columns or of these `ways` alone."""
    folded = Fold.from_sequences(batch, layout="depth_first")
    calls = columns(model, batch, folded)
    calls = {name: calls[name] for name in ways or calls if name in calls}
    peaks, skipped, states = warm_up(calls)
    times = alternate({name: call for name, call in calls.items() if name not in UNSHARED}, rounds, seconds)
    row = {
        "sequences": folded.num_sequences,
        "tokens": folded.num_tokens,
        "nodes": folded.num_nodes,
        "compression": round(folded.compression, 4),
        "backend": backend(model, folded),
        "fold_ms": round(fold_ms(batch), 4),
        **told(times),
        "span_seconds": seconds,
        "peak_gib": peaks,
        "skipped": skipped,
        "difference": differences(states),
    }
    if calls.keys() & set(UNSHARED):
        small = {name: calls[name] for name in (*FOLDED, *UNSHARED) if name in calls}
        row["beside_unshared"] = told(alternate(small, rounds, seconds))
    return row


Times = dict[str, dict[str, list[float]]]


def alternate(calls: dict[str, Call], rounds: int, seconds: float) -> Times:
    """Milliseconds of each call in each round by "device" and by "wall" clock; every other round goes backwards.

    In a round a call is repeated until spans of so many seconds agree.
    """
    times: Times = {clock: {name: [] for name in calls} for clock in ("device", "wall")}
    order = list(calls)
    for _ in turns(rounds, MAX_SECONDS):
        for name in order:
            by_clock = settled(partial(timed, calls[name]), seconds)
            for clock, milliseconds in zip(times, by_clock, strict=True):
                times[clock][name].append(milliseconds)
        order.reverse()
    return times


def told(times: Times) -> dict[str, Any]:
    """What a row tells of times."""
    return {
        "rounds": min(map(len, times["wall"].values()), default=0),
        **{f"{clock}_ms": medians(times[clock]) for clock in times},
        "speedup": {clock: speedups(times[clock]) for clock in times},
    }


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def speedups(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of how often faster a column is than `none`, or than the unshared batch's.

    Columns of graphs are held against graphs where there are any.
    """

    def ratio(slow: str, fast: str) -> float:
        pairs = zip(times[slow], times[fast], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 4)

    over_none = [name for name in OVER_NONE if {name, "none"} <= times.keys()]
    result = {name: ratio("none", name) for name in over_none}
    graphs = "none graphs" if "none graphs" in times else "none"
    if {"full graphs", graphs} <= times.keys():
        result["full graphs"] = ratio(graphs, "full graphs")
    for name in FOLDED:
        same = name.replace("full", "unshared")
        if {name, same} <= times.keys():
            result[f"{name} over unshared"] = ratio(same, name)
    return result


def flops(config: Qwen3Config, batch: Batch) -> dict[str, float]:
    """What stands beside a row's times."""
    folded = Fold.from_sequences(batch)
    found = {"flop_compression": round(flop_compression(config, batch, None), 4)}
    if has_unshared(folded):
        same = Fold.from_sequences(unshared(batch, folded.num_nodes))
        found["unshared_flops"] = round(forward_flops(config, same) / forward_flops(config, folded), 4)
    return found


def has_unshared(folded: Fold) -> bool:
    """Whether the batch is held to one of as many unshared tokens."""
    return folded.num_nodes < SMALL and folded.num_nodes < folded.num_tokens


def fold_ms(batch: Batch) -> float:
    """The fold alone, on the host: what a call does before it computes anything."""
    ids, mask = padded(batch)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        Fold.from_padded(ids, mask, layout="depth_first")
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def backend(model: PreTrainedModel, rows: Fold) -> str:
    """The attention that `full` picks for this batch."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    one = torch.empty(1, 1, config.head_dim, dtype=model.dtype, device=DEVICE)
    q, k = (one.expand(rows.num_rows, count, -1) for count in (heads, kv_heads))
    return pick_backend(q, k, k, rows)


def differences(states: dict[str, Tensor]) -> dict[str, float]:
    """Of the last tokens' states from those of `none`, in norm."""
    if "none" not in states:
        return {}
    truth = states["none"]
    others = {name: x for name, x in states.items() if name != "none" and not name.startswith("unshared")}
    return {name: float(f"{(x - truth).norm() / truth.norm():.2e}") for name, x in others.items()}


def show(row: dict[str, Any]) -> None:
    print(f"\n{row['shape']}, {row['batch']}: {row['tokens']} tokens, {row['nodes']} nodes, {row['rounds']} rounds")
    for name, milliseconds in row["wall_ms"].items():
        speed = row["speedup"]["wall"].get(name)
        shown = f"{speed:8.2f} of {row['compression']:.2f}" if speed else ""
        print(f"  {name:16}{milliseconds:11.3f} ms{row['peak_gib'][name]:9.2f} GiB{shown}")
    for name, milliseconds in row.get("beside_unshared", {"wall_ms": {}})["wall_ms"].items():
        print(f"  {name:16}{milliseconds:11.3f} ms beside the unshared batch")
    for name, reason in row["skipped"].items():
        print(f"  {name:16} {reason}")
    print(f"  {json.dumps({key: row[key] for key in ('backend', 'fold_ms', 'difference', 'flips') if key in row})}")


def main() -> None:
    given = arguments(__doc__, RESULT, ["qwen3-0.6b", "qwen3-4b", "qwen3-8b"], 11, WAYS)
    record = Record(given.out, given.commit, ("shape", "batch"))
    batches = load(given.batches_file, given.only, smoke=given.smoke)
    seconds = 0 if given.smoke else SPAN_SECONDS
    for shape in given.shapes:
        model = random_model(shape, DEVICE)
        for name in tqdm(batches, desc=shape):
            times = measure(model, batches[name], given.rounds, seconds, given.ways)
            row = {"shape": shape, "batch": name} | times
            row |= flops(SHAPES[shape], batches[name])
            release()
            if shape in ("tiny", "qwen3-0.6b"):
                row["flips"] = flips(model, batches[name], pairs=name == "rerank")
                release()
            record.add(row)
            show(row)
        del model
        release()
        # What is compiled for one shape fits no other, and counts against how much Dynamo keeps.
        torch.compiler.reset()
    record.conclude(targets(record.result["rows"]))


if __name__ == "__main__":
    main()
