"""How much a training step gains from the fold on a GPU: forward, loss and backward of Qwen3 in bfloat16.

Times in alternation, each way in its own steady state (steady.py), on the same weights and tokens:

- none, mlp, full: the levels of train/radix_torch_varlen.py, `none` and `mlp` with FlashAttention's varlen kernel;
- none compiled, full compiled: the same with layers by torch.compile, seven in a graph, whose modules no call checks;
- transformers padded, padding-free: its own Qwen3 as people run it, with sdpa and FlexAttention;
- transformers folded: the same model, folded by radix_mlp.transformers;
- PrefixGrouper: where it is installed, for the loss on completions, which is what it is for.

All compute the logits chunk by chunk; `none`, `mlp` and `full` add the head's gradient to where it is kept at once
(`Head.into_grad`), for a tied one would wait for the end of the step in memory that no fold lowers. "flop_compression"
is how many times fewer flops the fold leaves. "wall_ms" is the time of a step until the device is done, the fold on the
host included; labels are the data's. "peak_gib" is what a step takes beside weights and gradients. Where `none` does
not fit, layers are checkpointed, in all columns, compiled ones seven at a time.
"seconds_of_shapes" are those of the first step and of the median of 20 steps on batches of different shapes.

    python benchmark/gpu_training/measure.py --batches-file target/gpu_batches.json
    python benchmark/gpu_training/measure.py --shapes qwen3-4b --only "2 x 8 x 4096+512" --ways none full
    python benchmark/gpu_training/measure.py --smoke --out target/smoke.json    # a tiny model: does it run?
"""

import json
import random
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "train")]

from flops import flop_compression  # noqa: E402
from gpu_forward.batches import SMOKE_VOCABULARY, VOCABULARY, Batch, small  # noqa: E402
from gpu_forward.measure import allocated, medians, release, timed  # noqa: E402
from gpu_forward.models import SHAPES  # noqa: E402
from gpu_forward.record import Record, arguments  # noqa: E402
from gpu_training.report import COLUMNS  # noqa: E402
from gpu_training.steps import (  # noqa: E402
    Groups,
    Step,
    compiled,
    own_model,
    own_step,
    set_checkpointing,
    steps,
    their_model,
)
from gpu_training.targets import targets  # noqa: E402
from radix_mlp import Fold  # noqa: E402
from radix_torch_varlen import Qwen3  # noqa: E402
from steady import SPAN_SECONDS, settled, turns  # noqa: E402

RESULT = ROOT / "benchmark" / "results" / "gpu_training.json"
# Different batches, one after the other, that must cost no compilation.
SHAPES_SEEN = 20
# What --smoke divides lengths by, and how many shapes it takes.
SMOKE_SCALE, SMOKE_SHAPES = 256, 3
# In which a batch's rounds begin.
MAX_SECONDS = 20

Row = dict[str, Any]


def grouped(prompts: int, prompt: int, size: int, completion: int, seed: int = 0, *, smoke: bool = False) -> Groups:
    """Random tokens: each prompt with its completions; at `smoke` shorter ones."""
    draw = random.Random(seed)
    words = range(SMOKE_VOCABULARY if smoke else VOCABULARY)
    if smoke:
        prompt, completion = prompt // SMOKE_SCALE, completion // SMOKE_SCALE

    def tokens(count: int) -> list[int]:
        return draw.choices(words, k=count)

    prefixes = [tokens(prompt) for _ in range(prompts)]
    return Groups([prefix + tokens(completion) for prefix in prefixes for _ in range(size)], prompt, size)


def batches(file: Path | None, only: list[str] | None, *, smoke: bool) -> dict[str, Groups]:
    forms = {
        "4 x 8 x 1024+512": (4, 1024, 8, 512),
        "2 x 8 x 4096+512": (2, 4096, 8, 512),
        "16 pairs x 1024+512": (16, 1024, 2, 512),
    }
    made = {
        name: grouped(prompts, prompt, size, own, smoke=smoke) for name, (prompts, prompt, size, own) in forms.items()
    }
    turns: dict[str, Batch] = json.loads(file.read_text()) if file else {}
    # An agent's turns are trained on whole.
    made |= {
        name: Groups(small(batch) if smoke else batch) for name, batch in turns.items() if name == "tau-bench turns"
    }
    return {name: made[name] for name in only or made}


def backward(step: Step, model: nn.Module) -> Tensor:
    """One step, whose gradients are added to those that are there."""
    loss = step()
    torch.autograd.backward(loss)
    return loss.detach()


def timed_step(step: Step, model: nn.Module) -> tuple[float]:
    """Milliseconds of a step that makes its gradients, until the device is done."""
    model.zero_grad(set_to_none=True)
    _, wall = timed(partial(backward, step, model))
    return (wall,)


def fits(own: Qwen3, groups: Groups) -> bool:
    """Whether an unfolded step does."""
    try:
        backward(partial(own_step, own, groups, "none", groups.labels[False]), own)
    except torch.OutOfMemoryError:
        return False
    finally:
        own.zero_grad(set_to_none=True)
        release()
    return True


def measure(ways: dict[str, Step], own: Qwen3, groups: Groups, rounds: int, seconds: float) -> Row:
    losses, peaks, skipped = {}, {}, {}
    for name, step in list(ways.items()):
        try:
            # The first step compiles, and leaves gradients: what the second takes comes on top of them.
            backward(step, own)
            before = allocated()
            losses[name] = round(backward(step, own).item(), 5)
            peaks[name] = round((allocated(peak=True) - before) / 2**30, 3)
        except torch.OutOfMemoryError as error:
            skipped[name] = str(error).split(". ")[0]
            del ways[name]
        own.zero_grad(set_to_none=True)
        release()
    wall: dict[str, list[float]] = {name: [] for name in ways}
    for _ in turns(rounds, MAX_SECONDS):
        for name, step in ways.items():
            wall[name] += settled(partial(timed_step, step, own), seconds)
    own.zero_grad(set_to_none=True)
    fold = Fold.from_sequences(groups.sequences)
    return {
        "tokens": fold.num_tokens,
        "nodes": fold.num_nodes,
        "compression": round(fold.compression, 4),
        "checkpointing": own.checkpointing,
        "rounds": max(map(len, wall.values()), default=0),
        "span_seconds": seconds,
        "wall_ms": medians(wall),
        "speedup": {
            name: round(statistics.median(a / b for a, b in zip(wall["none"], times, strict=True)), 4)
            for name, times in wall.items()
            if "none" in wall
        },
        "peak_gib": peaks,
        "loss_value": losses,
        "skipped": skipped,
    }


def seconds_of_shapes(own: Qwen3, *, smoke: bool) -> dict[str, float]:
    """Of the first and of the median step over batches that all differ in shape, and the slowest after the first.

    Layers are checkpointed: at 4B the largest would not fit otherwise.
    """
    draw = random.Random(1)
    own.checkpointing = True
    milliseconds: list[float] = []
    for seed in range(SMOKE_SHAPES if smoke else SHAPES_SEEN):
        prompt, completion = draw.randrange(512, 1536), draw.randrange(128, 640)
        groups = grouped(draw.randrange(1, 5), prompt, draw.randrange(2, 9), completion, seed, smoke=smoke)

        milliseconds += timed_step(partial(own_step, own, groups, "full", groups.labels[False]), own)
    own.zero_grad(set_to_none=True)
    first, later = milliseconds[0], milliseconds[1:]
    slowest, median = max(later), statistics.median(milliseconds)
    return {name: round(x / 1e3, 4) for name, x in (("first", first), ("median", median), ("slowest later", slowest))}


def show(row: Row) -> None:
    print(f"\n{row['shape']}, {row['batch']}, loss on {row['loss']}: {row['tokens']} tokens, {row['nodes']} nodes")
    print(f"  {row['flop_compression']:.2f} times fewer flops")
    for name, milliseconds in row["wall_ms"].items():
        speed = f"{row['speedup'].get(name, float('nan')):7.2f} of {row['compression']:.2f}"
        print(f"  {name:26}{milliseconds:11.1f} ms{row['peak_gib'][name]:9.2f} GiB{speed}  {row['loss_value'][name]}")
    for name, reason in row["skipped"].items():
        print(f"  {name:26} {reason}")


def main() -> None:
    given = arguments(__doc__, RESULT, ["qwen3-0.6b", "qwen3-4b"], 7, ("none", *COLUMNS))
    record = Record(given.out, given.commit, ("shape", "batch", "loss"))
    seconds = 0 if given.smoke else SPAN_SECONDS
    for shape in given.shapes:
        own = own_model(shape)
        print(f"{shape}: steps on different shapes: {(seen := seconds_of_shapes(own, smoke=given.smoke))} s")
        fused, theirs = compiled(own), their_model(shape, own)
        for name, groups in tqdm(batches(given.batches_file, given.only, smoke=given.smoke).items(), desc=shape):
            set_checkpointing(own, fused, theirs, on=False)
            set_checkpointing(own, fused, theirs, on=not fits(own, groups))
            for loss in ("all", "completions") if groups.prompt else ("all",):
                ways = steps(own, fused, theirs, groups, completions_only=loss == "completions")
                chosen = {way: ways[way] for way in given.ways or ways if way in ways}
                row = {"shape": shape, "batch": name, "loss": loss, "seconds_of_shapes": seen}
                fewer = flop_compression(SHAPES[shape], groups.sequences, groups.prompt if loss == "completions" else 0)
                row["flop_compression"] = round(fewer, 4)
                record.add(row := row | measure(chosen, own, groups, given.rounds, seconds))
                show(row)
        del own, fused, theirs
        release()
        # What is compiled for one shape fits no other, and counts against how much Dynamo keeps.
        torch.compiler.reset()
    record.conclude(targets(record.result["rows"]))


if __name__ == "__main__":
    main()
