"""Folded models of every family in models.py compute what transformers computes, or say why they cannot.

The reference is the plain model with eager attention, on the padded batch.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from models import FAMILIES, LEVELS, README, REFUSED, Family, Options, Refused, with_table
from radix_mlp.transformers import UnsupportedModelError, fold, folded
from radix_mlp.transformers.folding import CACHE_NAMES
from radix_mlp.transformers.support import PROVEN, RANDOM_ROUTING

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONGEST = 12
# Of the largest activation, in f32: sums over other numbers of rows run in another order. Transformers'
# own padded and unpadded batches differ by up to 2e-6 on these models.
TOLERANCE = 2e-5
# What a wrong score, mask or position must move.
VISIBLE = 100 * TOLERANCE

Sequences = list[list[int]]

# A branch within a branch, a whole sequence twice, one that is a prefix of others and one of a single token.
RICH = [
    [1, 2, 0, 2, 1, 0, 1, 2, 2, 0, 1, 1],
    [1, 2, 0, 2, 1, 0, 1, 0],
    [1, 2, 0, 2, 1, 0, 1, 0, 0, 2],
    [1, 2, 0],
    [1, 2, 0, 2, 1, 0, 1, 2, 2, 0, 1, 1],
    [2],
    [1, 0, 2, 2, 0, 1],
]


@st.composite
def tries(draw: st.DrawFn) -> Sequences:
    """Sequences of a few tokens that continue, branch off, repeat and stop short of each other."""
    token = st.integers(0, 2)
    sequences = [draw(st.lists(token, min_size=1, max_size=LONGEST))]
    for _ in range(draw(st.integers(1, 6))):
        source = draw(st.sampled_from(sequences))
        shared = draw(st.integers(0, len(source)))
        own = draw(st.lists(token, min_size=shared == 0, max_size=LONGEST - shared))
        sequences.append(source[:shared] + own)
    return sequences


def padded(sequences: Sequences, side: str) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [sequences, longest], padded with token 0."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64, device=DEVICE)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(sequences):
        start = longest - len(own) if side == "left" else 0
        ids[row, start : start + len(own)] = torch.tensor(own, device=DEVICE)
        mask[row, start : start + len(own)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: PreTrainedModel, options: Options | None, **batch: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's last hidden state and the whole model's logits, each folded by itself with `options` if given."""
    decoder = model.base_model
    with torch.no_grad(), nullcontext() if options is None else folded(decoder, **options):
        states = decoder(**batch).last_hidden_state
    with torch.no_grad(), nullcontext() if options is None else folded(model, **options):
        logits = model(**batch).logits
    return states, logits


def assert_close(computed: Tensor, expected: Tensor, kept: Tensor) -> None:
    assert (computed.shape, computed.dtype) == (expected.shape, expected.dtype)
    assert not computed[~kept].any()
    difference = (computed - expected)[kept].abs().max().item()
    assert difference <= TOLERANCE * expected[kept].abs().max().item()


def last_state(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        states: Tensor = model.base_model(input_ids=torch.tensor([ids], device=model.device)).last_hidden_state
    return states[0, -1]


def assert_moved(state: Tensor, other: Tensor) -> None:
    assert (state - other).abs().max().item() > VISIBLE * state.abs().max().item()


class Pair:
    """The plain model and one of the same weights to fold: what a fold leaves behind cannot change the reference."""

    def __init__(self, family: Family) -> None:
        self.plain, self.folded = family.model(), family.model()
        for model in (self.plain, self.folded):
            nn.Module.to(model, DEVICE)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """In models this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


@pytest.mark.parametrize("level", LEVELS)
# The same examples in every run: two experts whose scores tie up to rounding may change places.
@settings(max_examples=6, derandomize=True)
@given(sequences=tries(), side=st.sampled_from(["left", "right"]), positioned=st.booleans())
@example(sequences=RICH, side="left", positioned=True)
@example(sequences=RICH, side="left", positioned=False)
@example(sequences=RICH, side="right", positioned=False)
def test_folded_equals_plain(pair: Pair, level: str, sequences: Sequences, side: str, positioned: bool) -> None:
    batch = padded(sequences, side)
    kept = batch["attention_mask"].bool()
    if positioned:
        # What transformers' own `generate` passes: without it, learned positions count padding on the left.
        batch["position_ids"] = (kept.cumsum(1) - 1).clamp(min=0)
    expected = outputs(pair.plain, None, **batch)
    computed = outputs(pair.folded, {"level": level}, **batch)
    for one, other in zip(computed, expected, strict=True):
        assert_close(one, other, kept)


@torch.no_grad()
def test_hidden_states_equal_plain(pair: Pair) -> None:
    batch = padded(RICH, "right")
    kept = batch["attention_mask"].bool()
    expected = pair.plain(**batch, output_hidden_states=True, use_cache=False).hidden_states
    with folded(pair.folded):
        computed = pair.folded(**batch, output_hidden_states=True).hidden_states
    assert len(expected) > pair.plain.config.num_hidden_layers
    for one, other in zip(computed, expected, strict=True):
        assert one.shape == other.shape
        # Gemma 3n has several streams of them, [streams, sequences, length, hidden].
        shape = (-1, *kept.shape, one.shape[-1])
        for mine, theirs in zip(one.view(shape), other.view(shape), strict=True):
            assert_close(mine, theirs, kept)


@torch.no_grad()
def test_decoding_equals_plain(pair: Pair) -> None:
    batch = padded(RICH, "left")
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    step = {
        "input_ids": torch.full((len(RICH), 1), 2, device=DEVICE),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 1), value=1),
        "position_ids": batch["attention_mask"].sum(1, keepdim=True),
    }

    def decoded(model: PreTrainedModel) -> Tensor:
        prefilled = model(**batch, use_cache=True)
        cache = {name: prefilled[name] for name in prefilled.keys() & set(CACHE_NAMES)}
        logits: Tensor = model(**step, **cache, use_cache=True).logits
        return logits

    expected = decoded(pair.plain)
    with folded(pair.folded):
        computed = decoded(pair.folded)
    assert_close(computed, expected, torch.ones(computed.shape[:2], dtype=torch.bool, device=DEVICE))


def training_loss(model: PreTrainedModel, options: Options | None, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of every next token, and the embedding's gradient of it."""
    model.train()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with nullcontext() if options is None else folded(model, **options):
        loss = model(**batch, labels=labels, use_cache=False).loss
    (gradient,) = torch.autograd.grad(loss, next(model.get_input_embeddings().parameters()))
    model.train(False)
    return loss.detach(), gradient


@pytest.mark.parametrize("level", LEVELS)
def test_training_equals_plain(pair: Pair, level: str) -> None:
    batch = padded(RICH, "right")
    if pair.plain.config.model_type in RANDOM_ROUTING:
        with pytest.raises(UnsupportedModelError, match="draws experts at random"):
            training_loss(pair.folded, {"level": level}, batch)
        pair.folded.train(False)
        return
    expected = training_loss(pair.plain, None, batch)
    computed = training_loss(pair.folded, {"level": level}, batch)
    for one, other in zip(computed, expected, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * (1 + other.abs().max())


def test_every_token_and_its_place_are_visible(pair: Pair) -> None:
    # Else the test above would pass with a wrong mask or wrong positions. Within what three windows reach back.
    ids = [1, 2, 0, 2, 1, 0, 1, 2]
    state = last_state(pair.plain, ids)
    for i in range(len(ids) - 1):
        assert_moved(state, last_state(pair.plain, [*ids[:i], 3, *ids[i + 1 :]]))
    assert_moved(state, last_state(pair.plain, [*ids[:-3], 1, 0, 2]))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param(family, changes, id=f"{family.name}: {name}")
        for family in FAMILIES
        for name, changes in family.special.items()
        if changes
    ],
)
def test_what_is_special_is_visible(family: Family, changes: Options) -> None:
    ids = RICH[0]
    assert_moved(last_state(family.model(), ids), last_state(family.model(**changes), ids))


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_refused(refused: Refused) -> None:
    with pytest.raises(UnsupportedModelError, match=refused.reason):
        fold(refused.model())


def test_what_is_taken_without_trial_is_proven() -> None:
    assert sorted(PROVEN) == sorted({family.model_type for family in FAMILIES})


def test_readme_lists_what_is_proven() -> None:
    readme = README.read_text(encoding="utf-8")
    assert readme == with_table(readme), "run: python python_bindings/tests/models.py --write"
