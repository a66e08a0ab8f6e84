"""A folded transformers model in training and under torch.compile."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from radix_mlp.transformers import fold, unfold
from tiny import SEQUENCES, TOKENS, assert_close, make


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
# Of Dynamo, which looks at every tensor that crosses a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("level", ["none", "mlp", "full"])
@pytest.mark.parametrize("how", ["plain", "checkpointed", "compiled"])
def test_gradients_equal_the_plain_model(batch: dict[str, Tensor], level: Any, how: str) -> None:
    # Neither padding nor the first tokens, which nothing but padding stands before.
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) * batch["attention_mask"] < 2, -100)
    plain, mine = make().train(), make().train()
    expected = plain(**batch, labels=labels, use_cache=False).loss
    expected.backward()
    fold(mine, level=level)
    if how == "checkpointed":
        mine.gradient_checkpointing_enable()
    run: Any = torch.compile(mine, backend="aot_eager") if how == "compiled" else mine
    loss = run(**batch, labels=labels).loss
    loss.backward()
    assert_close(loss, expected)
    for found, wanted in zip(mine.parameters(), plain.parameters(), strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert_close(found.grad, wanted.grad)


def test_compiled_models(model: Any, batch: dict[str, Tensor]) -> None:
    """Dynamo breaks its graph where the batch is folded, and compiles the rest."""
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        expected = model(**batch).logits * mask
        compiled: Any = torch.compile(fold(model), backend="aot_eager")
        assert_close(compiled(**batch).logits, expected)
        assert_close(compiled(**{name: value[1:] for name, value in batch.items()}).logits, expected[1:])
        unfold(model)
        compiled = torch.compile(model, backend="aot_eager")
        assert_close(fold(compiled)(**batch).logits, expected)


@torch.no_grad()
def test_dynamic_models_are_compiled_once() -> None:
    """Whatever the shapes: those of the first batch fill whole 16 bytes, after which other arrays begin."""
    torch.compiler.reset()
    compiled: Any = torch.compile(fold(make().model), dynamic=True, backend="aot_eager")
    graphs = []
    for sequences, length in ((3, 40), (3, 57), (4, 57), (2, 23)):
        torch.manual_seed(length)
        ids = torch.randint(64, (sequences, length))
        compiled(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs)) == 1


# Of Dynamo, which looks for the gradient of what a layer gets.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("part", ["layers", "all"])
@pytest.mark.parametrize("level", ["none", "full"])
def test_nothing_breaks_a_decoders_graph(batch: dict[str, Tensor], part: str, level: Any) -> None:
    """One of all layers, or of each and the same for all: attention and its gradient are part of it."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain, mine = make().train(), fold(make().train(), level=level)
    for piece in mine.model.layers if part == "layers" else ():
        piece.compile(dynamic=True, backend="aot_eager")
    decoder: Any = mine.model
    run = torch.compile(decoder, dynamic=True, backend="aot_eager") if part == "all" else decoder
    for first in (0, 1):
        given = {name: value[first:] for name, value in batch.items()}
        expected, found = (model(**given, use_cache=False)[0] for model in (plain.model, run))
        mask = given["attention_mask"][..., None]
        assert_close(found, expected * mask)
        wanted = torch.autograd.grad((expected * mask).sum(), list(plain.model.parameters()))
        for mine_own, plain_own in zip(
            torch.autograd.grad(found.sum(), list(decoder.parameters())), wanted, strict=True
        ):
            assert_close(mine_own, plain_own)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_training_makes_no_logits_of_the_batch(model: Any, batch: dict[str, Tensor]) -> None:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    fold(model)
    assert model(**batch, labels=labels).logits is not None
    assert model.train()(**batch, labels=labels).logits is None
    assert model(**batch).logits is not None
    loss, states = model(**batch, labels=labels, output_hidden_states=True, return_dict=False)
    assert loss.ndim == 0
    assert len(states) == 3
    assert_close(model(**batch, labels=labels, num_items_in_batch=9).loss, loss * (TOKENS - len(SEQUENCES)) / 9)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert_close(model(**batch, labels=labels, shift_labels=shifted).loss, loss)
    with pytest.raises(ValueError, match=r"labels must be \[5, 7\] like input_ids, got shape \(5, 3\)"):
        model(**batch, labels=labels[:, :3])


def test_a_head_with_a_forward_of_its_own_runs_it(model: Any, batch: dict[str, Tensor]) -> None:
    own = model.lm_head.forward
    model.lm_head.forward = lambda states: 2 * own(states)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) * batch["attention_mask"] < 2, -100)
    expected = model.train()(**batch, labels=labels, use_cache=False).loss
    assert_close(fold(model)(**batch, labels=labels).loss, expected)


@pytest.mark.parametrize("level", ["mlp", "full"])
def test_autocast(batch: dict[str, Tensor], level: Any) -> None:
    """bfloat16 products of f32 weights: folded gradients are as far from f32 as unfolded ones are."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) * batch["attention_mask"] < 2, -100)

    def step(*, folds: bool, autocast: bool) -> tuple[Tensor, list[Tensor]]:
        model = make().train()
        if folds:
            fold(model, level=level)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch, labels=labels, use_cache=False).loss
        return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))

    exact, plain, mine = (
        step(folds=folds, autocast=autocast) for folds, autocast in ((False, False), (False, True), (True, True))
    )
    assert (mine[0] - exact[0]).abs() <= 2e-2 * exact[0]
    for found, other, truth in zip(mine[1], plain[1], exact[1], strict=True):
        assert found.dtype == other.dtype == torch.float32
        # Single parameters scatter.
        assert (found - truth).norm() <= 1.5 * (other - truth).norm()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora(batch: dict[str, Tensor]) -> None:
    peft: Any = pytest.importorskip("peft")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) * batch["attention_mask"] < 2, -100)
    gradients = []
    for folds in (False, True):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(make(), config).train()
        if folds:
            fold(adapted)
        adapted(**batch, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    plain, mine = gradients
    assert plain.keys() == mine.keys()
    assert len(plain) == 8
    for name, gradient in mine.items():
        assert_close(gradient, plain[name])
