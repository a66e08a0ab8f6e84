"""What folding does to a model and what others do to a folded one: copies, hooks, padding, empty batches."""

import copy
import functools
import pickle
from collections import OrderedDict
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, Phi3Config, Qwen3Config

from models import EXPERTS, LATENT, TINY
from radix_mlp.transformers import UnsupportedModelError, fold, folded, unfold
from radix_mlp.transformers.folding import is_folded
from tiny import SEQUENCES, SIZES, assert_close, make, padded

TOGETHER = {"input_ids": torch.tensor([[5, 6, 7, 5, 6]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}


def with_zero_head(model: Any) -> Any:
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def by_pickle(model: Any) -> Any:
    """As from a file, in a process that has folded nothing."""
    written = pickle.dumps(model)
    AttentionInterface._global_mapping.pop(model.config._attn_implementation)
    return pickle.loads(written)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_a_copy_of_a_folded_model_runs_on_its_own_weights(batch: dict[str, Tensor], copied: Any) -> None:
    """As trainers make one for reference, and moving averages."""
    own, kept = make(), batch["attention_mask"].bool()
    expected = own(**batch).logits[kept]
    other = copied(fold(own))
    torch.nn.init.zeros_(other.model.norm.weight)
    assert not other(**batch).logits.any()
    assert not other.model(**batch).last_hidden_state.any()
    assert_close(own(**batch).logits[kept], expected)
    plain = make()
    torch.nn.init.zeros_(plain.lm_head.weight[:5])
    other.load_state_dict(plain.state_dict())
    assert_close(other(**batch).logits[kept], plain(**batch).logits[kept])
    unfold(other)
    assert not is_folded(other)
    assert is_folded(own)
    assert_close(other(**batch).logits, plain(**batch).logits)


@torch.no_grad()
def test_a_forward_of_others_is_put_back(model: Any, batch: dict[str, Tensor]) -> None:
    """accelerate puts its hooks on the module itself."""
    calls, own = [], model.forward

    @functools.wraps(own)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = hooked
    with folded(model):
        model(**batch)
        assert len(calls) == 1
    model(**batch)
    assert len(calls) == 2
    assert model.forward is hooked
    assert "forward" not in vars(model.model)


def test_a_model_is_folded_with_its_head_or_without(model: Any) -> None:
    for first, second in ((model, model.model), (model.model, model)):
        fold(first)
        assert is_folded(second)
        with pytest.raises(ValueError, match="is folded already"):
            fold(second)
        unfold(second)
        assert not is_folded(first)
        with pytest.raises(ValueError, match="is not folded"):
            unfold(first)


@torch.no_grad()
@pytest.mark.parametrize("level", ["none", "mlp", "full"])
def test_a_batch_without_tokens(model: Any, level: Any) -> None:
    fold(model, level=level)
    ids = torch.ones(2, 3, dtype=torch.int64)
    output = model(input_ids=ids, attention_mask=torch.zeros_like(ids), output_hidden_states=True)
    assert output.logits.shape == (2, 3, SIZES["vocab_size"])
    assert not output.logits.any()
    assert [state.shape for state in output.hidden_states] == [(2, 3, SIZES["hidden_size"])] * 3
    assert not model.model(input_ids=ids, attention_mask=torch.zeros_like(ids)).last_hidden_state.any()
    for empty in (ids[:, :0], ids[:0]):
        assert model(input_ids=empty).logits.shape == (*empty.shape, SIZES["vocab_size"])
    packed = model(input_ids=ids[:1, :0], cu_seq_lengths=torch.tensor([0, 0]))
    assert packed.logits.shape == (1, 0, SIZES["vocab_size"])


def widened(side: str, by: int) -> dict[str, Tensor]:
    """The batch without positions, padded by more than it must be."""
    batch = padded(side)
    sides = (0, by) if side == "right" else (by, 0)
    return {name: torch.nn.functional.pad(batch[name], sides) for name in ("input_ids", "attention_mask")}


LONG: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10_000.0}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0, 2.0, 3.0, 4.0] * 2}
SHORT = {**TINY, "max_position_embeddings": 8}
GROWING = LlamaConfig(**SHORT, rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0})
SWITCHING = Phi3Config(**TINY, original_max_position_embeddings=8, rope_parameters={**LONG, **FACTORS})


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", [GROWING, SWITCHING], ids=["dynamic", "longrope"])
def test_padding_that_changes_rotary_frequencies_is_refused(config: Any, side: str) -> None:
    """The longest sequence has 7 tokens, and both embeddings are others past 8."""
    plain, own = make(config), fold(make(config))
    batch = widened(side, 1)
    kept = batch["attention_mask"].bool()
    assert_close(own(**batch).logits[kept], plain(**batch).logits[kept])
    kind = config.rope_parameters["rope_type"]
    with pytest.raises(ValueError, match=f"spans 9 positions and the longest sequence 7: past 8, the {kind} rotary"):
        own(**widened(side, 2))
    positions = {"position_ids": torch.arange(9).expand(len(SEQUENCES), 9)}
    with pytest.raises(ValueError, match="spans 9 positions"):
        own(**widened("right", 2), **positions)


@torch.no_grad()
def test_past_the_switch_padding_changes_nothing() -> None:
    plain, own = make(SWITCHING), fold(make(SWITCHING))
    batch = {name: torch.nn.functional.pad(x, (0, 5)) for name, x in widened("right", 0).items()}
    batch["input_ids"][2], batch["attention_mask"][2, :9] = torch.arange(12), 1
    kept = batch["attention_mask"].bool()
    assert_close(own(**batch).logits[kept], plain(**batch).logits[kept])


@torch.no_grad()
def test_types_that_no_test_covers_see_where_padding_puts_them() -> None:
    """Mistral 4 scales queries by their absolute position."""
    mistral4 = pytest.importorskip("transformers.models.mistral4.modeling_mistral4")
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.5,
        "partial_rotary_factor": 1.0,
    }
    sizes = {**TINY, **EXPERTS, **LATENT, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    plain = mistral4.Mistral4ForCausalLM(mistral4.Mistral4Config(**sizes, rope_parameters=rope)).train(mode=False)
    batch = widened("left", 30)
    kept = batch["attention_mask"].bool()
    expected = plain(**batch).logits[kept]
    assert_close(fold(plain)(**batch).logits[kept], expected)


def test_sequences_in_one_row_have_no_cache(model: Any) -> None:
    fold(model)
    for call in (TOGETHER, {"input_ids": TOGETHER["input_ids"], "cu_seq_lengths": torch.tensor([0, 3, 5])}):
        with pytest.raises(ValueError, match="wants each sequence in a row of its own, got 2 in 1"):
            model(**call, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("fold_first", [False, True])
def test_offloaded_models_run_where_their_hooks_say(batch: dict[str, Tensor], fold_first: bool) -> None:
    expected = fold(make())(**batch).logits
    model = make()
    steps: list[Any] = [fold, lambda model: accelerate.cpu_offload(model, torch.device("cpu"))]
    for step in steps if fold_first else steps[::-1]:
        step(model)
    assert model.model.embed_tokens.weight.is_meta
    assert_close(model(**batch).logits, expected)


@torch.no_grad()
def test_what_accelerate_unwraps_is_folded(batch: dict[str, Tensor]) -> None:
    """It binds the forward that it finds to the model, as if that were a function."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    expected = fold(make())(**batch).logits
    prepared = accelerator.prepare(fold(make()))
    assert_close(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)(**batch).logits, expected)


def test_attention_that_was_changed_since_is_told(batch: dict[str, Tensor]) -> None:
    model = fold(make())
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="its config says 'eager' since it was folded: unfold, set it, and"):
        model(**batch)


def test_what_is_no_tensor_is_named(model: Any) -> None:
    fold(model)
    ids, row = torch.tensor([[5, 6, 7]]), [[0, 1, 2]]
    for name in ("attention_mask", "position_ids", "cu_seq_lengths"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got a list"):
            model(**{"input_ids": ids, name: row})
    with pytest.raises(TypeError, match="input_ids must be a tensor, got a list"):
        model(input_ids=row)


@torch.no_grad()
@pytest.mark.parametrize("shifted", [False, True])
def test_padding_predicts_no_label_in_evaluation(model: Any, batch: dict[str, Tensor], shifted: bool) -> None:
    def loss(own: Any, batch: dict[str, Tensor]) -> Any:
        labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
        if not shifted:
            return own(**batch, labels=labels).loss
        return own(**batch, labels=labels, shift_labels=torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)).loss

    # Padded on the right, no label stands behind padding.
    expected = loss(make(), padded("right"))
    fold(model)
    assert_close(loss(model, batch), expected)
    assert_close(loss(model.train(), batch), expected)
    with pytest.raises(ValueError, match=r"labels must be \[5, 7\] like input_ids, got shape \(5, 6\)"):
        model.eval()(**batch, labels=batch["input_ids"][:, 1:])


def test_a_window_that_no_layer_is_told_is_seen(batch: dict[str, Tensor]) -> None:
    config = Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=0)
    model = fold(make(config))
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(UnsupportedModelError, match="no layer was told its sliding window of 3"):
        model(**batch)


def test_what_cannot_be_captured_is_told(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = pytest.importorskip("radix_mlp.transformers.graphs")

    def capture(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "Graph", capture)
    own = object.__new__(graphs.Graphs)
    own.graphs, own.pool = OrderedDict(), None
    fold(model)
    folding = model._radix_mlp_folding
    monkeypatch.setattr(own, "takes", lambda call: True, raising=False)
    folding.graphs = own
    with pytest.raises(UnsupportedModelError, match="Qwen3Model cannot be captured as a CUDA graph: operation not"):
        model(**padded("right"))
