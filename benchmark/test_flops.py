"""The flops of a fold against sums over its sequences."""

import pytest

from flops import attention_flops, flop_compression, head_flops, linear_flops
from gpu_forward.models import SHAPES
from radix_mlp import Fold

CONFIG = SHAPES["qwen3-0.6b"]
TURNS = [[1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 7]]


def test_a_node_attends_to_its_path() -> None:
    paths = {tuple(ids[:end]) for ids in TURNS for end in range(1, len(ids) + 1)}
    per_pair = 4 * CONFIG.num_hidden_layers * 16 * 128
    assert attention_flops(CONFIG, Fold.from_sequences(TURNS)) == per_pair * sum(map(len, paths))
    unshared = sum(end for ids in TURNS for end in range(1, len(ids) + 1))
    assert attention_flops(CONFIG, Fold.from_sequences(TURNS, salts=range(3))) == per_pair * unshared


def test_a_row_takes_two_flops_a_parameter() -> None:
    # The published 440M parameters beside the embedding, less the norms.
    assert linear_flops(CONFIG, 3) == 3 * 2 * 440_401_920
    assert head_flops(CONFIG, 3) == 3 * 2 * 1024 * 151_936


def test_rows_without_labels_need_no_logits() -> None:
    sequences = [[1, 2, 3, 4], [1, 2, 5, 6]]
    row, head = linear_flops(CONFIG, 1), head_flops(CONFIG, 1)
    # All but the last tokens have labels; on completions those of the last prompt token and of the first own one.
    for prompt, heads, folded in ((0, 6, 4), (2, 4, 3)):
        expected = (8 * row + heads * head) / (6 * row + folded * head)
        assert flop_compression(CONFIG, sequences, prompt) == pytest.approx(expected, rel=1e-3)


def test_states_alone_need_no_logits() -> None:
    sequences = [[1, 2, 3, 4], [1, 2, 5, 6]]
    assert flop_compression(CONFIG, sequences, None) == pytest.approx(8 / 6, rel=1e-4)
