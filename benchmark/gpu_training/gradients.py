"""How far gradients in bfloat16 are from those in float32: of an unfolded training step and of a folded one.

The same weights, which bfloat16 holds, and the same batch: `none` with FlashAttention, `full` with what attention
picks, and in float32 the unfolded step by the tree kernel. "error" is the distance of all gradients from the reference
over its length, "ratio" that of `full` over that of `none`, "worst_ratio" the largest of any parameter's.

    python benchmark/gpu_training/gradients.py
    python benchmark/gpu_training/gradients.py --smoke --out target/smoke.json    # a tiny model: does it run?
"""

import copy
import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "train")]

from gpu_forward.measure import DEVICE, release  # noqa: E402
from gpu_forward.record import Record, arguments  # noqa: E402
from gpu_training.measure import grouped  # noqa: E402
from gpu_training.steps import Groups, own_model  # noqa: E402
from gpu_training.targets import gradient_targets  # noqa: E402
from radix_mlp.torch.dispatch import Backend  # noqa: E402
from radix_torch_varlen import Batch, Level, Qwen3  # noqa: E402

RESULT = ROOT / "benchmark" / "results" / "gpu_gradients.json"
# Prompts, tokens of each, completions of each prompt, tokens of each: what float32 without folds has memory for.
FORMS = {
    "2 x 8 x 1024+128": (2, 1024, 8, 128),
    "4 x 8 x 256+256": (4, 256, 8, 256),
    "16 pairs x 512+128": (16, 512, 2, 128),
}
# Without a GPU there is no FlashAttention.
UNFOLDED: Backend = "query_folded" if DEVICE.type == "cuda" else "sequential"
REFERENCE: Backend = "tree" if DEVICE.type == "cuda" else "sequential"

Gradients = dict[str, Tensor]


def gradients(model: Qwen3, groups: Groups, level: Level, backend: Backend | None) -> Gradients:
    """Of one step, in float32."""
    model.backend, model.head_into_grad = backend, False
    model.loss(Batch.from_sequences(groups.arrays, level, DEVICE)).backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    release()
    return found


def squares(found: Gradients, reference: Gradients) -> dict[str, float]:
    """The squared distance of each parameter's gradient."""
    return {name: (found[name] - reference[name]).double().square().sum().item() for name in reference}


def measure(model: Qwen3, precise: Qwen3, groups: Groups) -> dict[str, Any]:
    reference = gradients(precise, groups, "none", REFERENCE)
    none = squares(gradients(model, groups, "none", UNFOLDED), reference)
    full = squares(gradients(model, groups, "full", None), reference)
    length = sum(gradient.double().square().sum().item() for gradient in reference.values())
    errors = {level: (sum(own.values()) / length) ** 0.5 for level, own in (("none", none), ("full", full))}
    return {
        "tokens": len(groups.labels[False]),
        "error": {level: float(f"{error:.4g}") for level, error in errors.items()},
        "ratio": round(errors["full"] / errors["none"], 4),
        "worst_ratio": round(max(full[name] / none[name] for name in reference) ** 0.5, 4),
    }


def main() -> None:
    given = arguments(__doc__, RESULT, ["qwen3-0.6b"], 1)
    record = Record(given.out, given.commit, ("shape", "batch"))
    for shape in given.shapes:
        model = own_model(shape)
        precise = copy.deepcopy(model).float()
        for name in tqdm(given.only or FORMS, desc=shape):
            row = {"shape": shape, "batch": name} | measure(model, precise, grouped(*FORMS[name], smoke=given.smoke))
            record.add(row)
            print(row)
    record.conclude(gradient_targets(record.result["rows"]))


if __name__ == "__main__":
    main()
