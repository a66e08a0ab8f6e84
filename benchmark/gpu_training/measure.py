"""How much a training step gains from the fold on a GPU: forward, loss and backward of Qwen3 in bfloat16.

Times in alternation, on the same weights and tokens:

- none, mlp, full: the levels of train/radix_torch_varlen.py, `none` and `mlp` with FlashAttention's varlen kernel;
- transformers: its own Qwen3 on the padded batch, as people run it (sdpa);
- transformers folded: the same model, folded by radix_mlp.transformers.

"wall_ms" is the time of a step until the device is done, the fold on the host included. "peak_gib" is what a step takes
beside weights and gradients. "compiles" times the first step and the median of 20 steps on batches of different shapes.

    python benchmark/gpu_training/measure.py --batches-file target/gpu_batches.json
    python benchmark/gpu_training/measure.py --smoke --out target/smoke.json    # a tiny model: does it run?
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "train")]

from gpu_forward.batches import VOCABULARY, Batch  # noqa: E402
from gpu_forward.measure import DEVICE, allocated, release, timed  # noqa: E402
from gpu_forward.models import SHAPES, padded, twin  # noqa: E402
from gpu_forward.record import Record, arguments  # noqa: E402
from radix_mlp import Fold  # noqa: E402
from radix_mlp.transformers import fold  # noqa: E402
from radix_torch_varlen import Batch as Folded  # noqa: E402
from radix_torch_varlen import Level, Qwen3, Qwen3Config  # noqa: E402

RESULT = ROOT / "benchmark" / "results" / "gpu_training.json"
IGNORED = -100
# Different batches, one after the other, that must cost no compilation.
SHAPES_SEEN = 20

Step = Callable[[], Tensor]


def groups(prompts: int, prompt: int, completions: int, completion: int, seed: int = 0) -> Batch:
    """Random tokens: each prompt with its completions."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return draw.choices(range(VOCABULARY), k=count)

    prefixes = [tokens(prompt) for _ in range(prompts)]
    return [prefix + tokens(completion) for prefix in prefixes for _ in range(completions)]


def batches(file: Path | None, *, smoke: bool) -> dict[str, tuple[Batch, int]]:
    """Each batch with the number of its prompts' tokens, which the loss on completions leaves out."""
    scale = 64 if smoke else 1
    forms = {
        "4 x 8 x 1024+512": (4, 1024, 8, 512),
        "2 x 8 x 4096+512": (2, 4096, 8, 512),
        "16 pairs x 1024+512": (16, 1024, 2, 512),
    }
    made = {
        name: (groups(prompts, prompt // scale, count, own // scale), prompt // scale)
        for name, (prompts, prompt, count, own) in forms.items()
    }
    turns: dict[str, Batch] = json.loads(file.read_text()) if file else {}
    # An agent's turns are trained on whole.
    return made | {name: (batch, 0) for name, batch in turns.items() if name == "tau-bench turns"}


def own_model(shape: str) -> Qwen3:
    """The readable model at the sizes of transformers' configuration, with random weights."""
    config = SHAPES[shape]
    names = set(Qwen3Config.__dataclass_fields__) - {"windows"}
    torch.manual_seed(0)
    with DEVICE:
        model = Qwen3(Qwen3Config(**{name: getattr(config, name) for name in names}))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=config.initializer_range)
    return model.bfloat16()


def their_model(shape: str, own: Qwen3) -> Any:
    """transformers' model with the same weights in memory."""
    make: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = make(SHAPES[shape], dtype=torch.bfloat16, attn_implementation="sdpa")
    weights = {name if name.startswith("lm_head") else f"model.{name}": x for name, x in own.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    # What has no weights was not loaded: the rotary frequencies.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(SHAPES[shape]).to(DEVICE)
    return model.train()


def columns(own: Qwen3, theirs: Any, batch: Batch, prompt: int, *, completions_only: bool) -> dict[str, Step]:
    skipped = prompt if completions_only else 0
    flash: Any = "query_folded" if DEVICE.type == "cuda" else None

    def own_step(level: Level) -> Tensor:
        own.backend = None if level == "full" else flash
        folded = Folded.from_sequences(batch, level, DEVICE)
        if skipped:
            prompts = torch.cat([torch.arange(len(ids)) < skipped - 1 for ids in batch]).to(DEVICE)
            folded = replace(folded, labels=folded.labels.masked_fill(prompts, IGNORED))
        return own.loss(folded)

    ids, mask = padded(batch)
    labels = ids.masked_fill((mask == 0) | (torch.arange(ids.shape[1]) < skipped), IGNORED)
    on_device = [x.to(DEVICE) for x in (ids, mask, labels)]
    folded_model = fold(twin(theirs))

    def their_step(model: Any) -> Tensor:
        # A folded model reads the ids on the host.
        call = (ids, mask, labels) if model is folded_model else on_device
        loss: Tensor = model(input_ids=call[0], attention_mask=call[1], labels=call[2], use_cache=False).loss
        return loss

    steps: dict[str, Step] = {
        "none": lambda: own_step("none"),
        "mlp": lambda: own_step("mlp"),
        "full": lambda: own_step("full"),
        "transformers": lambda: their_step(theirs),
        "transformers folded": lambda: their_step(folded_model),
    }
    return steps


def backward(step: Step, model: nn.Module) -> Tensor:
    """One step; gradients go again, so that each makes its own."""
    loss = step()
    torch.autograd.backward(loss)
    model.zero_grad(set_to_none=True)
    return loss.detach()


def measure(
    own: Qwen3, theirs: Any, batch: Batch, prompt: int, rounds: int, *, completions_only: bool
) -> dict[str, Any]:
    steps = columns(own, theirs, batch, prompt, completions_only=completions_only)
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in own.parameters())
    losses, peaks, skipped = {}, {}, {}
    for name, step in list(steps.items()):
        try:
            before = allocated()
            losses[name] = round(backward(step, own).item(), 5)
            peaks[name] = round((allocated(peak=True) - before - gradients) / 2**30, 3)
        except torch.OutOfMemoryError as error:
            skipped[name] = str(error).split(". ")[0]
            del steps[name]
            own.zero_grad(set_to_none=True)
            release()
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            wall[name].append(timed(partial(backward, step, own))[1])
    folded = Fold.from_sequences(batch)
    ratios = {
        name: round(statistics.median(a / b for a, b in zip(wall["none"], times, strict=True)), 4)
        for name, times in wall.items()
        if "none" in wall
    }
    return {
        "tokens": folded.num_tokens,
        "nodes": folded.num_nodes,
        "compression": round(folded.compression, 4),
        "wall_ms": {name: round(statistics.median(times), 3) for name, times in wall.items()},
        "speedup": ratios,
        "peak_gib": peaks,
        "loss_value": losses,
        "skipped": skipped,
    }


def loss_of(own: Qwen3, batch: Batch) -> Tensor:
    return own.loss(Folded.from_sequences(batch, "full", DEVICE))


def compiles(own: Qwen3, *, smoke: bool) -> dict[str, float]:
    """Seconds of the first and of the median step over batches that all differ in shape."""
    scale = 64 if smoke else 1
    draw = random.Random(1)
    own.backend = None
    seconds = []
    for seed in range(SHAPES_SEEN):
        prompt, completion = draw.randrange(512, 1536) // scale, draw.randrange(128, 640) // scale
        batch = groups(draw.randrange(1, 5), prompt, draw.randrange(2, 9), completion, seed)
        start = time.perf_counter()
        backward(partial(loss_of, own, batch), own)
        allocated()
        seconds.append(time.perf_counter() - start)
    return {
        "first": round(seconds[0], 3),
        "median": round(statistics.median(seconds), 4),
        "worst_later": max(seconds[1:]),
    }


def main() -> None:
    given = arguments(__doc__, RESULT, ["qwen3-0.6b", "qwen3-4b"], 7)
    record = Record(given.out, given.commit, ("shape", "batch", "loss"))
    for shape in given.shapes:
        own = own_model(shape)
        print(f"{shape}: steps on {SHAPES_SEEN} shapes, seconds: {(seen := compiles(own, smoke=given.smoke))}")
        theirs = their_model(shape, own)
        for name, (batch, prompt) in tqdm(batches(given.batches_file, smoke=given.smoke).items(), desc=shape):
            for loss in ("all", "completions") if prompt else ("all",):
                only = loss == "completions"
                row = measure(own, theirs, batch, prompt, given.rounds, completions_only=only)
                record.add({"shape": shape, "batch": name, "loss": loss, "seconds_of_shapes": seen, **row})
                print(f"\n{shape}, {name}, loss on {loss}: {json.dumps(row, indent=1)}")
        del own, theirs
        release()


if __name__ == "__main__":
    main()
