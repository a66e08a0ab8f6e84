"""Puts a folding forward in place of a model's own, and takes it away again."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from radix_mlp.torch.dispatch import Backend
from radix_mlp.torch.eager import eager, eager_itself
from radix_mlp.transformers.attention import KEYWORD, PREFIX, FoldedAttention, Level, install, register
from radix_mlp.transformers.batch import Batch, Int32, fold_call, pack_call, unfold_rows
from radix_mlp.transformers.loss import folded_loss, labels_of_tokens, lm_head, without_padding
from radix_mlp.transformers.support import (
    COUNTED_BY_MASK,
    UnsupportedModelError,
    counts_padding,
    drawing_modules,
    embeddings_of,
    find_model,
    has_lm_head,
    is_proven,
    refuse_dropout,
    refuse_padding,
    refuse_unsupported,
    rotary_limits,
)
from radix_mlp.transformers.trial import outputs, prove

if TYPE_CHECKING:
    from radix_mlp.transformers.graphs import Graphs

Module = TypeVar("Module", bound=nn.Module)

# Where the folding of a model is kept, as an attribute of the model.
ATTRIBUTE = "_radix_mlp_folding"

# What a model's loss function takes beside logits, labels and the size of the vocabulary.
LOSS_OPTIONS = ("num_items_in_batch", "shift_labels", "ignore_index")

# What transformers calls its cache of keys and values, in arguments and outputs: the first from 5.24 on.
CACHE_NAMES = ("cache", "past_key_values")


def fold(
    model: Module,
    *,
    level: Level = "full",
    backend: Backend | None = None,
    cuda_graphs: bool = False,
    allow_dropout: bool = False,
) -> Module:
    """Make `model` fold each batch onto its prefix trie; change it in place and return it.

    `model` is a causal decoder of transformers ≥ 5.17, with or without a head, or a module that holds one:
    a SentenceTransformer, a CrossEncoder, a PEFT model, a compiled model.

    It is called as before: `input_ids` [sequences, length] with an `attention_mask`, padded on either side, and
    `position_ids` if need be. What comes back has the same class and shapes; at padding it is zero.
    Also packed: `input_ids` [1, N] with `cu_seq_lengths` [sequences + 1]. `input_ids` may lie on the CPU where
    the model does not: the fold reads them there, which spares a copy down.

    `level` is what is computed once: "full" everything, "mlp" all but attention (arXiv 2601.15013),
    "none" nothing (the batch is packed, without padding). `backend` names the attention of
    `radix_mlp.torch.attention`. `cuda_graphs` replays the decoder as a CUDA graph, without the time that
    Python takes to launch its kernels, for batches of up to 16,384 rows where no gradient is asked for; each
    number of rows, in steps of 128, is captured when it first comes, with what `torch.compile` made of its layers.

    In training mode, with `labels`, the loss is that of `radix_mlp.torch.cross_entropy`: the vocabulary's logits
    exist for a chunk of nodes at a time, and `logits` of the result is None; where no label counts it is 0. A loss
    function of your own, hooks on the head and a forward put around the model's are given all logits. Labels behind
    padding count nothing, in evaluation either.
    Active dropout or noise is refused, as copies of a token would draw different values, unless `allow_dropout` says
    that they may share theirs; dropout within attention is refused always.

    Without a mask, positions that do not go on by one begin a sequence, as for FlashAttention in transformers. A cache
    is filled only where one or `use_cache=True` is passed, for sequences in rows of their own; padding on the left then
    has positions, as in the model itself, unless `position_ids` say otherwise. Tokens after a cache, as `generate`
    decodes them, run as in the model itself, and so do calls with a prepared mask beside a cache. Hooks on what is
    within the model see compact rows. A copy of a folded model is one of its own.

    Raises UnsupportedModelError, with the reason, where folding would change the model's results. A type of
    model that the tests do not cover, a class or forward of your own or one that attends by your own function is first
    run both ways on a small batch, and refused if they differ; if their losses do, so are labels.
    """
    target = find_model(model)
    if level not in get_args(Level):
        raise ValueError(f"level must be one of {', '.join(get_args(Level))}, got {level!r}")
    if is_folded(target):
        raise ValueError(f"{type(target).__name__} is folded already: unfold it first")
    refuse_unsupported(target)
    plain = None if is_proven(target) else outputs(target)
    Folding(target, level, backend, cuda_graphs=cuda_graphs, allow_dropout=allow_dropout)
    if plain is not None:
        try:
            prove(getattr(target, ATTRIBUTE), plain)
        except BaseException:
            unfold(target)
            raise
    return model


def unfold(model: Module) -> Module:
    """Give a folded model its own forward back, in place; return it."""
    target = find_model(model)
    folding = _folding(target)
    if folding is None:
        raise ValueError(f"{type(target).__name__} is not folded")
    folding.remove()
    return model


def is_folded(model: nn.Module) -> bool:
    """Whether the transformers model that `model` is or holds folds its batches."""
    return _folding(find_model(model)) is not None


def _folding(model: PreTrainedModel) -> "Folding | None":
    """That of a model, whether it was folded with its head or its decoder alone."""
    return getattr(model, ATTRIBUTE, None) or getattr(model.base_model, ATTRIBUTE, None)


@contextmanager
def folded(
    model: Module,
    *,
    level: Level = "full",
    backend: Backend | None = None,
    cuda_graphs: bool = False,
    allow_dropout: bool = False,
) -> Iterator[Module]:
    """`fold` for the length of a `with` block."""
    fold(model, level=level, backend=backend, cuda_graphs=cuda_graphs, allow_dropout=allow_dropout)
    try:
        yield model
    finally:
        unfold(model)


@dataclass(frozen=True)
class Call:
    """A folded call: the `options` with which the model runs on the rows of `batch`, and the caller's `cache`."""

    batch: Batch
    attend: FoldedAttention
    options: dict[str, Any]
    cache: Any


class Folding:
    """The forwards of one model that fold: of its decoder, and of the model itself where that has an LM head.

    A copy of the model has a copy of it, which runs on the copy's weights: so nothing here is a closure.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        level: Level,
        backend: Backend | None,
        *,
        cuda_graphs: bool,
        allow_dropout: bool,
    ) -> None:
        self.model, self.decoder = model, cast("PreTrainedModel", model.base_model)
        self.level, self.backend, self.allow_dropout = level, backend, allow_dropout
        self.count_padding, self.rotary = counts_padding(model), rotary_limits(model)
        self.count_cached = model.config.model_type not in COUNTED_BY_MASK
        self.drawing = drawing_modules(model)
        self.layers: int = model.config.num_hidden_layers
        self.cache_name = _cache_name(self.decoder)
        # Whether the model's loss is that of `train_step`, and whether it is its loss function's; `prove` finds out.
        self.fuses_loss = self.knows_loss = True
        self.graphs: Graphs | None = None
        self.row_multiple: int | None = None
        if cuda_graphs:
            self.graphs, self.row_multiple = _graphs()
        self.implementation = install(model)
        self.modules = [self.decoder] if model is self.decoder else [self.decoder, model]
        self.run_decoder: Callable[..., ModelOutput] = self.decoder.forward
        self.run_model: Callable[..., ModelOutput] = model.forward
        # What hooks of others have put on the modules themselves.
        self.wrapped = [module.__dict__.get("forward") for module in self.modules]
        predicts = has_lm_head(model)
        self.decoder.forward = Forward(self, self.decoder, self.run_decoder)
        if predicts:
            model.forward = Forward(self, model, self.run_model)
        for module in self.modules:
            setattr(module, ATTRIBUTE, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's, maybe in a process in which nothing was folded."""
        vars(self).update(state)
        register(self.implementation)

    def remove(self) -> None:
        for module, wrapped in zip(self.modules, self.wrapped, strict=True):
            module.__dict__.pop("forward", None)
            if wrapped is not None:
                module.forward = wrapped
            delattr(module, ATTRIBUTE)
        self.model.config._attn_implementation = self.implementation

    def lm_head(self) -> nn.Linear | None:
        """That of the model, but where others have put a forward on it, which must run, or another loss into it."""
        return lm_head(self.model) if self.fuses_loss and self.wrapped[-1] is None else None

    def run(self, module: nn.Module, call: dict[str, Any]) -> ModelOutput:
        """The outputs of `module`, the decoder or the model, for a padded or packed call."""
        output: ModelOutput = (self._decode if module is self.decoder else self._predict)(call)
        return output

    @eager_itself
    def _decode(self, call: dict[str, Any]) -> ModelOutput:
        """The decoder's outputs for a padded or packed call."""
        folded: Call = self._fold(call)
        return self._restored(self.run_compact(folded.options, folded.batch), folded, {})

    @eager_itself
    def _predict(self, call: dict[str, Any]) -> ModelOutput:
        """The outputs of a model with an LM head, which also runs once a row."""
        labels, keep = call.pop("labels", None), call.pop("logits_to_keep", 0)
        if labels is not None and not self.knows_loss:
            raise ValueError(
                f"{type(self.model).__name__} computes a loss that folding does not know: pass no labels, and take the "
                "loss from its logits"
            )
        options = {name: call.pop(name) for name in LOSS_OPTIONS if name in call}
        if labels is not None and self.model.training and (head := self.lm_head()) is not None:
            trained: ModelOutput = self.train_step(call, head, labels, options)
            return trained
        folded: Call = self._fold(call)
        restore = self._keep(folded, keep)
        compact = self.run_model(**folded.batch.inputs(), **folded.options)
        ready = {"logits": restore(compact["logits"])}
        if labels is not None:
            labels, options = without_padding(folded.batch, labels, options)
            ready["loss"] = self.model.loss_function(ready["logits"], labels, self.model.config.vocab_size, **options)
        return self._restored(compact, folded, ready)

    @eager_itself
    def train_step(self, call: dict[str, Any], head: nn.Linear, labels: Tensor, options: dict[str, Any]) -> ModelOutput:
        """The outputs of a model with its loss, which makes no logits of the whole batch."""
        folded: Call = self._fold(call)
        # Read before the model runs: the host would wait for it.
        ignored = options.get("ignore_index", -100)
        own = labels_of_tokens(folded.batch, labels, options.get("shift_labels"), ignored)
        compact = self.run_compact(folded.options, folded.batch)
        count = options.get("num_items_in_batch")
        loss = folded_loss(compact[0], head, self.model.config, folded.batch, own, count, ignored)
        output: ModelOutput = self._restored(compact, folded, {"loss": loss}, CausalLMOutputWithPast)
        return output

    @eager_itself
    def run_compact(self, call: dict[str, Any], batch: Batch | None = None) -> ModelOutput:
        """The decoder itself on compact rows, as a CUDA graph where that is asked for and possible.

        The rows are those of `batch` where the call has none; a graph has its own way to bring them to the device.
        """
        if self.graphs is not None and self.graphs.takes(call):
            return self.graphs.run(self.run_decoder, self.decoder, call)
        return self.run_decoder(**call) if batch is None else self.run_decoder(**batch.inputs(), **call)

    @eager
    def _fold(self, call: dict[str, Any]) -> "Call":
        """Fold a call; ValueError or TypeError where its arguments do not go together."""
        if not self.allow_dropout:
            refuse_dropout(self.model, self.drawing)
        rest = {name: value for name, value in call.items() if value is not None}
        self._refuse_arguments(rest)
        bounds = rest.pop("cu_seq_lengths", rest.pop("cu_seq_lens_q", None))
        for name in ("cu_seq_lens_k", "max_length_q", "max_length_k", "cache_position"):
            rest.pop(name, None)
        cache = rest.pop("cache", rest.pop("past_key_values", None))
        use_cache = bool(rest.pop("use_cache", False)) or cache is not None
        packed = pack_call(
            rest.pop("input_ids"),
            rest.pop("attention_mask", None),
            rest.pop("position_ids", None),
            bounds,
            count_padding=self.count_padding or (use_cache and self.count_cached),
        )
        if use_cache and len(packed.starts) != packed.shape[0]:
            raise ValueError(
                f"use_cache=True wants each sequence in a row of its own, got {len(packed.starts)} in {packed.shape[0]}"
            )
        embeddings, device = embeddings_of(self.decoder)
        batch = fold_call(packed, self.level, device, self.row_multiple)
        if len(batch.fold.input_ids) and (largest := batch.fold.input_ids.max()) >= len(embeddings):
            raise ValueError(f"input_ids holds {largest}, but the model has {len(embeddings)} embeddings")
        if self.rotary:
            refuse_padding(self.model, self.rotary, packed.span, int(batch.fold.position_ids.max()) + 1)
        attend = FoldedAttention(batch.fold, self.backend, batch.copies)
        options = {
            **rest,
            # A mask of four dimensions is taken as it is, so that none is made; attention never reads it.
            "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
            self.cache_name: DynamicCache() if use_cache else None,
            "use_cache": use_cache,
            KEYWORD: attend,
        }
        return Call(batch, attend, options, cache)

    def _refuse_arguments(self, call: dict[str, Any]) -> None:
        for name in ("inputs_embeds", "encoder_hidden_states", "token_type_ids"):
            if name in call:
                raise ValueError(f"a folded model takes input_ids, from which it tells what is shared, not {name}")
        for name in ("output_attentions", "output_router_logits"):
            if call.get(name, getattr(self.model.config, name, False)):
                raise ValueError(f"a folded model has no {name}: unfold it to see them")
        if "input_ids" not in call:
            raise ValueError("a folded model needs input_ids")
        if _is_prepared(call.get("attention_mask")):
            raise ValueError("a folded model takes an attention_mask [sequences, length], not a prepared mask")

    @eager
    def _keep(self, call: "Call", keep: int | Tensor) -> Callable[[Tensor], Tensor]:
        """Ask for the logits of each row in `keep` once; return what puts them in their places."""
        batch = call.batch
        kept = _kept(batch.index, keep)
        rows = np.unique(kept)
        present = rows[rows < batch.fold.num_rows]
        places = torch.from_numpy(np.searchsorted(present, kept).reshape(-1)).to(batch.device)
        call.options["logits_to_keep"] = torch.from_numpy(present.astype(np.int64)).to(batch.device)
        return partial(unfold_rows, places=places, shape=kept.shape, dim=1, padded=len(present) < len(rows))

    def _check_layers(self, attend: FoldedAttention) -> None:
        """Every layer must have attended through the fold, and a window must have reached one of them."""
        name = type(self.model).__name__
        calls = attend.windows.total()
        # Some layers attend twice.
        if calls == 0 or calls % self.layers:
            reason = f"{calls} of its {self.layers} layers attended through transformers' attention interface"
            if (now := self.model.config._attn_implementation) != PREFIX + self.implementation:
                reason += f", of which its config says {now!r} since it was folded: unfold, set it, and fold again"
            raise UnsupportedModelError(f"{name} cannot be folded: {reason}")
        window = getattr(self.model.config, "sliding_window", None)
        layers = getattr(self.model.config, "layer_types", None) or ["sliding_attention"]
        if window is not None and "sliding_attention" in layers and set(attend.windows) == {None}:
            raise UnsupportedModelError(f"{name} cannot be folded: no layer was told its sliding window of {window}")

    @eager
    def _restored(
        self, output: ModelOutput, call: "Call", ready: dict[str, Tensor], kind: type[ModelOutput] | None = None
    ) -> ModelOutput:
        """`output` with every row in its places, but for the fields that are `ready`; of `kind`, its fields."""
        self._check_layers(call.attend)
        batch = call.batch
        kind = kind or type(output)
        known = inspect.signature(kind).parameters
        fields: dict[str, Any] = dict(ready)
        for name, value in output.items():
            if name in fields or name not in known:
                continue
            if name in CACHE_NAMES:
                fields[name] = self._restored_cache(value, batch, call.cache)
            elif isinstance(value, Tensor):
                fields[name] = self._restored_states(name, value, batch)
            elif isinstance(value, tuple):
                fields[name] = tuple(self._restored_states(name, each, batch) for each in value)
            else:
                raise UnsupportedModelError(f"{type(self.model).__name__} returned {name}, a {type(value).__name__}")
        return kind(**fields)

    def _restored_states(self, name: str, compact: Tensor, batch: Batch) -> Tensor:
        """States [1, rows, width], or [streams, 1, rows, width] where there are several (Gemma 3n), in place."""
        if compact.ndim not in (3, 4) or compact.shape[-3:-1] != (1, batch.fold.num_rows):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} returned {name} of shape {tuple(compact.shape)}, where "
                f"[1, {batch.fold.num_rows}, width] was expected"
            )
        return batch.restore(compact) if compact.ndim == 3 else torch.stack([batch.restore(each) for each in compact])

    def _restored_cache(self, compact: DynamicCache, batch: Batch, cache: Any) -> Any:
        """The keys and values [sequences, key heads, length, head_dim] of every layer, in `cache` or a new one."""
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        for layer, states in enumerate(compact.layers):
            assert isinstance(states, DynamicLayer)
            assert states.keys is not None
            assert states.values is not None
            cache.update(batch.restore(states.keys, dim=2), batch.restore(states.values, dim=2), layer)
        return cache


class Forward:
    """In place of a module's `own` forward: folds a call, but where a cache or an outer call has been there before."""

    def __init__(self, folding: Folding, module: nn.Module, own: Callable[..., ModelOutput]) -> None:
        self.folding, self.module, self.own = folding, module, own
        self.signature = inspect.signature(own)
        names = {each.kind: name for name, each in self.signature.parameters.items()}
        self.others = names.get(inspect.Parameter.VAR_KEYWORD, "")
        self.unnamed = names.get(inspect.Parameter.VAR_POSITIONAL, "")
        update_wrapper(self, own)

    @eager_itself
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        folding = self.folding
        if args and args[0] is self.module:
            # accelerate binds what it unwraps to the module, as if it were the function of a class.
            args = args[1:]
        call = self.signature.bind_partial(*args, **kwargs).arguments
        call |= call.pop(self.others, {})
        if unnamed := call.pop(self.unnamed, ()):
            name = type(self.module).__name__
            raise TypeError(f"{name}.forward does not name {len(unnamed)} of its arguments: pass them by name")
        cache = next((call[name] for name in CACHE_NAMES if call.get(name) is not None), None)
        if KEYWORD in call:
            return folding.run_compact(call) if self.module is folding.decoder else self.own(**call)
        if cache is not None and (cache.get_seq_length() > 0 or _is_prepared(call.get("attention_mask"))):
            return self.own(**call)
        as_dict = call.pop("return_dict", None)
        output = folding.run(self.module, call)
        dictionary = folding.model.config.return_dict if as_dict is None else as_dict
        return output if dictionary else output.to_tuple()


def _kept(index: Int32, keep: Any) -> Int32:
    """The rows [sequences, positions] whose logits are asked for, as `logits_to_keep` of transformers says.

    [chosen] where a mask chooses among all.
    """
    if isinstance(keep, int):
        return index[:, -keep:] if keep else index
    chosen = keep if isinstance(keep, slice) else torch.as_tensor(keep).cpu().numpy()
    if isinstance(chosen, slice) or chosen.ndim == 1:
        kept: Int32 = index[:, chosen]
    elif chosen.dtype == bool:
        kept = index[chosen]
    else:
        kept = np.take_along_axis(index, chosen, 1)
    return kept


def _is_prepared(mask: Any) -> bool:
    """Whether a mask is one of queries by keys, whatever holds it."""
    if isinstance(mask, Tensor):
        return mask.ndim > 2
    return mask is not None and not isinstance(mask, (list, tuple, np.ndarray))


def _cache_name(decoder: nn.Module) -> str:
    """What `decoder` calls the cache that it takes. Raises UnsupportedModelError where it takes none."""
    declared = inspect.signature(decoder.forward).parameters
    for name in CACHE_NAMES:
        if name in declared:
            return name
    raise UnsupportedModelError(f"{type(decoder).__name__} takes no cache, by none of the names {CACHE_NAMES}")


def _graphs() -> "tuple[Graphs, int]":
    """A model's graphs, and the multiple to which they want rows padded. Imports Triton."""
    if not torch.cuda.is_available():
        raise ValueError("cuda_graphs needs a CUDA device")
    from radix_mlp.transformers.graphs import STEP, Graphs

    return Graphs(), STEP
