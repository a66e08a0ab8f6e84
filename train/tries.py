"""Batches of every shape that sharing takes, a small model, and a fold that is wrong."""

import random
from collections.abc import Iterator
from dataclasses import replace

import torch

from radix_torch_varlen import Batch, Level, Qwen3, Qwen3Config

Sequences = list[list[int]]

CONFIG = Qwen3Config(
    vocab_size=64,
    hidden_size=48,
    # Whole vectors of any CPU: the elements left over at the end of a tensor may get other bits from silu.
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)


def model(dtype: torch.dtype, config: Qwen3Config = CONFIG) -> Qwen3:
    """The same random weights in every dtype, up to rounding."""
    torch.manual_seed(0)
    return Qwen3(config).to(dtype)


def families() -> dict[str, Sequences]:
    """Named batches: what trainers and rerankers have, and what breaks folds."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return draw.choices(range(CONFIG.vocab_size), k=count)

    def tree(prefix: list[int], levels: list[tuple[int, int]]) -> Iterator[list[int]]:
        if not levels:
            yield prefix
            return
        (children, length), *rest = levels
        for _ in range(children):
            yield from tree(prefix + tokens(length), rest)

    trunk = tokens(20)
    return {
        "one prompt, completions": list(tree([], [(1, 30), (8, 9)])),
        "two prompts, completions": list(tree([], [(2, 17), (4, 12)])),
        "three levels": list(tree([], [(2, 8), (3, 7), (3, 5)])),
        "prefixes of each other": [trunk[:length] for length in (20, 3, 11, 12, 1)],
        "the same again": [trunk, tokens(6), trunk, trunk],
        "nothing shared": [[first, *tokens(11)] for first in range(5)],
        "empty and single": [[], [5], trunk, [], [5, 6], [7]],
        "random": [draw.choices(range(3), k=draw.randrange(12)) for _ in range(30)],
    }


# Families in which some sequence parts from another one, so that two rows can be merged that should not be.
MERGEABLE = [family for family in families() if family != "prefixes of each other"]


def wrongly_folded(sequences: Sequences, level: Level) -> Batch:
    """`sequences` with one row merged into its neighbour, as by a fold that overlooks a token; labels are right."""
    right = Batch.from_sequences(sequences, level)
    return replace(Batch.from_sequences(_merged(sequences), level), labels=right.labels)


def _merged(sequences: Sequences) -> Sequences:
    """The first token that parts a sequence from another one has become the other's."""
    wrong = [list(sequence) for sequence in sequences]
    for number, sequence in enumerate(wrong):
        for other in wrong[:number]:
            for place, (mine, theirs) in enumerate(zip(sequence, other, strict=False)):
                if mine != theirs:
                    sequence[place] = theirs
                    return wrong
    raise ValueError("no two sequences differ in a token")
