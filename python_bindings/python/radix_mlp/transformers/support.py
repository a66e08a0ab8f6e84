"""Which models can be folded, and why others cannot."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

# Model types for which the tests compare every fold level with the plain model.
PROVEN = frozenset(
    """
    afmoe apertus arcee bitnet cohere cohere2 cwm dbrx deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5
    ernie4_5_moe exaone4 flex_olmo gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe gpt2
    gpt_bigcode gpt_neox granite granitemoe helium hunyuan_v1_dense hunyuan_v1_moe jetmoe llama minicpm3
    minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder nanochat olmo olmo2 olmo3 olmoe opt
    persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2 vaultgemma
    """.split()  # noqa: SIM905
)
# Where transformers' own code is; what comes with a checkpoint is in transformers_modules.
OWN_CODE = "transformers."
# What transformers calls its own attention functions.
OWN_ATTENTION = {"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
FOLDED_LAYERS = {"full_attention", "sliding_attention"}
# With rotary embeddings, but norms behind them or a scale by position.
ABSOLUTE = {"hunyuan_v1_dense", "hunyuan_v1_moe", "ministral3"}
# With windows that attention is not told of.
WINDOW_IN_MASK = {"phimoe"}
RANDOM_ROUTING = {"phimoe"}
# In the names of probabilities and magnitudes of what is drawn at random: modules hold them as numbers of their own.
RANDOM_WORDS = ("drop", "jitter", "noise")
# With learned positions that the model counts from the attention mask.
COUNTED_BY_MASK = {"opt"}
# Rotary embeddings whose frequencies follow the largest position of a call: with it, or by one step.
GROWING, SWITCHING = "dynamic", "longrope"


class UnsupportedModelError(ValueError):
    """Folding this model would give other numbers than the model itself: the message says why."""


def find_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model that `model` is or wraps (SentenceTransformer, CrossEncoder, PEFT, compiled)."""
    found: list[PreTrainedModel] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not any(module in set(outer.modules()) for outer in found):
            found.append(module)
    if len(found) != 1:
        names = ", ".join(type(module).__name__ for module in found) or "none"
        raise UnsupportedModelError(f"{type(model).__name__} must hold one transformers model, found {names}")
    return found[0]


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError where `model` is known not to be a causal decoder that can be folded."""
    if reason := _reason(model):
        raise UnsupportedModelError(f"{type(model).__name__} cannot be folded: {reason}")


def is_proven(model: PreTrainedModel) -> bool:
    """Whether the tests fold such a model: its type, with transformers' own code for it and its own attention."""
    classes = [_without_fsdp(type(each)) for each in (model, model.base_model)]
    own = all(code.__module__.startswith(OWN_CODE) for kind in classes for code in (kind, kind.forward))
    return own and model.config.model_type in PROVEN and (model.config._attn_implementation or "eager") in OWN_ATTENTION


def has_lm_head(model: PreTrainedModel) -> bool:
    """Whether `model` is more than its decoder, and makes logits of its states."""
    return model is not model.base_model and "logits_to_keep" in inspect.signature(model.forward).parameters


def embeddings_of(model: PreTrainedModel) -> tuple[Tensor, torch.device]:
    """The embeddings of tokens, and the device on which they are looked up: accelerate may keep them elsewhere."""
    module: Any = model.get_input_embeddings()
    weight: Tensor = next(module.parameters())
    return weight, torch.device(module._hf_hook.execution_device) if weight.is_meta else weight.device


def _without_fsdp(kind: type) -> Any:
    """FSDP2 makes a subclass."""
    return next(each for each in kind.__mro__ if not each.__module__.startswith("torch.distributed."))


def drawing_modules(model: PreTrainedModel) -> list[nn.Module]:
    """What of `model` draws random numbers where it trains."""
    return [module for module in model.modules() if _randomness(module) is not None]


def refuse_dropout(model: PreTrainedModel, drawing: list[nn.Module]) -> None:
    """Raises UnsupportedModelError where `model` draws random numbers, by dropout or by noise: copies share theirs.

    In evaluation only `drawing_modules` are asked: there are few, if any, and most calls come in evaluation.
    """
    if not model.training and not any(module.training for module in drawing):
        return
    if model.config.model_type in RANDOM_ROUTING:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be folded in training: it draws experts at random, and copies of a token "
            "would draw different ones. Call model.eval()"
        )
    for path, module in model.named_modules():
        if module.training and (found := _randomness(module)):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be folded with active dropout or noise: copies of a token would draw "
                f"different values, and {path or 'the model'} has {found}. Set it to 0 or call model.eval()"
            )


def _randomness(module: nn.Module) -> str | None:
    """The attribute by which `module` drops or disturbs at random, and its value; None where nothing does."""
    if isinstance(module, _DropoutNd):
        return f"p={module.p}" if module.p > 0 else None
    for name, value in vars(module).items():
        if type(value) in (int, float) and value > 0 and any(word in name for word in RANDOM_WORDS):
            return f"{name}={value}"
    return None


def counts_padding(model: PreTrainedModel) -> bool:
    """Whether padding on the left, without position_ids, moves positions that `model` sees as such.

    Where only their differences matter, as with rotary embeddings, it may be left out of them: of types that the tests
    do not cover nobody knows.
    """
    if model.config.model_type in ABSOLUTE or model.config.model_type not in PROVEN:
        return True
    rotary = any("rotary" in type(module).__name__.lower() for module in model.modules())
    return not rotary and model.config.model_type not in COUNTED_BY_MASK


def rotary_limits(model: PreTrainedModel) -> list[tuple[str, int]]:
    """The kinds of rotary embeddings that follow the length of a call, and the positions from which on they do."""
    given = getattr(model.config, "rope_parameters", None) or {}
    ropes = [rope for rope in (given, *given.values()) if isinstance(rope, dict)]
    longest = getattr(model.config, "max_position_embeddings", 0)
    return [
        (rope["rope_type"], rope.get("original_max_position_embeddings") or longest)
        for rope in ropes
        if rope.get("rope_type") in (GROWING, SWITCHING)
    ]


def refuse_padding(model: PreTrainedModel, limits: list[tuple[str, int]], padded: int, longest: int) -> None:
    """Raises ValueError where padding changes rotary embeddings of `limits`, which the fold does not see.

    `padded` positions are spanned by a call with its padding, `longest` by its sequences.
    """
    for kind, limit in limits:
        if longest < padded > limit and (kind == GROWING or longest <= limit):
            raise ValueError(
                f"padding spans {padded} positions and the longest sequence {longest}: past {limit}, the {kind} rotary "
                f"embeddings of {type(model).__name__} are others. Pad to the longest sequence, or unfold the model"
            )


def _reason(model: PreTrainedModel) -> str | None:
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, whose encoder is bidirectional"
    if config.get_text_config() is not config:
        return "it is multimodal, and what stands for an image is not told by token ids. Fold its language model"
    layers = set(getattr(config, "layer_types", None) or ()) - FOLDED_LAYERS
    if layers:
        return f"it has layers of {', '.join(sorted(layers))}, whose state is not that of attention over a path"
    if getattr(model, "_is_stateful", False):
        return "it is recurrent: its state is not that of attention over a path"
    if _alibi(model):
        return "it has ALiBi, a bias by distance that folded attention does not compute"
    if config.model_type in WINDOW_IN_MASK and config.sliding_window is not None:
        return f"it does not tell attention its sliding window of {config.sliding_window}"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "it has attention sinks, which folded attention does not compute"
    if _bidirectional(model):
        return "its attention is bidirectional: what a token sees differs between its copies"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "it has convolutions, which mix neighbours outside attention"
    if not model._supports_attention_backend:
        return "it does not call attention through transformers' attention interface"
    if "position_ids" not in inspect.signature(type(model.base_model).forward).parameters:
        return "it takes no position_ids: the rows of the folded batch would get positions of their own"
    return None


def _alibi(model: PreTrainedModel) -> bool:
    config = model.config
    nested = getattr(config, "attn_config", None)
    flags = [getattr(config, "alibi", False), getattr(nested, "alibi", False), config.model_type == "bloom"]
    return any(map(bool, flags)) or getattr(config, "position_embedding_type", None) == "alibi"


def _bidirectional(model: PreTrainedModel) -> bool:
    flags = [getattr(model.config, name, None) for name in ("use_bidirectional_attention",)]
    causal = [getattr(module, "is_causal", True) for module in model.modules()]
    return any(map(bool, flags)) or getattr(model.config, "is_causal", True) is False or False in causal
