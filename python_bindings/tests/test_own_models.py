"""Models with code, a loss or attention of a user's own: folded to the same numbers, or refused."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models import EXPERTS, FAMILIES, NO_DROPOUT, TINY
from radix_mlp.transformers import UnsupportedModelError, fold
from radix_mlp.transformers.folding import CACHE_NAMES, is_folded
from radix_mlp.transformers.support import is_proven
from tiny import SIZES, assert_close, make, padded


def made(kind: type) -> Any:
    torch.manual_seed(0)
    return kind(Qwen3Config(**SIZES)).train(mode=False)


class Renamed(Qwen3Model):  # type: ignore[no-untyped-call]
    """Whose other arguments are not called kwargs."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        return super().forward(input_ids, self.mask(attention_mask), position_ids, past_key_values, **options)

    def mask(self, mask: Any) -> Any:
        return mask


class Bidirectional(Renamed):  # type: ignore[no-untyped-call]
    """As embedders that are made of decoders: the mask alone is changed."""

    def mask(self, mask: Any) -> Any:
        if mask is None or mask.ndim > 2:
            return mask
        return mask.bool()[:, None, None].expand(-1, 1, mask.shape[1], -1)


class WithoutCache(Qwen3Model):  # type: ignore[no-untyped-call]
    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> Any:
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class Unnamed(Qwen3Model):  # type: ignore[no-untyped-call]
    def forward(self, *args: Any, position_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, position_ids=position_ids, **kwargs)


class OwnPositions(Qwen3Model):  # type: ignore[no-untyped-call]
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        rotary = self.rotary_emb.forward
        self.rotary_emb.forward = lambda x, positions: rotary(x, torch.arange(x.shape[1])[None])


class OwnLoss(Qwen3ForCausalLM):  # type: ignore[no-untyped-call]
    def forward(self, *args: Any, labels: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        if labels is not None:
            output.loss = output.logits.logsumexp(-1).sum()
        return output


class LossInTraining(Qwen3ForCausalLM):  # type: ignore[no-untyped-call]
    def forward(self, *args: Any, labels: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = super().forward(*args, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        if labels is not None and self.training:
            output.loss = output.loss + 1
        return output


class SameLoss(Qwen3ForCausalLM):  # type: ignore[no-untyped-call]
    def forward(self, *args: Any, labels: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        return super().forward(*args, labels=labels, logits_to_keep=logits_to_keep, **kwargs)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_the_tests_cover_is_not_tried(family: Any) -> None:
    model = family.model()
    assert is_proven(model)
    assert is_proven(model.base_model)


@pytest.mark.parametrize("kind", [Bidirectional, OwnPositions])
def test_a_subclass_that_computes_something_else_is_refused(kind: type) -> None:
    model = made(kind)
    with pytest.raises(UnsupportedModelError, match="differ from its own"):
        fold(model)
    assert not is_folded(model)


@torch.no_grad()
def test_options_by_another_name(batch: dict[str, Tensor]) -> None:
    mask = batch["attention_mask"][..., None]
    plain = made(Renamed)(**batch, output_hidden_states=True)
    model = fold(made(Renamed))
    output = model(**batch, output_hidden_states=True, use_cache=True)
    assert any(name in output for name in CACHE_NAMES)
    for found, expected in zip(output.hidden_states, plain.hidden_states, strict=True):
        assert_close(found, expected * mask)
    packed = {"input_ids": torch.tensor([[5, 6, 7, 5, 6]]), "cu_seq_lengths": torch.tensor([0, 3, 5])}
    assert_close(model(**packed).last_hidden_state, fold(made(Qwen3Model))(**packed).last_hidden_state)


def test_forwards_that_cannot_be_read(batch: dict[str, Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match="WithoutCache takes no cache"):
        fold(made(WithoutCache))
    model = fold(made(Unnamed))
    assert_close(model(**batch).last_hidden_state, fold(made(Qwen3Model))(**batch).last_hidden_state)
    with pytest.raises(TypeError, match=r"Unnamed\.forward does not name 1 of its arguments: pass them by name"):
        model(batch["input_ids"], attention_mask=batch["attention_mask"])


def doubled(module: Any, query: Tensor, *others: Any, scaling: float, **options: Any) -> Any:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *others, scaling=2 * scaling, **options)


def same(*arguments: Any, **options: Any) -> Any:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](*arguments, **options)


@torch.no_grad()
def test_own_attention_is_proved_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first without a mask function, for which transformers makes no mask."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "doubled", doubled)
    monkeypatch.setitem(AttentionInterface._global_mapping, "same", same)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "same", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    batch = padded("right")
    kept = batch["attention_mask"].bool()
    for name in ("doubled", "same"):
        model = make()
        model.set_attn_implementation(name)
        expected = model(**batch).logits[kept]
        if name == "doubled":
            with pytest.raises(UnsupportedModelError, match="attends by 'doubled', and is none that the tests cover"):
                fold(model)
            assert model.config._attn_implementation == "doubled"
        else:
            assert_close(fold(model)(**batch).logits[kept], expected)


def own_loss(model: Any) -> None:
    model.loss_function = lambda logits, labels, vocab_size, **_: (
        7 * cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    )


def hook_on_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 2)


def hook_before_head(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def untold_head(model: Any) -> None:
    model.get_output_embeddings = lambda: None


@pytest.mark.parametrize(
    ("change", "whole"),
    [(own_loss, True), (hook_on_head, True), (hook_before_head, False), (untold_head, True)],
)
def test_a_users_loss_and_logits_are_trained_on(change: Any, whole: bool) -> None:
    plain, model = make(), make()
    change(plain)
    change(model)
    assert_trained(plain, fold(model), whole=whole)


def test_a_forward_around_the_models_own_runs_in_training() -> None:
    """As accelerate puts autocast around one."""
    model, calls = make().train(), []
    own = model.forward

    @functools.wraps(own)
    def around(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = around
    batch = padded("right")
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    expected = make().train()(**batch, labels=labels).loss
    assert_close(fold(model)(**batch, labels=labels).loss, expected)
    assert calls == [1]


@pytest.mark.parametrize("kind", [OwnLoss, LossInTraining])
@pytest.mark.parametrize("training", [False, True])
def test_a_loss_in_a_forward_of_its_own_is_refused(training: bool, kind: type, batch: dict[str, Tensor]) -> None:
    plain, model = made(kind), fold(made(kind).train(training))
    kept = batch["attention_mask"].bool()
    assert_close(model(**batch).logits[kept], plain(**batch).logits[kept])
    with pytest.raises(ValueError, match=f"{kind.__name__} computes a loss that folding does not know: pass no labels"):
        model(**batch, labels=batch["input_ids"])


def test_a_loss_that_is_put_into_transformers_own_class_is_refused(
    monkeypatch: pytest.MonkeyPatch, batch: dict[str, Tensor]
) -> None:
    own = Qwen3ForCausalLM.forward

    def forward(self: Any, *args: Any, labels: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = own(self, *args, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        output.loss = None if labels is None else 2 * output.loss
        return output

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", forward)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM computes a loss that folding does not know"):
        fold(made(Qwen3ForCausalLM))(**batch, labels=batch["input_ids"])


def test_dropout_is_no_difference(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model: Any = fold(SameLoss(Qwen3Config(**SIZES, attention_dropout=0.5)).train())
    assert model.eval()(**batch, labels=batch["input_ids"]).loss > 0


def test_the_models_loss_in_a_forward_of_its_own_makes_no_logits() -> None:
    """As kernels of others put one into a class."""
    assert_trained(made(SameLoss), fold(made(SameLoss)), whole=False)


def test_a_type_whose_loss_is_none_that_is_known_is_trained_on_its_logits() -> None:
    """HyperCLOVA X multiplies logits by what others divide them by."""
    pytest.importorskip("transformers.models.hyperclovax")
    config = AutoConfig.for_model("hyperclovax", **TINY, **NO_DROPOUT, logits_scaling=4.0)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    assert_trained(model, fold(copy.deepcopy(model)), whole=True)


def assert_trained(plain: Any, model: Any, *, whole: bool) -> None:
    batch = padded("right")
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    expected, output = plain.train()(**batch, labels=labels).loss, model.train()(**batch, labels=labels)
    torch.autograd.backward([expected, output.loss])
    assert_close(output.loss, expected)
    assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad)
    assert (output.logits is not None) == whole


def test_trying_a_type_out_leaves_its_modules_as_they_were() -> None:
    config = AutoConfig.for_model("granitemoeshared", **TINY, **EXPERTS, **NO_DROPOUT)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.train().model.layers[0].eval()
    before = [module.training for module in model.modules()]
    fold(model)
    assert [module.training for module in model.modules()] == before


def test_dropout_that_is_active_in_a_part(batch: dict[str, Tensor]) -> None:
    model = make()
    model.model.norm.drop = nn.Dropout(0.5).eval()
    fold(model)
    model(**batch)
    model.model.train()
    assert not model.training
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.drop has p=0\.5"):
        model(**batch)
