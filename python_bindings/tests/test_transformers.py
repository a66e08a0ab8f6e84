"""How a folded transformers model behaves: inputs, outputs, caches, refusals, CUDA graphs."""

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from radix_mlp import Fold
from radix_mlp.transformers import UnsupportedModelError, fold, folded, support, unfold
from radix_mlp.transformers.batch import Batch, pack_call
from radix_mlp.transformers.folding import CACHE_NAMES
from tiny import NODES, SEQUENCES, SIZES, TOKENS, assert_close, make, padded


@torch.no_grad()
def test_every_node_is_computed_once(model: Any, batch: dict[str, Tensor]) -> None:
    rows = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: rows.append(out.shape[:-1].numel()))
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: rows.append(out.shape[:-1].numel()))
    levels: dict[Any, int] = {"full": NODES, "mlp": NODES, "none": TOKENS}
    for level, expected in levels.items():
        with folded(model, level=level):
            model(**batch)
        assert rows == [expected, expected]
        rows.clear()


@torch.no_grad()
def test_the_way_back_is_made_behind_the_decoder(
    model: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    make_places = Batch.__dict__["host_places"].func

    def spy(own: Batch) -> Tensor:
        events.append("places")
        places: Tensor = make_places(own)
        return places

    monkeypatch.setattr(Batch, "host_places", property(spy))
    model.model.norm.register_forward_hook(lambda *_: events.append("norm"))
    fold(model).model(**batch)
    assert events[0] == "norm"
    assert "places" in events


def test_ids_without_padding_are_packed_where_they_lie() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    for mask in (None, torch.ones_like(ids)):
        packed = pack_call(ids, mask, None, None, count_padding=False)
        assert np.shares_memory(packed.input_ids, ids.numpy())


@torch.no_grad()
def test_a_mask_of_ones_is_no_mask(model: Any) -> None:
    ids = torch.tensor([SEQUENCES[0], SEQUENCES[0][::-1]])
    expected = model(input_ids=ids).logits
    fold(model)
    for mask in (torch.ones_like(ids), torch.ones_like(ids).bool(), None):
        assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)


@torch.no_grad()
def test_a_mask_of_ones_says_that_positions_that_jump_are_one_sequence(model: Any) -> None:
    ids = torch.tensor([SEQUENCES[0], SEQUENCES[0][::-1]])
    jumping = torch.arange(ids.shape[1]) % 3
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": jumping.expand_as(ids)}
    expected = model(**call).logits
    assert_close(fold(model)(**call).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16])
def test_a_mask_has_any_dtype(model: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> None:
    fold(model)
    expected = model(**batch).logits
    assert torch.equal(model(**batch | {"attention_mask": batch["attention_mask"].to(dtype)}).logits, expected)


@torch.no_grad()
def test_packed_equals_padded(model: Any) -> None:
    flat = torch.tensor([token for own in SEQUENCES for token in own])
    bounds = torch.tensor([0, *torch.tensor([len(own) for own in SEQUENCES]).cumsum(0)])
    batch = padded("right")
    expected = model(**batch).logits[batch["attention_mask"].bool()][None]
    fold(model)
    assert_close(model(input_ids=flat, cu_seq_lengths=bounds).logits, expected)
    assert_close(model(input_ids=flat[None], cu_seq_lengths=bounds).logits, expected)
    # As transformers packs: positions that start again start a sequence.
    positions = torch.cat([torch.arange(len(own)) for own in SEQUENCES])[None]
    assert_close(model(input_ids=flat[None], position_ids=positions).logits, expected)
    collated = {"cu_seq_lens_q": bounds.int(), "cu_seq_lens_k": bounds.int(), "max_length_q": 7, "max_length_k": 7}
    assert_close(model(input_ids=flat[None], position_ids=positions, **collated).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "keep",
    [
        0,
        1,
        3,
        [5, 2],
        slice(1, 4),
        torch.tensor([0, 4]),
        torch.tensor([[0, 1], [1, 2], [2, 0], [6, 5], [0, 0]]),
        "mask",
    ],
)
def test_logits_to_keep(model: Any, batch: dict[str, Tensor], keep: Any) -> None:
    mask = batch["attention_mask"].bool()
    kept = mask if isinstance(keep, str) else keep
    whole = model(**batch).logits
    zeroed = torch.where(mask[..., None], whole, 0)
    if isinstance(keep, str):
        expected = whole[mask]
        if version("transformers") >= "5.21":
            assert_close(expected, model(**batch, logits_to_keep=mask).logits)
    elif isinstance(keep, int):
        expected = zeroed[:, -keep:] if keep else zeroed
    elif not isinstance(keep, Tensor) or keep.ndim == 1:
        expected = zeroed[:, keep]
    else:
        expected = zeroed.gather(1, keep[..., None].expand(-1, -1, whole.shape[-1]))
    with folded(model):
        assert_close(model(**batch, logits_to_keep=kept).logits, expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("config", [Qwen3Config(**SIZES), MistralConfig(**SIZES, sliding_window=3)])
def test_decoding_goes_on_from_a_folded_cache(config: PreTrainedConfig, name: str) -> None:
    model = make(config)
    if name == "cache" and name not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers knows past_key_values only")
    batch = padded("left")
    step = {
        "input_ids": torch.full((len(SEQUENCES), 1), 30),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 1), value=1),
        "position_ids": batch["attention_mask"].sum(1, keepdim=True),
    }
    first = model(**batch, use_cache=True)
    second = model(**step, **{name: first[name]}, use_cache=True)
    options = {"max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    fold(model)
    prefilled = model(**batch, use_cache=True)
    decoded = model(**step, **{name: prefilled[name]}, use_cache=True)
    assert_close(decoded.logits, second.logits)
    assert torch.equal(model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options), tokens)


@torch.no_grad()
def test_no_cache_unless_asked_for(model: Any, batch: dict[str, Tensor]) -> None:
    fold(model)
    for output in (model(**batch), model(**batch, use_cache=False)):
        assert not output.keys() & set(CACHE_NAMES)


@torch.no_grad()
def test_tuples_and_hidden_states(model: Any, batch: dict[str, Tensor]) -> None:
    mask = batch["attention_mask"][..., None]
    plain = model(**batch, output_hidden_states=True)
    fold(model)
    logits, states = model(**batch, output_hidden_states=True, return_dict=False)
    assert_close(logits, plain.logits * mask)
    assert len(states) == len(plain.hidden_states) == 3
    for found, expected in zip(states, plain.hidden_states, strict=True):
        assert_close(found, expected * mask)


@torch.no_grad()
def test_positional_arguments(model: Any, batch: dict[str, Tensor]) -> None:
    with folded(model):
        by_name = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, by_name)


def test_classification_heads_read_the_last_token(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, num_labels=3)  # type: ignore[call-arg]
    model: Any = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        assert_close(fold(model)(**batch).logits, expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradient_modes(model: Any, batch: dict[str, Tensor], mode: Callable[[], Any]) -> None:
    mask = batch["attention_mask"][..., None]
    with mode():
        expected = model(**batch).logits * mask
        with folded(model):
            assert_close(model(**batch).logits, expected)


def test_unfold_leaves_nothing_behind(model: Any, batch: dict[str, Tensor]) -> None:
    config, attributes = model.config.to_dict(), set(vars(model))
    implementation = model.config._attn_implementation
    with torch.no_grad():
        expected = model(**batch).logits
        with folded(model):
            assert model.config.to_dict() == config
        with pytest.raises(ValueError, match="needs input_ids"), folded(model):
            model()
        assert torch.equal(model(**batch).logits, expected)
    assert set(vars(model)) == attributes
    assert model.config._attn_implementation == implementation
    assert unfold(fold(model)) is model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": None}, ValueError, "needs input_ids"),
        ({"inputs_embeds": torch.zeros(5, 7, 32)}, ValueError, "takes input_ids.*not inputs_embeds"),
        ({"output_attentions": True}, ValueError, "no output_attentions: unfold"),
        ({"attention_mask": torch.ones(5, 1, 7, 7)}, ValueError, r"attention_mask \[sequences, length\]"),
        ({"attention_mask": torch.ones(5, 3)}, ValueError, r"attention_mask must be \[5, 7\].*got shape \(5, 3\)"),
        (
            {"attention_mask": torch.tensor([[1, 0, 1, 0, 0, 0, 0]] * 5)},
            ValueError,
            "row 0 has 2 tokens between 0 and 2",
        ),
        ({"input_ids": torch.zeros(1, 2, 3, dtype=torch.int64)}, ValueError, r"got shape \(1, 2, 3\)"),
        ({"input_ids": torch.full((5, 7), -1)}, ValueError, "input_ids.*is -1"),
        ({"input_ids": torch.full((5, 7), 64)}, ValueError, "holds 64, but the model has 64 embeddings"),
        ({"input_ids": torch.full((5, 7), 2**32)}, ValueError, "is 4294967296|holds 2147483647"),
        ({"input_ids": torch.zeros(5, 7)}, TypeError, "input_ids must hold integers, got torch.float32"),
        ({"cu_seq_lengths": torch.tensor([0, 7])}, ValueError, "takes no attention_mask"),
    ],
)
def test_bad_calls_name_what_is_wrong(model: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    fold(model)
    with pytest.raises(error, match=message):
        model(**{**padded("right"), **change})


@pytest.mark.parametrize("bounds", [[0, 3], [1, 7], [0, 5, 3, 7], []])
def test_bad_bounds(model: Any, bounds: list[int]) -> None:
    fold(model)
    with pytest.raises(ValueError, match="cu_seq_lengths must rise from 0 to 7"):
        model(input_ids=torch.arange(7)[None], cu_seq_lengths=torch.tensor(bounds, dtype=torch.int64))


def test_bad_options(model: Any) -> None:
    with pytest.raises(ValueError, match="level must be one of none, mlp, full, got 'half'"):
        fold(model, level="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not folded"):
        unfold(model)
    fold(model)
    with pytest.raises(ValueError, match="folded already"):
        fold(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_graphs_need_cuda(model: Any) -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs a CUDA device"):
        fold(model, cuda_graphs=True)
    assert "forward" not in vars(model)


def test_graphs_refuse_what_the_tree_kernel_does() -> None:
    pytest.importorskip("triton")
    from radix_mlp.transformers.graphs import GraphAttention

    attend = GraphAttention(Fold.from_sequences([[1, 2], [1, 3]], layout="depth_first"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k = (torch.zeros(3, heads, 16, device=device) for heads in (65, 1))
    with pytest.raises(UnsupportedModelError, match="CUDA graphs attend by the tree kernel, which takes up to 64"):
        attend(q, k, k, None, None, None)


def test_a_wrapper_must_hold_one_model(model: Any, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected = model(**batch).logits
        fold(nn.Sequential(nn.Identity(), nn.ModuleList([model])))
        assert_close(model(**batch).logits, expected * batch["attention_mask"][..., None])
    with pytest.raises(UnsupportedModelError, match="found none"):
        fold(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="found Qwen3ForCausalLM, Qwen3ForCausalLM"):
        fold(nn.ModuleList([make(), make()]))


def test_untested_types_are_proved_first(monkeypatch: pytest.MonkeyPatch, batch: dict[str, Tensor]) -> None:
    monkeypatch.setattr(support, "PROVEN", frozenset())
    fold(make())
    liar = make()
    # Positions of its own, as a model has that does not take those it is given.
    rotary = liar.model.rotary_emb.forward
    liar.model.rotary_emb.forward = lambda x, positions: rotary(x, torch.arange(x.shape[1])[None])
    with pytest.raises(UnsupportedModelError, match="on a test batch the outputs of the folded model differ"):
        fold(liar)
    assert "forward" not in vars(liar)


def test_a_layer_without_attention_is_found(model: Any, batch: dict[str, Tensor]) -> None:
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    fold(model)
    with pytest.raises(UnsupportedModelError, match="1 of its 2 layers attended"):
        model(**batch)


@torch.no_grad()
def test_an_empty_sequence_and_an_empty_batch(model: Any) -> None:
    fold(model)
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.tensor([[0, 0, 0], [1, 1, 0]])
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert not logits[0].any()
    assert logits[1, :2].any()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# bfloat16 keeps 8 bits; two layers of them, and kernels that sum in other orders.
HALF = 4e-2


@needs_cuda
@torch.no_grad()
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("level", ["none", "mlp", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_cuda(batch: dict[str, Tensor], level: Any, graphs: bool, device: Any) -> None:
    """Twice with other batches: a replay must not see the one before. Ids may come from the CPU."""
    model = make().to("cuda", torch.bfloat16)
    batch = {name: value.to("cuda") for name, value in batch.items()}
    mask = batch["attention_mask"][..., None]
    whole = make().to("cuda")
    fold(model, level=level, cuda_graphs=graphs)
    for shift in (0, 1, 2):
        other = {**batch, "input_ids": (batch["input_ids"] + shift) % 64}
        expected = whole(**other).logits * mask
        found = model(**{name: value.to(device) for name, value in other.items()}).logits
        assert (found - expected).abs().max() <= HALF * expected.abs().max()


@needs_cuda
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("compiled", ["nothing", "layers", "all"])
def test_graphs_of_large_heads(batch: dict[str, Tensor], compiled: str) -> None:
    """Of heads that Hopper's kernel takes; what torch.compile makes is captured as well."""
    config = Qwen3Config(**SIZES | {"head_dim": 64})
    batch = {name: value.to("cuda") for name, value in batch.items()}
    whole = make(config).to("cuda")
    model: Any = fold(make(config).to("cuda", torch.bfloat16), cuda_graphs=True)
    run = torch.compile(model, dynamic=True) if compiled == "all" else model
    for layer in model.model.layers if compiled == "layers" else ():
        layer.compile(dynamic=True)
    for shift in (0, 1, 2):
        other = {**batch, "input_ids": (batch["input_ids"] + shift) % 64}
        expected = whole(**other).logits * batch["attention_mask"][..., None]
        assert (run(**other).logits - expected).abs().max() <= HALF * expected.abs().max()


@needs_cuda
def test_graphs_follow_moved_weights_and_modes(batch: dict[str, Tensor]) -> None:
    model = make().to("cuda", torch.bfloat16)
    batch = {name: value.to("cuda") for name, value in batch.items()}
    fold(model, cuda_graphs=True)
    with torch.inference_mode():
        first = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, first)
        model.to("cpu").to("cuda")
        for parameter in model.parameters():
            parameter.mul_(2)
        assert not torch.equal(model(**batch).logits, first)
    model(**batch).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad is not None
