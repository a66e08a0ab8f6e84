"""What a folded model refuses, each for its own reason. Whole families are in models.py."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3Config, Qwen3Model
from transformers.modeling_outputs import BaseModelOutputWithPast

from models import FAMILIES, TINY, Options
from radix_mlp.transformers import UnsupportedModelError, fold

IDS = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
BY_NAME = {family.name: family for family in FAMILIES}


def qwen3() -> Any:
    return BY_NAME["Qwen3"].model()


def test_multimodal_models() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "llava",
        text_config={**TINY, "model_type": "llama"},
        vision_config={**vision, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
    )
    model: Any = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedModelError, match=r"it is multimodal.*Fold its language model"):
        fold(model)
    fold(model.model.language_model)


def test_convolutions() -> None:
    model = qwen3()
    model.model.layers[0].mlp.mixer = nn.Conv1d(4, 4, 3)
    with pytest.raises(UnsupportedModelError, match="it has convolutions, which mix neighbours"):
        fold(model)


class WithoutPositions(Qwen3Model):  # type: ignore[no-untyped-call]
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)


def test_models_that_take_no_positions() -> None:
    with pytest.raises(UnsupportedModelError, match="it takes no position_ids"):
        fold(WithoutPositions(Qwen3Config(**TINY)))


def test_attention_that_is_not_causal() -> None:
    model = qwen3()
    attention = model.model.layers[1].self_attn
    attention.is_causal = False
    with pytest.raises(UnsupportedModelError, match="its attention is bidirectional"):
        fold(model)
    attention.is_causal = True
    fold(model)
    attention.is_causal = False
    with pytest.raises(UnsupportedModelError, match="Qwen3Attention is bidirectional"):
        model(input_ids=IDS)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"attentions": {"of": "another kind"}}, "returned attentions, a dict"),
        ({"attentions": (torch.zeros(1, 4, 2, 2),)}, r"returned attentions of shape \(1, 4, 2, 2\), where \[1, 6,"),
        ({"hidden_states": torch.zeros(6, 48)}, r"returned hidden_states of shape \(6, 48\), where \[1, 6,"),
    ],
)
def test_outputs_of_an_unknown_kind(extra: Options, message: str) -> None:
    model = qwen3()
    own = model.model.forward

    def forward(
        input_ids: Tensor, position_ids: Tensor, cache: Any = None, past_key_values: Any = None, **options: Any
    ) -> Any:
        states = own(input_ids=input_ids, position_ids=position_ids, **options).last_hidden_state
        return BaseModelOutputWithPast(last_hidden_state=states, **extra)

    model.model.forward = forward
    fold(model.model)
    with pytest.raises(UnsupportedModelError, match=message):
        model.model(input_ids=IDS)


@pytest.mark.parametrize(
    ("family", "argument", "error", "message"),
    [
        ("Qwen3", {"token_type_ids": torch.zeros_like(IDS)}, ValueError, "is shared, not token_type_ids"),
        ("Qwen3", {"encoder_hidden_states": torch.zeros(2, 4, 48)}, ValueError, "is shared, not encoder_hidden_states"),
        ("Qwen3-MoE", {"output_router_logits": True}, ValueError, "has no output_router_logits: unfold it"),
        ("Qwen3", {"is_causal": False}, UnsupportedModelError, "Qwen3Attention is bidirectional"),
        ("Qwen3", {"s_aux": torch.zeros(4)}, UnsupportedModelError, "Qwen3Attention has attention sinks"),
        ("Qwen3", {"position_bias": torch.zeros(4)}, UnsupportedModelError, "Qwen3Attention has a position bias"),
    ],
)
def test_arguments(family: str, argument: Options, error: type[Exception], message: str) -> None:
    model = fold(BY_NAME[family].model())
    model(input_ids=IDS)
    with pytest.raises(error, match=message):
        model(input_ids=IDS, **argument)


def test_router_logits_that_the_config_asks_for() -> None:
    model = fold(BY_NAME["Qwen3-MoE"].model(output_router_logits=True))
    with pytest.raises(ValueError, match="has no output_router_logits: unfold it"):
        model(input_ids=IDS)
    model(input_ids=IDS, output_router_logits=False)
