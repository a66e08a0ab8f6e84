"""A tiny Qwen3 of transformers, and a batch for it that shares prefixes."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config

# Of values around 1, in f32: sums over other numbers of rows run in another order.
TOLERANCE = 1e-5

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}

# Sharing at two depths, a prefix of another sequence, and one that stands alone.
SEQUENCES = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 11], [5, 6, 7], [5, 6, 12, 13, 14, 15, 16], [20, 21]]
NODES = 14
TOKENS = 23


def make(config: PreTrainedConfig | None = None) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or Qwen3Config(**SIZES))  # type: ignore[no-untyped-call]
    return model.train(mode=False)


def padded(side: str) -> dict[str, Tensor]:
    ids = torch.zeros(len(SEQUENCES), max(map(len, SEQUENCES)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(SEQUENCES):
        place = slice(0, len(own)) if side == "right" else slice(-len(own), None)
        ids[row, place], mask[row, place] = torch.tensor(own), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * (1 + expected.abs().max())
