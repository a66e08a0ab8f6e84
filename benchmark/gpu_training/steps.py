"""The ways to make one training step of which the benchmark compares the costs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AutoModelForCausalLM

from gpu_forward.batches import Batch
from gpu_forward.measure import DEVICE, compile_layers
from gpu_forward.models import SHAPES, padded, twin
from radix_mlp.torch import cross_entropy
from radix_mlp.transformers import fold
from radix_torch_varlen import Batch as Folded
from radix_torch_varlen import Level, Qwen3, Qwen3Config, Residual

IGNORED = -100
# Layers that torch.compile makes one graph of: where rows are few, calls of graphs would be what the GPU waits for.
LAYERS_OF_A_GRAPH = 7
# No call checks that modules are still what was compiled, nor what sizes products have: the GPU could wait for that.
# No pattern makes one call of a product and the addition behind it, which copies what is added to and keeps it from
# the norm's kernel, where it costs nothing.
OPTIONS = {
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    "size_asserts": False,
    "alignment_asserts": False,
    "pattern_matcher": False,
}

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Groups:
    """Sequences of which each `size` share their first `prompt` tokens; with `prompt` 0 they may share anything."""

    sequences: Batch
    prompt: int = 0
    size: int = 1

    @cached_property
    def arrays(self) -> list[NDArray[np.int64]]:
        """The sequences as data loaders hold them."""
        return [np.asarray(ids) for ids in self.sequences]

    @cached_property
    def labels(self) -> dict[bool, Tensor]:
        """As data loaders make them, by whether they are of completions only: the next token of each, [N]."""
        own = Folded.from_sequences(self.arrays, "none").labels
        positions = torch.cat([torch.arange(len(ids)) for ids in self.sequences])
        return {False: own, True: own.masked_fill(positions < self.prompt - 1, IGNORED)}


def own_model(shape: str) -> Qwen3:
    """The readable model at the sizes of transformers' configuration, with random weights."""
    config = SHAPES[shape]
    names = set(Qwen3Config.__dataclass_fields__) - {"windows"}
    torch.manual_seed(0)
    with DEVICE:
        model = Qwen3(Qwen3Config(**{name: getattr(config, name) for name in names}), head_into_grad=True)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=config.initializer_range)
    return model.bfloat16()


class Stack(nn.ModuleList):
    """Layers that follow each other, in the place of one."""

    def forward(self, x: Residual, *context: Any) -> Residual:
        for layer in self:
            x = layer(x, *context)
        return x


def compiled(own: Qwen3) -> Qwen3:
    """The model with the same parameters in memory, and layers by torch.compile."""
    fused = copy.deepcopy(own, {id(parameter): parameter for parameter in own.parameters()})
    starts = range(0, len(fused.layers), LAYERS_OF_A_GRAPH)
    fused.layers = nn.ModuleList(Stack(fused.layers[start : start + LAYERS_OF_A_GRAPH]) for start in starts)
    compile_layers(fused.layers, OPTIONS)
    return fused


def their_model(shape: str, own: Qwen3) -> Any:
    """transformers' model with the same parameters, so that one zero_grad frees the gradients of both."""
    make: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = make(SHAPES[shape], dtype=torch.bfloat16, attn_implementation="sdpa")
    parameters = own.state_dict(keep_vars=True).items()
    weights = {name if name.startswith("lm_head") else f"model.{name}": x for name, x in parameters}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    # What has no weights was not loaded: the rotary frequencies.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(SHAPES[shape]).to(DEVICE)
    return model.train()


def set_checkpointing(own: Qwen3, fused: Qwen3, theirs: Any, *, on: bool) -> None:
    """Whether the backward pass computes each layer again instead of keeping its activations."""
    own.checkpointing = fused.checkpointing = on
    if on:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        theirs.gradient_checkpointing_disable()


def steps(own: Qwen3, fused: Qwen3, theirs: Any, groups: Groups, *, completions_only: bool) -> dict[str, Step]:
    """Each computes the mean loss; backward is the caller's."""
    labels, skipped = groups.labels[completions_only], groups.prompt if completions_only else 0
    made: dict[str, Step] = {
        "none": lambda: own_step(own, groups, "none", labels),
        "mlp": lambda: own_step(own, groups, "mlp", labels),
        "full": lambda: own_step(own, groups, "full", labels),
        "none compiled": lambda: own_step(fused, groups, "none", labels),
        "full compiled": lambda: own_step(fused, groups, "full", labels),
        "transformers folded": folded_step(theirs, groups, skipped),
        "transformers padded": padded_step(theirs, groups, labels),
    }
    if DEVICE.type == "cuda":
        made["transformers padding-free"] = padding_free_step(theirs, groups, labels)
    if completions_only and (grouper := prefix_grouper_step(theirs, groups)):
        made["PrefixGrouper"] = grouper
    return made


def own_step(own: Qwen3, groups: Groups, level: Level, labels: Tensor) -> Tensor:
    own.backend = "query_folded" if level != "full" and DEVICE.type == "cuda" else None
    return own.loss(Folded.from_sequences(groups.arrays, level, DEVICE, labels=labels))


def folded_step(theirs: Any, groups: Groups, skipped: int) -> Step:
    """One line of radix_mlp.transformers, which reads the ids on the host."""
    ids, mask = padded(groups.sequences)
    labels = ids.masked_fill((mask == 0) | (torch.arange(ids.shape[1]) < skipped), IGNORED)
    model = fold(twin(theirs))

    def step() -> Tensor:
        loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        return loss

    return step


def padded_step(theirs: Any, groups: Groups, labels: Tensor) -> Step:
    """sdpa on the padded batch. Its logits would not fit: the loss is ours, chunk by chunk, here and below."""
    ids, mask = (x.to(DEVICE) for x in padded(groups.sequences))
    plain = Folded.from_sequences(groups.arrays, "none", DEVICE)
    tokens = mask.flatten().nonzero()[:, 0]

    def step() -> Tensor:
        states = theirs.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return cross_entropy(states.flatten(0, 1)[tokens], theirs.lm_head.weight, plain.tokens, labels)

    return step


def padding_free_step(theirs: Any, groups: Groups, labels: Tensor) -> Step:
    """All tokens in one row, told apart by their positions: FlexAttention, as flash-attn is no wheel of PyPI."""
    plain = Folded.from_sequences(groups.arrays, "none", DEVICE)
    model: Any = twin(theirs)
    model.set_attn_implementation("flex_attention")
    ids, positions = plain.input_ids[None].long(), plain.position_ids[None].long()

    def step() -> Tensor:
        states = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return cross_entropy(states[0], theirs.lm_head.weight, plain.tokens, labels)

    return step


def prefix_grouper_step(theirs: Any, groups: Groups) -> Step | None:
    """PrefixGrouper (arXiv 2506.05433) by its own attention interface, if the package is installed.

    Its authors run it with flash-attn, in the place of which stands torch's FlashAttention.
    """
    try:
        from prefix_grouper import PrefixGrouper
        from prefix_grouper.utils.register_transformers import register_attention
    except ImportError:
        return None
    register_attention()
    AttentionInterface.register("lower_right", lower_right)
    model: Any = twin(theirs)
    model.set_attn_implementation("prefix_grouper_attention")
    rows = torch.tensor(groups.sequences, device=DEVICE)
    prompts, completions = rows[:: groups.size, : groups.prompt], rows[:, groups.prompt :]
    masks = torch.ones_like(prompts), torch.ones_like(completions)
    own = torch.arange(groups.prompt, rows.shape[1], device=DEVICE).repeat(groups.size)
    positions = torch.cat([torch.arange(groups.prompt, device=DEVICE), own]).expand(len(prompts), -1)
    unshared = Folded.from_sequences(list(completions.cpu()), "none").tokens
    labels = completions.flatten().cpu()

    def step() -> Tensor:
        grouper = PrefixGrouper.from_ungrouped_masks(*masks, group_sizes=groups.size, device=DEVICE)
        ids = grouper.concat_input(prompts, masks[0], completions, masks[1])
        call = {"prefix_grouper": grouper, "prefix_grouper_attn_func": "lower_right"}
        states = model.model(input_ids=ids, position_ids=positions, use_cache=False, **call).last_hidden_state
        states = grouper.split_output(states, include_prefix_last=1)[2][:, :-1]
        return cross_entropy(states.flatten(0, 1), theirs.lm_head.weight, unshared, labels)

    return step


def lower_right(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """Queries are the last of the keys' tokens."""
    bias = causal_lower_right(query.shape[2], key.shape[2])
    mixed = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scaling, enable_gqa=True
    )
    return mixed.transpose(1, 2), None
