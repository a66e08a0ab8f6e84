"""Qwen3 in torch with prefixes computed once: the whole of RadixMLP in one file.

In a causal transformer the state of a token depends on the tokens before it and on nothing else. A batch of sequences
that start alike is a trie, and all tokens that stand at the same node of it have the same state in every layer. So the
batch is packed without padding, folded onto its trie, and every node is a row that is computed once.

How much is folded is one argument, `Level`:

    none    a row for each of the N tokens; nothing is folded
    mlp     a row for each of the N' nodes in all that works token by token: embedding, norms, projections, rotary
            positions, MLP. Queries, keys and values are unfolded to N rows in every layer, and the attention's output
            is folded again (RadixMLP, arXiv 2601.15013)
    full    N' rows everywhere: a node attends to its path in the trie, and the loss has one row of logits for a node

Read `Batch` first, then `mix` and `Qwen3.loss`, and `Residual` for training in bfloat16; the rest is Qwen3 as everybody
has it. README.md has the mathematics, the files test_*.py and proof_*.py the evidence.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from radix_mlp import Fold
from radix_mlp.torch import Head, attention, cross_entropy, fold_handle, next_token_labels
from radix_mlp.torch.dispatch import Backend

Level = Literal["none", "mlp", "full"]

# What tree attention reads.
LAYOUT: Final = "depth_first"


@dataclass(frozen=True)
class Batch:
    """Packed sequences, folded for one level.

    `fold` is what is computed: the trie of the batch, or at level "none" one that shares nothing. `handle` stands for
    it in compiled layers.
    `input_ids` and `position_ids` are int32 [rows], `scatter_indices` and `fold_gather` int32 [N] and [rows] as in
    `Fold`. `labels` are int64 [N], on the host, where the loss sorts them while the device is busy.
    """

    level: Level
    fold: Fold
    handle: Tensor
    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    scatter_indices: Tensor
    fold_gather: Tensor

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[ArrayLike],
        level: Level = "full",
        device: str | torch.device = "cpu",
        first_position: int = 0,
        labels: Tensor | None = None,
    ) -> "Batch":
        """Fold `sequences` of token ids, whose positions count from `first_position`.

        `labels` [N] are those of the data, with -100 where none counts; the next tokens where they are not given.
        """
        arrays = [np.asarray(ids, np.int64) for ids in sequences]
        bounds = np.cumsum([0, *map(len, arrays)])
        ids = np.concatenate([np.empty(0, np.int64), *arrays])
        positions = np.arange(len(ids)) - np.repeat(bounds[:-1], np.diff(bounds)) + first_position
        fold = _unshared(ids, positions, bounds) if level == "none" else Fold(ids, positions, bounds, layout=LAYOUT)
        own = fold.tensors(device)
        if labels is None:
            labels = next_token_labels(torch.from_numpy(ids), torch.from_numpy(bounds))
        handle = fold_handle(fold)
        return cls(level, fold, handle, own.input_ids, own.position_ids, labels, own.scatter_indices, own.fold_gather)

    @cached_property
    def tokens(self) -> Fold:
        """The batch with nothing shared: what attention sees at level "mlp", and the loss at "none" and "mlp"."""
        if self.level == "none":
            return self.fold
        ids, positions = (self.fold.unfold(rows) for rows in (self.fold.input_ids, self.fold.position_ids))
        return _unshared(ids, positions, self.fold.cu_seq_lengths)

    def unfold(self, rows: Tensor) -> Tensor:
        """The row of each token: [rows, ...] to [N, ...]."""
        return rows if self.level == "none" else _Unfold.apply(rows, self)  # type: ignore[no-untyped-call]

    def fold_rows(self, tokens: Tensor) -> Tensor:
        """The first token of each row: [N, ...] to [rows, ...]. Its copies hold the same, so any of them would do."""
        return tokens if self.level == "none" else tokens.index_select(0, self.fold_gather)


def _unshared(ids: NDArray[Any], positions: NDArray[Any], bounds: NDArray[Any]) -> Fold:
    """A trie with a node for each token, in the order of tokens: sequences with different salts share nothing."""
    return Fold(ids, positions, bounds, layout=LAYOUT, salts=np.arange(len(bounds) - 1))


class _Unfold(torch.autograd.Function):
    """Copies of rows; backward, a row's gradient is the sum of those of its copies.

    `index_select` would add them one by one, in any order: sorted by row once a batch, they are sums of segments.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return rows.index_select(0, batch.scatter_indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        fold: Fold = ctx.batch.fold
        order, copies = fold.derived(("copies", gradient.device), lambda: _copies(fold, gradient.device))
        # In float32 at least: a prompt may have hundreds of copies.
        sorted_copies = gradient.index_select(0, order).flatten(1).to(_precise(gradient.dtype))
        summed = torch.segment_reduce(sorted_copies, "sum", lengths=copies, axis=0, unsafe=True)
        return summed.to(gradient.dtype).view(-1, *gradient.shape[1:]), None


def _copies(fold: Fold, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens in the order of their rows [N], and how many each row has [rows]."""
    scatter = fold.scatter_indices.astype(np.int64)
    order = torch.from_numpy(np.argsort(scatter, kind="stable")).to(device)
    return order, torch.from_numpy(np.bincount(scatter, minlength=fold.num_rows)).to(device)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class UnsupportedConfigError(ValueError):
    """A config.json that this model would not compute as its authors meant it."""


@dataclass(frozen=True)
class Qwen3Config:
    """The sizes of a Qwen3, by the names of its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    # {"rope_theta", "rope_type": "default", "linear" or "yarn", and what that needs}
    rope_parameters: dict[str, Any] | None = None
    # For each layer the number of tokens that it sees, itself included; None for all.
    windows: tuple[int | None, ...] | None = None

    @classmethod
    def from_file(cls, path: Path) -> "Qwen3Config":
        """Read a Hugging Face config.json, of transformers 4 or 5. Raises UnsupportedConfigError."""
        values = json.loads(path.read_text())
        for name, expected in (("model_type", "qwen3"), ("hidden_act", "silu"), ("attention_dropout", 0.0)):
            if values.get(name, expected) != expected:
                raise UnsupportedConfigError(f"{name} is {values[name]!r} in {path}, expected {expected!r}")
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        rope = {"rope_theta": values.get("rope_theta", 10_000.0), **rope}
        rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
        rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
        values.setdefault("head_dim", 128)
        config = cls(
            **{name: values[name] for name in cls.__dataclass_fields__ if name in values and name != "rope_parameters"},
            rope_parameters=rope,
            windows=_windows(values),
        )
        rotary_frequencies(config)
        return config


def _windows(values: dict[str, Any]) -> tuple[int | None, ...]:
    layers = values["num_hidden_layers"]
    # What is left out is transformers' default.
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    first = values.get("max_window_layers", 28)
    default = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    kinds = values.get("layer_types") or default
    known = {"full_attention", "sliding_attention"} if window else {"full_attention"}
    if len(kinds) != layers or not known.issuperset(kinds):
        raise UnsupportedConfigError(
            f"layer_types {kinds} with a window of {window} are not supported: expected {layers} of {sorted(known)}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rotary_frequencies(config: Qwen3Config) -> tuple[Tensor, float]:
    """Radians a position [head_dim / 2], float32, and the factor of all cosines and sines.

    RoFormer (arXiv 2104.09864), with linear interpolation (arXiv 2306.15595) or YaRN (arXiv 2309.00071). Raises
    UnsupportedConfigError.
    """
    rope = config.rope_parameters or {"rope_type": "default", "rope_theta": 10_000.0}
    base, half = rope["rope_theta"], config.head_dim // 2
    frequencies = 1.0 / base ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    kind = rope["rope_type"]
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / rope["factor"], 1.0
    if kind != "yarn" or rope.get("mscale") or rope.get("mscale_all_dim"):
        raise UnsupportedConfigError(f"rope_parameters {rope} are not supported: expected default, linear or yarn")

    def dimension(turns: float) -> float:
        """The dimension that turns so often within the context that the model was trained for."""
        return half * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi)) / math.log(base)

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    # Dimensions that turn often stay; those that never turn once are interpolated.
    interpolated = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    factor = rope["factor"]
    attention_factor = rope.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return frequencies / factor * interpolated + frequencies * (1 - interpolated), attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [rows, heads, head_dim]; cos and sin are [rows, 1, head_dim].

    The sines of the first half are negative, so that the halves need only change places.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    """The projections of grouped-query attention, with normalised queries and keys; `mix` is what lies between them."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        hidden, bias, self.head_dim = config.hidden_size, config.attention_bias, config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [rows, heads, head_dim]: one row a node, however many sequences will ask for it."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v


def mix(q: Tensor, k: Tensor, v: Tensor, batch: Batch, window: int | None, backend: Backend | None) -> Tensor:
    """What each row takes from the values it may see, [rows, heads * head_dim]: where a layer differs by level."""
    if batch.level == "mlp":
        copies: Tensor = mix_copies(q, k, v, batch, window, backend)
        return copies
    # A node attends to its path: at level "none" the path is its sequence.
    return attention(q, k, v, batch.handle, window=window, backend=backend).flatten(1)


# Where torch.compile compiles a layer, its graph breaks here, and nowhere deeper.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def mix_copies(q: Tensor, k: Tensor, v: Tensor, batch: Batch, window: int | None, backend: Backend | None) -> Tensor:
    """The same at level "mlp": every token is a query again, of its own sequence's keys."""
    q, k, v = batch.unfold(q), batch.unfold(k), batch.unfold(v)
    mixed = attention(q, k, v, batch.tokens, window=window, backend=backend)
    return batch.fold_rows(mixed).flatten(1)


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)), SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Residual(NamedTuple):
    """The residual stream, to which layers add.

    Its `values` are [rows, hidden]. Where a folded batch is trained in 16 bits there is a `carrier` of as many elements
    in no memory, which brings the gradient back from layer to layer in float32. A row's gradient is the sum of its
    copies', rounded once where each of theirs would be, whose errors partly cancel: rounded at every addition, twice a
    layer, it would be further from the truth than the unfolded one.
    """

    values: Tensor
    carrier: Tensor | None

    @classmethod
    def begin(cls, values: Tensor, level: Level) -> "Residual":
        rounds = _precise(values.dtype) != values.dtype
        if level == "none" or not rounds or not torch.is_grad_enabled():
            return cls(values, None)
        return cls(*_Add.apply(torch.zeros_like(values), _carrier(values), values))  # type: ignore[no-untyped-call]

    def plus(self, part: Tensor) -> "Residual":
        if self.carrier is None:
            return Residual(self.values + part, None)
        return Residual(*_Add.apply(self.values, self.carrier, part))  # type: ignore[no-untyped-call]

    def normed(self, norm: nn.RMSNorm) -> Tensor:
        """What `norm` makes of it [rows, hidden]; in float32 where there is a carrier, by which the gradient goes."""
        if self.carrier is None:
            normed: Tensor = norm(self.values)
            return normed
        # Computed again in the backward pass: what a loss takes comes on top of what is kept here.
        precise: Tensor = checkpoint(_precisely_normed, *self, norm.weight, norm.eps, use_reentrant=False)
        return precise


def _precisely_normed(values: Tensor, carrier: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    carried: Tensor = _Carried.apply(values, carrier)  # type: ignore[no-untyped-call]
    return nn.functional.rms_norm(carried, weight.shape, weight.to(carried.dtype), eps)


class _Carried(torch.autograd.Function):
    """`values` in float32, whose gradient is the carrier's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, carrier: Tensor) -> Tensor:
        return values.to(carrier.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _Add(torch.autograd.Function):
    """`values` + `part`, and a carrier: by that comes one part of the sum's gradient, the other from what reads it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, carrier: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        return values + part, _carrier(values)

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor, of_carrier: Tensor) -> tuple[None, Tensor, Tensor]:
        gradient = of_carrier + of_sum
        return None, gradient, gradient.to(of_sum.dtype)


def _carrier(values: Tensor) -> Tensor:
    return torch.empty(1, dtype=torch.float32, device=values.device).expand(values.shape)


class Layer(nn.Module):
    def __init__(self, config: Qwen3Config, window: int | None) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.window = Attention(config), MLP(config), window
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Residual, cos: Tensor, sin: Tensor, batch: Batch, backend: Backend | None) -> Residual:
        q, k, v = self.self_attn(self.input_layernorm(x.values), cos, sin)
        x = x.plus(self.self_attn.o_proj(mix(q, k, v, batch, self.window, backend)))
        return x.plus(self.mlp(self.post_attention_layernorm(x.values)))


class Qwen3(nn.Module):
    """Hidden states, logits and loss of a `Batch`, at the batch's level."""

    def __init__(
        self,
        config: Qwen3Config,
        *,
        backend: Backend | None = None,
        checkpointing: bool = False,
        head_into_grad: bool = False,
    ) -> None:
        """`backend` is that of `radix_mlp.torch.attention`. With `checkpointing` the backward pass computes each
        layer's activations again instead of keeping them; `head_into_grad` is `into_grad` of `radix_mlp.torch.Head`."""
        super().__init__()
        self.config, self.backend, self.checkpointing = config, backend, checkpointing
        self.head_into_grad = head_into_grad
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        windows = config.windows or (None,) * config.num_hidden_layers
        self.layers = nn.ModuleList(Layer(config, window) for window in windows)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> "Qwen3":
        """Load a Hugging Face directory: config.json, and model.safetensors or its shards.

        Weights keep their dtype where none is given; `options` are those of `Qwen3`. Raises UnsupportedConfigError, and
        RuntimeError where tensors are missing or have another shape.
        """
        directory = Path(directory)
        config = Qwen3Config.from_file(directory / "config.json")
        with torch.device("meta"):
            model = cls(config, **options)
        weights: dict[str, Tensor] = {}
        for file in _weight_files(directory):
            weights |= {name.removeprefix("model."): x.to(device, dtype) for name, x in load_file(file).items()}
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["embed_tokens.weight"]
        model.load_state_dict(weights, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states after the last norm, [rows, hidden]; `batch.unfold` brings them to the N tokens."""
        normed: Tensor = self.norm(self.stream(batch).values)
        return normed

    def stream(self, batch: Batch) -> Residual:
        """The residual stream after the last layer."""
        embedded = self.embed_tokens(batch.input_ids)
        frequencies, factor = rotary_frequencies(self.config)
        # Angles need more digits than bfloat16 has; only their cosines and sines are rounded.
        angles = batch.position_ids.to(_precise(embedded.dtype))[:, None, None] * frequencies.to(embedded.device)
        cos, sin = ((f(torch.cat([-angles, angles], -1)) * factor).to(embedded.dtype) for f in (torch.cos, torch.sin))
        x = Residual.begin(embedded, batch.level)
        for layer in self.layers:
            context = (x, cos, sin, batch, self.backend)
            x = checkpoint(layer, *context, use_reentrant=False) if self.checkpointing else layer(*context)
        return x

    def logits(self, batch: Batch) -> Tensor:
        """Logits of every token, [N, vocabulary]; each row of them is computed once."""
        return batch.unfold(self.lm_head(self(batch)))

    def loss(self, batch: Batch, weights: Tensor | None = None) -> Tensor:
        """The mean cross entropy of the next tokens, each times its weight if `weights` [N] are given.

        At level "full" a row of logits serves all tokens at its node, whose labels differ where the trie branches. The
        paper's level unfolds before the head.
        """
        states = self.stream(batch).normed(self.norm)
        head = Head(self.lm_head.weight, into_grad=self.head_into_grad)
        if batch.level == "full":
            return cross_entropy(states, head, batch.fold, batch.labels, weights=weights)
        return cross_entropy(batch.unfold(states), head, batch.tokens, batch.labels, weights=weights)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [directory / "model.safetensors"]
    return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
