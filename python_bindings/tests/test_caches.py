"""Folded models that fill caches, and what decodes from them."""

import inspect
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from models import FAMILIES
from radix_mlp.transformers import fold
from radix_mlp.transformers.folding import CACHE_NAMES
from tiny import NODES, SEQUENCES, assert_close, make, padded

OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def cache_name(model: Any) -> str:
    taken = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in taken)


def decoded(model: Any, side: str) -> Tensor:
    """The logits after one more token, of calls without positions."""
    batch = padded(side)
    del batch["position_ids"]
    output = model(**batch, use_cache=True)
    cache = {cache_name(model): output[cache_name(model)]}
    mask = nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    logits: Tensor = model(input_ids=torch.full((len(SEQUENCES), 1), 2), attention_mask=mask, **cache).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_decoding_counts_as_the_model_does(family: Any, side: str) -> None:
    expected = decoded(family.model(), side)
    assert_close(decoded(fold(family.model()), side), expected)


@torch.no_grad()
@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
def test_an_empty_cache_is_filled(model: Any, make_cache: Any) -> None:
    first, second = torch.tensor([SEQUENCES[0]]), torch.tensor([[30]])
    sizes = {"max_cache_len": 20} if make_cache is StaticCache else {}
    expected = model(input_ids=torch.cat([first, second], 1)).logits[:, -1:]
    cache = make_cache(config=model.config, **sizes)
    call = {cache_name(model): cache}
    fold(model)
    model(input_ids=first, **call)
    assert cache.get_seq_length() == len(SEQUENCES[0])
    assert_close(model(input_ids=second, **call).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(model: Any, cache: str) -> None:
    """transformers prepares a mask itself beside a static cache, and the prefill then runs as in the model."""
    call = {name: padded("left")[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**call, **OPTIONS)
    rows: list[int] = []
    model.model.norm.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    assert torch.equal(fold(model).generate(**call, **OPTIONS, cache_implementation=cache), expected)
    assert rows[0] == (NODES if cache == "dynamic" else call["input_ids"].numel())


def test_threads_train_one_model() -> None:
    model = fold(make()).train()
    batches = [padded("right"), padded("right")]
    batches[1]["input_ids"] = batches[1]["input_ids"] * 3 % 60 + 1
    calls = [{**own, "labels": own["input_ids"].where(own["attention_mask"].bool(), -100)} for own in batches]
    expected = [model(**call).loss for call in calls]
    failures: list[Any] = []

    def train(own: int) -> None:
        for _ in range(50):
            try:
                assert_close(model(**calls[own]).loss, expected[own])
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=train, args=(own,)) for own in (0, 1)]
    interval = sys.getswitchinterval()
    # So often that they meet at every place.
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
