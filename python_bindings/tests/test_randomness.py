"""What a model draws at random in training would differ between copies of a token: it is refused, or shared."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models import FAMILIES, Options
from radix_mlp.transformers import UnsupportedModelError, fold

# Sequences that share four tokens.
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8]])
BY_NAME = {family.name: family for family in FAMILIES}
# The families whose configs spell their dropout or noise otherwise, and where a model holds it.
CASES = [
    ("Qwen3", {"attention_dropout": 0.3}, "layers.0.self_attn has attention_dropout=0.3"),
    ("OPT", {"dropout": 0.3}, "decoder has dropout=0.3"),
    ("StarCoder2", {"residual_dropout": 0.3}, "layers.0.self_attn has residual_dropout=0.3"),
    ("StarCoder2", {"embedding_dropout": 0.3}, "model has embedding_dropout=0.3"),
    ("Seed-OSS", {"residual_dropout": 0.3}, "layers.0.self_attn has residual_dropout=0.3"),
    ("GPT-2", {"embd_pdrop": 0.3}, "transformer.drop has p=0.3"),
    ("DBRX", {"resid_pdrop": 0.3}, "blocks.0 has resid_pdrop=0.3"),
    ("DBRX", {"ffn_config": {"moe_jitter_eps": 0.3}}, "router has moe_jitter_eps=0.3"),
    ("Mixtral", {"router_jitter_noise": 0.3}, "layers.0.mlp has jitter_noise=0.3"),
    ("MiniMax-M2", {"router_jitter_noise": 0.3}, "layers.0.mlp has jitter_noise=0.3"),
]


def made(family: str, changes: Options) -> PreTrainedModel:
    own = BY_NAME[family]
    merged = {
        name: {**own.options[name], **value} if isinstance(value, dict) else value for name, value in changes.items()
    }
    model = own.model(**merged)
    model.train()
    return model


def states(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states[-1]
    return found


@pytest.mark.parametrize(("family", "changes", "reason"), CASES, ids=lambda value: str(value))
def test_refused_while_it_is_active(family: str, changes: Options, reason: str) -> None:
    model = made(family, changes)
    assert not torch.equal(states(model), states(model))
    fold(model)
    with pytest.raises(UnsupportedModelError, match=re.escape(reason)):
        states(model)
    model.train(False)
    assert torch.equal(states(model), states(model))


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_dropout_layers_of_any_kind(kind: type[nn.Module]) -> None:
    model: Any = made("Qwen3", {})
    model.model.layers[0].mlp.add_module("extra", kind(p=0.3))
    fold(model)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.extra has p=0\.3"):
        states(model)
    model.model.layers[0].mlp.extra.p = 0.0
    states(model)


def test_noise_of_the_trainer() -> None:
    """NEFTune (arXiv 2310.05914), which transformers' Trainer leaves on the embeddings; by the number of tokens."""
    model: Any = made("Qwen3", {})
    model.model.embed_tokens.neftune_noise_alpha = 5.0
    fold(model)
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens has neftune_noise_alpha=5\.0"):
        states(model)


def test_experts_drawn_at_random() -> None:
    model = made("Phi-3.5-MoE", {})
    fold(model)
    with pytest.raises(UnsupportedModelError, match="draws experts at random"):
        states(model)


@pytest.mark.parametrize(("family", "changes"), [case[:2] for case in CASES if case[0] != "Qwen3"])
def test_copies_share_what_was_asked_for(family: str, changes: Options) -> None:
    model = fold(made(family, changes), allow_dropout=True)
    found = states(model)
    assert torch.equal(found[0, :4], found[1, :4])
    assert not torch.equal(states(model), found)


def test_dropout_within_attention_is_refused_always() -> None:
    model = fold(made("Qwen3", {"attention_dropout": 0.3}), allow_dropout=True)
    with pytest.raises(UnsupportedModelError, match=r"Qwen3Attention has active dropout of 0\.3"):
        states(model)
