"""Hidden states and logits against transformers' Qwen3 on the same checkpoints.

As a script it prints a table and exits with 1 where they differ: python train/test_huggingface_comparison.py
"""

# isort: off
import interpreted  # noqa: F401
# isort: on

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from radix_torch_varlen import Batch, Level, Qwen3, UnsupportedConfigError
from radix_torch_varlen import Qwen3Config as OwnConfig
from tries import families, wrongly_folded

# Largest difference over the largest magnitude. An f32 sum over the widest dimension, 80, errs by about
# sqrt(80) × 6e-8 = 5e-7, a few times in each of three layers.
TOLERANCE = 1e-5

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 65_536,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 512}
# What is saved, and the position that sequences start from.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "untied": ({}, 0),
    "tied": ({"tie_word_embeddings": True}, 0),
    "one head, biased": ({"num_key_value_heads": 1, "attention_bias": True, "head_dim": 24}, 0),
    "long positions": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 40_000),
    "linear RoPE": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, 3_000),
    "YaRN": ({"rope_parameters": YARN, "max_position_embeddings": 2048}, 1_500),
    "YaRN, own range": (
        {
            "rope_parameters": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.3},
            "max_position_embeddings": 2048,
        },
        0,
    ),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, 0),
}


def checkpoint(directory: Path, changes: dict[str, Any], **options: Any) -> Qwen3ForCausalLM:
    """A random model, saved to `directory`: norms and biases are random too, so that no weight goes unnoticed."""
    torch.manual_seed(0)
    model: Qwen3ForCausalLM = Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "tie_word_embeddings": False, **changes}))
    model.train(mode=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(directory, **options)
    return model


def theirs(model: Qwen3ForCausalLM, sequences: list[list[int]], first_position: int) -> tuple[Tensor, Tensor]:
    """States [N, hidden] and logits [N, vocabulary], one sequence after the other."""
    states, logits = [], []
    for sequence in sequences:
        if not sequence:
            continue
        ids = torch.tensor([sequence])
        positions = torch.arange(len(sequence))[None] + first_position
        output = model(input_ids=ids, position_ids=positions, output_hidden_states=True, use_cache=False)
        states.append(output.hidden_states[-1][0])
        logits.append(output.logits[0])
    return torch.cat(states), torch.cat(logits)


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def differences(name: str, directory: Path, level: Level = "full") -> tuple[float, float]:
    """Of the states and of the logits of a case, over all families of batches."""
    changes, first_position = CASES[name]
    reference = checkpoint(directory, changes)
    own = Qwen3.from_pretrained(directory)
    found = []
    for sequences in families().values():
        states, logits = theirs(reference, sequences, first_position)
        batch = Batch.from_sequences(sequences, level, first_position=first_position)
        found.append((difference(batch.unfold(own(batch)), states), difference(own.logits(batch), logits)))
    # Python's max would forget NaN.
    of_states, of_logits = torch.tensor(found).amax(0).tolist()
    return of_states, of_logits


@pytest.mark.parametrize("level", ["none", "mlp", "full"])
@pytest.mark.parametrize("name", CASES)
def test_states_and_logits(name: str, level: Level, tmp_path: Path) -> None:
    of_states, of_logits = differences(name, tmp_path, level)
    assert of_states < TOLERANCE
    assert of_logits < TOLERANCE


@pytest.mark.parametrize("name", ["untied", "tied", "one head, biased"])
def test_gradients(name: str, tmp_path: Path) -> None:
    """Of the loss, for every parameter, in f64: in f32, what random queries gain cancels to few digits in both models.

    The tolerance stays, since transformers takes the angles of positions in f32 always.
    """
    reference = checkpoint(tmp_path, CASES[name][0]).double()
    own = Qwen3.from_pretrained(tmp_path, dtype=torch.float64)
    sequences = families()["three levels"]
    own.loss(Batch.from_sequences(sequences)).backward()  # type: ignore[no-untyped-call]
    ids = torch.tensor(sequences)
    reference(input_ids=ids, labels=ids).loss.backward()
    expected = {name.removeprefix("model."): x.grad for name, x in reference.named_parameters() if x.grad is not None}
    found = {name: parameter.grad for name, parameter in own.named_parameters()}
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        assert gradient is not None
        assert difference(gradient, expected[parameter]) < TOLERANCE, parameter


@torch.no_grad()
def test_shards(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, {}, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    own = Qwen3.from_pretrained(tmp_path)
    batch = Batch.from_sequences([[1, 2, 3]])
    assert difference(own.logits(batch), theirs(reference, [[1, 2, 3]], 0)[1]) < TOLERANCE


@torch.no_grad()
def test_old_configurations(tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling."""
    reference = checkpoint(tmp_path, {"rope_parameters": YARN})
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    scaling = {"type" if name == "rope_type" else name: x for name, x in values.pop("rope_parameters").items()}
    path.write_text(json.dumps({**values, "rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}))
    batch = Batch.from_sequences([list(range(30))])
    found = Qwen3.from_pretrained(tmp_path).logits(batch)
    assert difference(found, theirs(reference, [list(range(30))], 0)[1]) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"layer_types": ["full_attention"]}, r"expected 3 of"),
        ({"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}, "window of None"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UnsupportedConfigError, match=message):
        Qwen3.from_pretrained(tmp_path)


def test_checkpoints_must_be_whole(tmp_path: Path) -> None:
    checkpoint(tmp_path, {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 4, "layer_types": None}))
    with pytest.raises(RuntimeError, match=r"layers\.3\."):
        Qwen3.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_001.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 1.01}},
        {"rms_norm_eps": 1e-3},
        {"windows": (None, None, 29)},
    ],
)
def test_a_wrong_model_is_seen(wrong: dict[str, Any], tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, {})
    own = Qwen3.from_pretrained(tmp_path)
    other = Qwen3(replace(own.config, **wrong))
    other.load_state_dict(own.state_dict())
    sequences = families()["one prompt, completions"]
    batch = Batch.from_sequences(sequences)
    expected = theirs(reference, sequences, 0)[1]
    assert difference(own.logits(batch), expected) < TOLERANCE < difference(other.logits(batch), expected)


@torch.no_grad()
def test_a_wrong_fold_is_seen(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, {})
    own = Qwen3.from_pretrained(tmp_path)
    sequences = families()["three levels"]
    wrong = wrongly_folded(sequences, "full", "cpu")
    assert difference(own.logits(wrong), theirs(reference, sequences, 0)[1]) > 1e3 * TOLERANCE


def test_configurations_are_read_as_they_are(tmp_path: Path) -> None:
    checkpoint(tmp_path, CASES["sliding window"][0])
    assert OwnConfig.from_file(tmp_path / "config.json").windows == (None, 7, 7)


def test_a_size_that_a_configuration_leaves_out_is_transformers_own(tmp_path: Path) -> None:
    checkpoint(tmp_path, {})
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["head_dim"]
    file.write_text(json.dumps(values))
    assert OwnConfig.from_file(file).head_dim == Qwen3Config.from_pretrained(tmp_path).head_dim


@pytest.mark.parametrize("left_out", ["max_window_layers", "sliding_window"])
def test_windows_that_a_configuration_leaves_out_are_transformers_own(left_out: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, {**CASES["sliding window"][0], "num_hidden_layers": 30})
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values[left_out], values["layer_types"]
    file.write_text(json.dumps(values))
    expected = Qwen3Config.from_pretrained(tmp_path)
    assert expected.layer_types is not None
    windows = [expected.sliding_window if kind == "sliding_attention" else None for kind in expected.layer_types]
    assert len(set(windows)) == 2
    assert OwnConfig.from_file(file).windows == tuple(windows)


def main() -> None:
    print(f"{'difference from transformers, f32':36} states   logits   (bound {TOLERANCE:.0e})")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    broken = False
    for name in CASES:
        with tempfile.TemporaryDirectory() as directory:
            states, logits = differences(name, Path(directory))
        broken |= not (states < TOLERANCE and logits < TOLERANCE)
        print(f"{name:36} {states:.1e}  {logits:.1e}")
    sys.exit(broken)


if __name__ == "__main__":
    main()
