"""The attention implementation that folded models run in place of their own."""

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from radix_mlp.fold import Fold
from radix_mlp.torch import attention, fold_handle
from radix_mlp.torch.dispatch import Backend, attended
from radix_mlp.torch.eager import eager
from radix_mlp.transformers.support import UnsupportedModelError

Level = Literal["none", "mlp", "full"]

# The keyword through which a model hands the batch down to its attention layers.
KEYWORD = "radix_mlp_attention"
PREFIX = "radix_mlp+"


class Attend(Protocol):
    """How the rows of one batch attend: `q` [rows, heads, head_dim], `k` and `v` [rows, key heads, head_dim]."""

    @property
    def windows(self) -> Counter[int | None]:
        """How many layers have attended with which window."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None, window: int | None
    ) -> Tensor: ...


class FoldedAttention:
    """Attention over the rows of `fold`, at level "none" one that shares nothing, or at level "full".

    At level "mlp", `copies` is the same batch with nothing shared: queries, keys and values are
    unfolded to it and the result is folded back in every layer (arXiv 2601.15013).
    """

    def __init__(self, fold: Fold, backend: Backend | None, copies: Fold | None = None) -> None:
        self.fold, self.backend, self.copies = fold, backend, copies
        self.handle = fold_handle(fold)

    @property
    def windows(self) -> Counter[int | None]:
        """How many layers have attended with which window."""
        return attended(self.fold if self.copies is None else self.copies)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None, window: int | None
    ) -> Tensor:
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, "backend": self.backend}
        if self.copies is None:
            return attention(q, k, v, self.handle, **options)
        return self._attend_copies(q, k, v, self.copies, options)

    @eager
    def _attend_copies(self, q: Tensor, k: Tensor, v: Tensor, copies: Fold, options: dict[str, Any]) -> Tensor:
        q, k, v = self.fold.unfold(q), self.fold.unfold(k), self.fold.unfold(v)
        return self.fold.fold(attention(q, k, v, copies, **options))


def install(model: PreTrainedModel) -> str:
    """Put the folded attention in place of the model's own, which it still runs where nothing is folded.

    Returns the name of the model's own.
    """
    original: str = model.config._attn_implementation or "eager"
    model.config._attn_implementation = register(original)
    return original


def register(original: str) -> str:
    """Tell transformers of the folded attention in place of `original`; returns the name of it."""
    name = PREFIX + original
    AttentionInterface.register(name, partial(_attention_forward, original))
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _attention_forward(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`query` [1, heads, rows, head_dim] and so on; the result is [1, rows, heads, head_dim]."""
    attend: Attend | None = options.pop(KEYWORD, None)
    if attend is None:
        return _interface(original, module)(module, query, key, value, attention_mask, **options)
    return _attend(attend, module, query, key, value, options), None


def _attend(
    attend: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Tensor:
    name = type(module).__name__
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{name} is bidirectional: what a token sees differs between its copies")
    for option, meaning in (("s_aux", "attention sinks"), ("position_bias", "a position bias")):
        if options.get(option) is not None:
            raise UnsupportedModelError(f"{name} has {meaning}, which folded attention does not compute")
    if options.get("dropout"):
        raise UnsupportedModelError(
            f"{name} has active dropout of {options['dropout']}: copies of a token would draw different masks. "
            "Set attention_dropout to 0 or call model.eval()"
        )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    out = attend(q, k, v, options.get("scaling"), options.get("softcap"), options.get("sliding_window"))
    return out.unsqueeze(0)


def _interface(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function `name`; "eager" is each model's own."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return function
