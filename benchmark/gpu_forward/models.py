"""Qwen3 at its published sizes, with random weights, and what it takes."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, Qwen3Config

from gpu_forward.batches import SMOKE_VOCABULARY, Batch

VOCABULARY = 151_936


def config(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    *,
    tied: bool,
    vocabulary: int = VOCABULARY,
) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=intermediate,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=tied,
    )


# https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json, and so on; "tiny" is for --smoke.
SHAPES = {
    "qwen3-0.6b": config(1024, 28, 16, 8, 3072, tied=True),
    "qwen3-4b": config(2560, 36, 32, 8, 9728, tied=True),
    "qwen3-8b": config(4096, 36, 32, 8, 12_288, tied=False),
    "tiny": config(64, 2, 2, 1, 128, tied=True, vocabulary=SMOKE_VOCABULARY),
}


def random_model(shape: str, device: torch.device) -> PreTrainedModel:
    """The decoder without its LM head, in bfloat16: matrices of transformers' own start, norms of 1."""
    torch.manual_seed(0)
    make: Any = AutoModel.from_config
    with device:
        model: PreTrainedModel = make(SHAPES[shape], dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train(False)
    return model


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model with the same weights in memory, which can be folded by itself."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def padded(batch: Batch) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [sequences, length] on the CPU, padded on the right."""
    lengths = torch.tensor([len(ids) for ids in batch])
    width = int(lengths.max())
    ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in batch])
    return ids, (torch.arange(width) < lengths[:, None]).long()
