"""Encodes and ranks with sentence-transformers, folded. Importing this imports sentence-transformers.

Its own `encode` and `predict` sort texts by length, which parts those that share a prefix. Here batches are planned
by what their texts share: an instruction before every text, a query before every document.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tqdm import tqdm

from radix_mlp.batching import plan_batches
from radix_mlp.torch.sampler import restore_order
from radix_mlp.transformers import folded, is_folded

# Of one planned batch: as many as keep a GPU busy with a small model.
UNIQUE_TOKENS = 16_384
# Places [texts × longest text] of one batch's states, which leave the model padded however much is shared.
MAX_PLACES = 1 << 19
# Inputs that are tokenised at once for the plan.
CHUNK = 256
# Options of `encode` and `predict` that change the tokens.
TOKEN_OPTIONS = ("processing_kwargs", "task")


def encode(
    model: SentenceTransformer,
    inputs: Sequence[Any],
    *,
    prompt_name: str | None = None,
    prompt: str | None = None,
    unique_tokens: int = UNIQUE_TOKENS,
    show_progress_bar: bool | None = None,
    **options: Any,
) -> Any:
    """`model.encode(inputs, ...)` with what the inputs share computed once.

    The model is folded for the call, unless it is folded already. Batches hold at most `unique_tokens` different
    tokens, so there is no batch_size; the other `options` are those of `SentenceTransformer.encode`, and so are the
    results, in the order of `inputs`. A progress bar shows on a terminal, or where `show_progress_bar` says so.

    Raises `radix_mlp.transformers.UnsupportedModelError` for a model that cannot be folded, and ValueError for a
    single input, for none, for several devices, and for precision "int8" or "uint8", whose range is that of all
    embeddings: pass the result to `sentence_transformers.util.quantize_embeddings`.
    """
    if (precision := options.get("precision")) in ("int8", "uint8"):
        raise ValueError(f"precision {precision!r} takes the range of all embeddings: quantise what encode returns")
    options |= {"prompt_name": prompt_name, "prompt": prompt}
    return _in_planned_batches(model.encode, model, inputs, unique_tokens, show_progress_bar, options)


def predict(
    model: CrossEncoder,
    inputs: Sequence[Any],
    *,
    prompt_name: str | None = None,
    prompt: str | None = None,
    unique_tokens: int = UNIQUE_TOKENS,
    show_progress_bar: bool | None = None,
    **options: Any,
) -> Any:
    """`model.predict(inputs, ...)` of pairs of texts with what they share computed once: as `encode` does."""
    options |= {"prompt_name": prompt_name, "prompt": prompt}
    return _in_planned_batches(model.predict, model, inputs, unique_tokens, show_progress_bar, options)


def _in_planned_batches(
    run: Callable[..., Any],
    model: SentenceTransformer | CrossEncoder,
    inputs: Sequence[Any],
    unique_tokens: int,
    show_progress_bar: bool | None,
    options: dict[str, Any],
) -> Any:
    if model.is_singular_input(inputs) or not len(inputs):
        raise ValueError(f"inputs must be a list of at least one text or pair, got {inputs!r}")
    if "batch_size" in options:
        raise ValueError(
            f"batches are planned to hold unique_tokens: there is no batch_size, got {options['batch_size']}"
        )
    if options.get("pool") is not None or isinstance(options.get("device"), list):
        raise ValueError("a folded model runs on one device: neither pool nor a list of devices can be given")
    # Rows of an array would be arrays themselves, which sentence-transformers takes for audio.
    inputs = inputs.tolist() if isinstance(inputs, np.ndarray) else list(inputs)
    token_ids = _token_ids(model, inputs, options)
    batches = plan_batches(token_ids, unique_tokens=unique_tokens)
    lengths = [len(ids) for ids in token_ids]
    plan = [part for batch in batches for part in _within_places(batch, lengths)]
    # Disabled by None, tqdm shows on a terminal only.
    hidden = None if show_progress_bar is None else not show_progress_bar
    parts = []
    with (
        nullcontext() if is_folded(model) else folded(model),
        tqdm(total=len(inputs), desc="Folded batches", unit="text", disable=hidden) as bar,
    ):
        for batch in plan:
            own = [inputs[i] for i in batch]
            parts.append(run(own, batch_size=len(own), show_progress_bar=False, **options))
            bar.update(len(batch))
    return restore_order(_join(parts), plan)


def _within_places(batch: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """`batch` in parts that take at most MAX_PLACES when padded; a longer text is a part of its own."""
    part: list[int] = []
    longest = 0
    for index in batch:
        longest = max(longest, lengths[index])
        if part and (len(part) + 1) * longest > MAX_PLACES:
            yield part
            part, longest = [], lengths[index]
        part.append(index)
    yield part


def _token_ids(model: Any, inputs: list[Any], options: dict[str, Any]) -> list[Any]:
    """The tokens of each input as the model reads it."""
    prompt = options["prompt"]
    if prompt is None:
        prompt = model.prompts.get(options["prompt_name"] or model.default_prompt_name)
    own = {name: options[name] for name in TOKEN_OPTIONS if name in options}
    ids: list[Any] = []
    for start in range(0, len(inputs), CHUNK):
        features = model.preprocess(inputs[start : start + CHUNK], prompt=prompt, **own)
        tokens = features["input_ids"].numpy()
        if "cu_seq_lens_q" in features:
            # For FlashAttention: one row [1, N] without padding.
            ids += np.split(tokens[0], features["cu_seq_lens_q"][1:-1].tolist())
        else:
            masks = features["attention_mask"].numpy().astype(bool)
            ids += [row[mask] for row, mask in zip(tokens, masks, strict=True)]
    return ids


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [value for part in parts for value in part]
