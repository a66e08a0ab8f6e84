"""Batches of every shape that sharing takes, a small model on every backend, and a fold that is wrong."""

# isort: off
from interpreted import CUDA
# isort: on

import random
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import nn

from radix_mlp.torch.dispatch import Backend
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

# As deep as Qwen3-0.6B, and with such weights as it starts to train with.
DEEP = replace(CONFIG, num_hidden_layers=28)
DEEP_STD = 0.02

DEVICE = "cuda" if CUDA else "cpu"

NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16"}
# What each backend computes here; Triton's interpreter has no bfloat16.
DTYPES: dict[Backend, tuple[torch.dtype, ...]] = {"sequential": (torch.float64, torch.float32, torch.bfloat16)}
if find_spec("triton"):
    DTYPES["tree"] = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)
if CUDA:
    DTYPES["query_folded"] = (torch.bfloat16,)
# What an interpreted kernel gets through in a second.
INTERPRETED_TOKENS = 200


def runs(*dtypes: torch.dtype) -> list[tuple[Backend, torch.dtype]]:
    """The backends that compute one of `dtypes` here, with it."""
    return [(backend, dtype) for backend, own in DTYPES.items() for dtype in dtypes if dtype in own]


def affordable(backend: Backend, sequences: Sequences) -> bool:
    """Whether a proof need not wait for it."""
    return CUDA or backend != "tree" or sum(map(len, sequences)) <= INTERPRETED_TOKENS


def model(
    dtype: torch.dtype,
    config: Qwen3Config = CONFIG,
    *,
    backend: Backend = "sequential",
    seed: int = 0,
    std: float | None = None,
) -> Qwen3:
    """The same random weights in every dtype, those of bfloat16: torch's, or matrices of standard deviation `std`."""
    torch.manual_seed(seed)
    own = Qwen3(config, backend=backend)
    if std is not None:
        for parameter in own.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=std)
    return own.to(DEVICE, torch.bfloat16).to(dtype)


def fold_at(level: Level, sequences: Sequences, device: str = DEVICE) -> Batch:
    return Batch.from_sequences(sequences, level, device)


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
        "two completions": list(tree([], [(1, 9), (2, 6)])),
    }


# Families in which some sequence parts from another one, so that two rows can be merged that should not be.
MERGEABLE = [family for family in families() if family != "prefixes of each other"]


def wrongly_folded(sequences: Sequences, level: Level, device: str = DEVICE) -> Batch:
    """`sequences` with one row merged into its neighbour, as by a fold that overlooks a token; labels are right."""
    return replace(fold_at(level, _merged(sequences), device), labels=fold_at(level, sequences, device).labels)


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
