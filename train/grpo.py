"""GRPO with TRL, unfolded and folded: the same trainer, the same recorded completions, the same curves.

TRL's GRPOTrainer is used as it is; folding is the one line `fold(model)`. Instead of sampling, the trainer is given
the eight completions of each prompt that ../shared/data has, with their correctness as reward, so that both runs train
on the same tokens. The model is a small random Qwen3.

    python train/grpo.py            # some minutes; rewrites results/grpo.json and the plot
    python train/grpo.py --steps 4  # is everything there?
"""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from radix_mlp.transformers import fold

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULT = Path(__file__).parent / "results" / "grpo.json"
STEPS, COMPLETIONS, MAX_TOKENS, VOCABULARY = 50, 8, 128, 1024
# Of a loss, over the largest. Sums in float32 round to 6e-8, and AdamW, which divides gradients by their own size, lets
# differences grow from step to step.
TOLERANCE = 1e-3

Group = dict[str, Any]


def recorded_groups() -> list[Group]:
    """Prompts with completions of which some are right and some wrong; others have no advantage to learn from."""
    lines = (DATA / "grpo_math_qwen_8samples.dev.jsonl").read_text().splitlines()
    groups = [json.loads(line) for line in lines]
    return [group for group in groups if len(set(group["correct"])) > 1]


def tokenizer_of(groups: list[Group]) -> PreTrainedTokenizerFast:
    """Byte pairs of the groups' own texts: few, as a small model has room for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for group in groups for text in (group["prompt"], *group["completions"]))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    )


def small_model(vocabulary: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


class Replay:
    """What the trainer calls to sample: the recorded completions of each prompt, in turn."""

    def __init__(self, groups: list[Group], tokenizer: PreTrainedTokenizerFast) -> None:
        self.groups, self.tokenizer = {group["prompt"]: group for group in groups}, tokenizer

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        taken: defaultdict[str, int] = defaultdict(int)
        output: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None, "correct": []}
        for prompt in prompts:
            group, turn = self.groups[prompt], taken[prompt]
            taken[prompt] += 1
            output["prompt_ids"].append(self.tokenizer.encode(prompt))
            output["completion_ids"].append(self.tokenizer.encode(group["completions"][turn])[:MAX_TOKENS])
            output["correct"].append(group["correct"][turn])
        return output


def correctness(completions: list[str], correct: list[bool], **_: Any) -> list[float]:
    return [float(right) for right in correct]


def train(groups: list[Group], tokenizer: PreTrainedTokenizerFast, *, folded: bool, steps: int) -> dict[str, Any]:
    """The loss and the length of the gradient of each step; how many tokens the decoder was asked for and computed."""
    model = small_model(len(tokenizer))
    rows = {"tokens": 0, "computed": 0}

    def count(module: Any, arguments: Any, keywords: Any) -> None:
        rows["tokens"] += int(keywords["attention_mask"].sum())

    def count_computed(module: Any, arguments: Any) -> None:
        rows["computed"] += arguments[0].shape[0] * arguments[0].shape[1]

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    model.model.layers[0].mlp.register_forward_pre_hook(count_computed)
    if folded:
        fold(model)
    with tempfile.TemporaryDirectory() as directory:
        config = GRPOConfig(
            output_dir=directory,
            max_steps=steps,
            per_device_train_batch_size=COMPLETIONS,
            num_generations=COMPLETIONS,
            max_completion_length=MAX_TOKENS,
            # Each batch is used twice: the second time the policy has moved, and ratios are not one.
            num_iterations=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=not sys.stderr.isatty(),
        )
        trainer = GRPOTrainer(
            model,
            reward_funcs=correctness,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": group["prompt"]} for group in groups]),
            processing_class=tokenizer,
            rollout_func=Replay(groups, tokenizer),
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = {name: [float(entry[name]) for entry in logs] for name in ("loss", "grad_norm")}
    return {**curves, **rows}


def compare(groups: list[Group], steps: int) -> dict[str, Any]:
    """Both runs, and the largest difference of their losses over the largest loss."""
    tokenizer = tokenizer_of(groups)
    unfolded, folded = (train(groups, tokenizer, folded=fold, steps=steps) for fold in (False, True))
    # Python's max would forget NaN.
    losses = torch.tensor([unfolded["loss"], folded["loss"]], dtype=torch.float64)
    return {
        "largest_difference": ((losses[0] - losses[1]).abs().max() / losses[0].abs().max()).item(),
        "unfolded": unfolded,
        "folded": folded,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, name, title in ((axes[0], "loss", "loss"), (axes[1], "grad_norm", "length of the gradient")):
        axis.plot(result["unfolded"][name], color="tab:gray", linewidth=5, alpha=0.5, label="unfolded")
        axis.plot(result["folded"][name], color="tab:green", linewidth=1.2, label="folded")
        axis.set(xlabel="step", title=title)
        axis.legend()
    rows = result["unfolded"]["tokens"], result["folded"]["computed"]
    figure.suptitle(f"GRPO with TRL: {rows[0]:,} tokens, {rows[1]:,} of them computed when folded")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of each run; {STEPS} by default")
    steps = parser.parse_args().steps
    if not DATA.is_dir():
        sys.exit(f"no recorded completions at {DATA}")
    result = compare(recorded_groups(), steps)
    print(f"largest difference of the losses: {result['largest_difference']:.1e} (bound {TOLERANCE:.0e})")
    if steps == STEPS:
        packages = {name: version(name) for name in ("torch", "transformers", "trl")}
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({"versions": packages, "tolerance": TOLERANCE, **result}, indent=1) + "\n")
        plot(result, RESULT.with_suffix(".png"))
    sys.exit(not result["largest_difference"] < TOLERANCE)


if __name__ == "__main__":
    main()
