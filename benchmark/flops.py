"""How many floating-point operations Qwen3 takes over a fold: forward; a backward pass takes as many twice."""

import numpy as np
from transformers import Qwen3Config

from radix_mlp import Fold


def linear_flops(config: Qwen3Config, rows: int) -> int:
    """Of the projections and the MLPs of all layers, over `rows` rows."""
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    widths = 2 * (config.num_attention_heads + kv_heads) * config.head_dim + 3 * config.intermediate_size
    return 2 * rows * widths * config.hidden_size * config.num_hidden_layers


def attention_flops(config: Qwen3Config, fold: Fold) -> int:
    """Of the two products of all layers over the (query, key) pairs of `fold`, whose positions count from 0.

    The fold saves less than N/N' of them where short sequences are prefixes of long ones, as an agent's turns are.
    """
    pairs = int((fold.position_ids[: fold.num_nodes].astype(np.int64) + 1).sum())
    return 4 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers


def forward_flops(config: Qwen3Config, fold: Fold) -> int:
    """Of all layers over the rows of `fold`."""
    return linear_flops(config, fold.num_nodes) + attention_flops(config, fold)


def head_flops(config: Qwen3Config, rows: int) -> int:
    """Of the logits of `rows` rows."""
    return 2 * rows * config.hidden_size * config.vocab_size


def flop_compression(config: Qwen3Config, sequences: list[list[int]], prompt: int | None) -> float:
    """How many times fewer flops the fold leaves.

    The logits that predict tokens behind the first `prompt` are included; no logits where that is None.
    """
    fold = Fold.from_sequences(sequences)
    unshared = Fold.from_sequences(sequences, salts=range(len(sequences)))
    following = np.concatenate([np.arange(1, len(ids) + 1) for ids in sequences])
    lengths = [len(ids) for ids in sequences]
    first = max(lengths) if prompt is None else prompt
    counted = (following >= first) & (following < np.repeat(lengths, lengths))

    def flops(fold: Fold) -> int:
        rows = len(np.unique(fold.scatter_indices[counted]))
        return forward_flops(config, fold) + head_flops(config, rows)

    return flops(unshared) / flops(fold)
