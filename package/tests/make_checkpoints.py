"""Writes tiny random Qwen3 checkpoints, and what transformers computes with them, for qwen3_transformers.rs.

python make_checkpoints.py DIRECTORY

DIRECTORY/<case>/ is a checkpoint; its expected.safetensors holds a ragged batch (input_ids, position_ids [N],
cu_seq_lengths [sequences + 1], int64) and the reference in f32, computed one sequence at a time: hidden states
[N, hidden], last_token, mean and cls embeddings [sequences, hidden], normalized ones of the last token cut to half
their dimensions, and yes_probabilities [sequences] of token YES against token NO where the model has a head. Of the
case "bf16" also hidden_bf16 and hidden_f16, computed in these dtypes.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

YES, NO = 7, 11
VOCABULARY = 97


@dataclass
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    bare: bool = False  # a Qwen3Model: no `model.` prefix and no head
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "5GB"
    old_config: bool = False  # rope_theta at the top level, as transformers 4 wrote it
    no_head_dim: bool = False  # to be derived
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "tied": Case(4, 4, 16, 64, 160, no_head_dim=True, options={"tie_word_embeddings": True}),
    "sharded_bias": Case(4, 2, 20, 48, 101, max_shard_size="60KB", options={"attention_bias": True}),
    "bare_odd": Case(8, 2, 10, 51, 93, bare=True, old_config=True),
    "bf16": Case(6, 3, 64, 72, 136, dtype=torch.bfloat16, options={"tie_word_embeddings": True}),
    "linear_rope": Case(
        8,
        2,
        64,
        64,
        96,
        options={
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 3.0},
            "rms_norm_eps": 1e-3,
        },
    ),
}


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough that an error in any part of the forward pass is visible in its output."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)


def batch() -> list[tuple[list[int], int]]:
    """Token ids and the first position of each sequence: shared prefixes, duplicates, more than one chunk of keys."""
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    long, prompt = tokens(530), tokens(40)
    sequences = [
        long + tokens(70),
        long + tokens(9),
        long[:300] + tokens(131),
        prompt,
        prompt + tokens(1),
        tokens(1),
    ]
    sequences += [
        prompt + tokens(23),
        prompt + tokens(64),
        prompt,
        prompt[:17] + tokens(65),
        tokens(193),
    ]
    return [(sequence, 0) for sequence in sequences] + [(prompt, 3), (prompt + tokens(5), 3)]


def write(case: Case, directory: Path) -> None:
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=3,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_position_embeddings=1024,
        **({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} | case.options),
    )
    architecture = Qwen3Model if case.bare else Qwen3ForCausalLM
    model = architecture(config)
    randomize(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(case.dtype)
    model.save_pretrained(directory, max_shard_size=case.max_shard_size)
    # Read back: f32 arithmetic on the weights of the file.
    model = architecture.from_pretrained(directory, dtype=torch.float32).train(False)
    rewrite_config(case, directory / "config.json")
    body = model if isinstance(model, Qwen3Model) else model.model
    sequences = batch()
    ids = [torch.tensor(tokens) for tokens, _ in sequences]
    positions = [torch.arange(start, start + len(tokens)) for tokens, start in sequences]

    def compute() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [
                body(input_ids=i[None], position_ids=p[None], use_cache=False).last_hidden_state[0]
                for i, p in zip(ids, positions, strict=True)
            ]

    states = compute()
    last = torch.stack([s[-1] for s in states])
    expected = {
        "input_ids": torch.cat(ids),
        "position_ids": torch.cat(positions),
        "cu_seq_lengths": torch.tensor([0] + [len(i) for i in ids]).cumsum(0),
        "hidden": torch.cat(states),
        "last_token": last,
        "mean": torch.stack([s.mean(0) for s in states]),
        "cls": torch.stack([s[0] for s in states]),
        "normalized": torch.nn.functional.normalize(last[:, : case.hidden // 2], dim=-1),
    }
    if isinstance(model, Qwen3ForCausalLM):
        with torch.inference_mode():
            logits = model.lm_head(last)
        expected["yes_probabilities"] = logits[:, [NO, YES]].softmax(-1)[:, 1]
    if case.dtype == torch.bfloat16:
        for name, dtype in (("hidden_f16", torch.float16), ("hidden_bf16", torch.bfloat16)):
            body.to(dtype)
            expected[name] = torch.cat(compute())
    save_file(
        {name: tensor.contiguous() for name, tensor in expected.items()},
        directory / "expected.safetensors",
    )


def rewrite_config(case: Case, path: Path) -> None:
    config = json.loads(path.read_text())
    if case.old_config:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["rope_scaling"] = None
    if case.no_head_dim:
        del config["head_dim"]
    path.write_text(json.dumps(config))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    root = parser.parse_args().directory
    for name, case in CASES.items():
        write(case, root / name)
