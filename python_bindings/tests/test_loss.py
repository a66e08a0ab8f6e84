"""The loss on the trie against torch's on every copy's logits."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from radix_mlp import Fold
from radix_mlp.torch import Head, cross_entropy, log_probs, next_token_labels
from radix_mlp.torch.logits import has_large_sums
from radix_mlp.torch.softmax import softmax_

# Branches, a repeat, a prefix of another, an empty sequence: nodes with several labels and with none.
SEQUENCES = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4], [1, 2], [], [6], [1, 2, 5, 7, 8]]
VOCABULARY, HIDDEN = 11, 6
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}

Options = dict[str, Any]


def logits_of(hidden: Tensor, head: Head | None) -> Tensor:
    if head is None:
        return hidden
    logits = hidden @ head.weight.t() * head.scale
    if head.bias is not None:
        logits = (hidden @ head.weight.t() + head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def oracle(hidden: Tensor, head: Head | None, fold: Fold, labels: Tensor, options: Options) -> Tensor:
    """Each copy's term by itself."""
    logits = logits_of(fold.unfold(hidden), head)
    counts = labels != -100
    terms = functional.cross_entropy(
        logits, labels, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
    )
    terms = terms + options.get("z_loss", 0.0) * logits.logsumexp(-1) ** 2
    if (weights := options.get("weights")) is not None:
        terms = terms * weights
    if (weights := options.get("sequence_weights")) is not None:
        terms = terms * weights.repeat_interleave(torch.from_numpy(fold.cu_seq_lengths.astype("int64")).diff())
    total: Tensor = terms[counts].sum()
    return total / max(1, int(counts.sum())) if options.get("reduction", "mean") == "mean" else total


def draw(fold: Fold, dtype: torch.dtype, kind: str) -> tuple[Tensor, Head | None, list[Tensor]]:
    torch.manual_seed(0)
    if kind == "logits":
        logits = torch.randn(fold.num_rows, VOCABULARY, dtype=dtype, requires_grad=True)
        return logits, None, [logits]
    hidden = torch.randn(fold.num_rows, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
    bias = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True)
    head = Head(weight, bias, 0.7, 3.0) if kind == "softcap" else Head(weight, bias if kind == "bias" else None)
    return hidden, head, [hidden, weight, *([bias] if head.bias is not None else [])]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    limit = BOUNDS[expected.dtype] * (1 + expected.abs().amax() if expected.numel() else 0)
    assert ((found - expected).abs() <= limit).all()


def packed(sequences: list[list[int]], layout: Any) -> tuple[Fold, Tensor]:
    fold = Fold.from_sequences(sequences, layout=layout, pad_multiple_of=4)
    ids = torch.tensor([token for own in sequences for token in own], dtype=torch.int64)
    return fold, next_token_labels(ids, torch.from_numpy(fold.cu_seq_lengths.astype("int64")))


options = st.fixed_dictionaries(
    {},
    optional={
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
        "reduction": st.sampled_from(["mean", "sum"]),
        "weights": st.just(True),
        "sequence_weights": st.just(True),
    },
)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=6), max_size=6) | st.just(SEQUENCES),
    st.sampled_from(["first_occurrence", "depth_first"]),
    st.sampled_from(["plain", "bias", "softcap", "logits"]),
    st.sampled_from([torch.float64, torch.float32]),
    st.sets(st.integers(0, 20)),
    st.sampled_from([1, 2, 1 << 28]),
    st.booleans(),
    options,
)
def test_loss_and_gradients_equal_those_of_every_copy(
    sequences: list[list[int]],
    layout: Any,
    kind: str,
    dtype: torch.dtype,
    ignored: set[int],
    rows: int,
    again: bool,
    chosen: Options,
) -> None:
    fold, labels = packed(sequences, layout)
    labels[[i for i in ignored if i < len(labels)]] = -100
    hidden, head, leaves = draw(fold, dtype, kind)
    # Weights of both signs, as advantages are, and one that is zero.
    sizes = {"weights": fold.num_tokens, "sequence_weights": fold.num_sequences}
    for name, size in sizes.items():
        if name in chosen:
            chosen = {**chosen, name: torch.arange(size, dtype=dtype) - 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("radix_mlp.torch.labels.MAX_LOGITS", rows * VOCABULARY)
        if again:
            make_logits_again(patch)
        found = cross_entropy(hidden, head, fold, labels, **chosen)
        gradients = torch.autograd.grad(3 * found, leaves)
    expected = oracle(hidden, head, fold, labels, chosen)
    assert_close(found, expected)
    wanted = torch.autograd.grad(3 * expected, leaves, allow_unused=True)
    for mine, theirs, leaf in zip(gradients, wanted, leaves, strict=True):
        assert_close(mine, torch.zeros_like(leaf) if theirs is None else theirs)


def make_logits_again(patch: pytest.MonkeyPatch) -> None:
    """Have cross_entropy take every head for a large one."""
    patch.setattr("radix_mlp.torch.logits.LARGE_SUMS", 0)
    patch.setattr("radix_mlp.torch.logits.FEW_ROWS", 1 << 28)


@pytest.mark.parametrize("function", [cross_entropy, log_probs])
@pytest.mark.parametrize("kind", ["plain", "bias", "softcap"])
@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_added_to_what_a_head_has(
    monkeypatch: pytest.MonkeyPatch, function: Any, kind: str, has_grad: bool, again: bool
) -> None:
    if again:
        make_logits_again(monkeypatch)
    monkeypatch.setattr("radix_mlp.torch.labels.MAX_LOGITS", 2 * VOCABULARY)
    fold, labels = packed(SEQUENCES, "depth_first")
    hidden, head, leaves = draw(fold, torch.float64, kind)
    assert head is not None
    expected = torch.autograd.grad(3 * function(hidden, head, fold, labels).sum(), leaves)
    before = 1.0 if has_grad else 0.0
    handed: list[Tensor | None] = []
    for leaf in leaves[1:]:
        leaf.grad = torch.ones_like(leaf) if has_grad else None
        leaf.register_hook(handed.append)  # type: ignore[no-untyped-call]
    torch.autograd.backward(3 * function(hidden, replace(head, into_grad=True), fold, labels).sum())
    for leaf, gradient, start in zip(leaves, expected, (0.0, before, before), strict=False):
        assert leaf.grad is not None
        assert_close(leaf.grad, gradient + start)
    # Autograd has none that would wait.
    assert set(handed) <= {None}


@pytest.mark.parametrize("function", [cross_entropy, log_probs])
def test_a_second_derivative_is_refused(function: Any) -> None:
    fold, labels = packed(SEQUENCES, "depth_first")
    hidden, head, _ = draw(fold, torch.float64, "plain")
    loss = function(hidden, head, fold, labels).square().sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.backward(gradient.sum())


def test_what_is_no_head_for_these_states_is_refused() -> None:
    fold, labels = packed(SEQUENCES, "depth_first")
    hidden = torch.zeros(fold.num_rows, HIDDEN, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="lm_head must be a Head, a tensor or None, got Linear"):
        cross_entropy(hidden, torch.nn.Linear(HIDDEN, VOCABULARY), fold, labels)  # type: ignore[arg-type]
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match=f"the head's weight is {dtype}, but hidden is torch.bfloat16"):
            cross_entropy(hidden, torch.zeros(VOCABULARY, HIDDEN, dtype=dtype), fold, labels)
    weight = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="the head's bias must be a tensor or None, got float"):
        cross_entropy(hidden, Head(weight, 1.0), fold, labels)  # type: ignore[arg-type]
    for shape in ((1,), (VOCABULARY + 1,), (VOCABULARY, 1)):
        with pytest.raises(ValueError, match=rf"the head's bias must be \[11\], got shape {re.escape(str(shape))}"):
            cross_entropy(hidden, Head(weight, weight.new_zeros(shape)), fold, labels)
    with pytest.raises(ValueError, match=r"the head's softcap must be positive, got 0\.0"):
        cross_entropy(hidden, Head(weight, softcap=0.0), fold, labels)
    with pytest.raises(ValueError, match="the head's scale must be finite, got inf"):
        cross_entropy(hidden, Head(weight, scale=math.inf), fold, labels)


def test_a_tied_head_and_its_embedding_add_up() -> None:
    fold, labels = packed(SEQUENCES, "depth_first")
    ids = torch.from_numpy(fold.input_ids.astype("int64"))

    def gradient(**options: Any) -> Tensor:
        torch.manual_seed(0)
        weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)
        torch.autograd.backward(cross_entropy(weight[ids], Head(weight, **options), fold, labels))
        assert weight.grad is not None
        return weight.grad

    assert_close(gradient(into_grad=True), gradient())


@pytest.mark.parametrize("kind", ["plain", "bias", "softcap", "logits"])
@pytest.mark.parametrize("chunk", [1, 20, 1 << 28])
def test_log_probs_equal_those_of_every_copy(monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int) -> None:
    monkeypatch.setattr("radix_mlp.torch.labels.MAX_LOGITS", chunk)
    fold, labels = packed(SEQUENCES, "depth_first")
    hidden, head, leaves = draw(fold, torch.float64, kind)
    found = log_probs(hidden, head, fold, labels)
    copies = logits_of(fold.unfold(hidden), head).log_softmax(-1)
    expected = torch.where(labels == -100, 0.0, copies.gather(1, labels.clamp(min=0)[:, None])[:, 0])
    assert_close(found, expected)
    upstream = torch.arange(fold.num_tokens, dtype=torch.float64) - 5
    gradients = torch.autograd.grad(found, leaves, upstream)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert_close(mine, theirs)


def test_a_branch_point_counts_each_label() -> None:
    """Node 2 is followed by 3 twice, by 5 twice and by nothing once: others drop all labels but one."""
    fold, labels = packed(SEQUENCES, "depth_first")
    logits = torch.zeros(fold.num_rows, VOCABULARY, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, None, fold, labels, reduction="sum"), logits)
    branch = gradient[int(fold.scatter_indices[1])]
    uniform = 4 / VOCABULARY
    expected = torch.full((VOCABULARY,), uniform, dtype=torch.float64)
    expected[3] -= 2
    expected[5] -= 2
    assert_close(branch, expected)


@pytest.mark.parametrize("function", [cross_entropy, log_probs])
@pytest.mark.parametrize(
    "limits",
    [
        {"MAX_LOGITS": 2 * VOCABULARY},
        {"MAX_LOGITS": 3 * VOCABULARY, "TILE": 2},
        {"MIN_ROWS": 1, "MAX_SHARE": 0.4},
        {"MIN_ROWS": 2},
    ],
)
def test_logits_exist_for_one_chunk_at_a_time(
    monkeypatch: pytest.MonkeyPatch, function: Any, limits: dict[str, float]
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(f"radix_mlp.torch.labels.{name}", value)
    fold, labels = packed(SEQUENCES, "depth_first")
    hidden, head, leaves = draw(fold, torch.float32, "plain")
    seen: list[tuple[int, StorageWeakRef]] = []
    logsumexp = Tensor.logsumexp

    def spy(logits: Tensor, dim: int) -> Tensor:
        assert all(earlier.expired() for _, earlier in seen)  # type: ignore[no-untyped-call]
        seen.append((len(logits), StorageWeakRef(logits.untyped_storage())))  # type: ignore[no-untyped-call]
        return logsumexp(logits, dim)

    monkeypatch.setattr(Tensor, "logsumexp", spy)
    loss = function(hidden, head, fold, labels).sum()
    # Rows that are followed by nothing have no logits.
    assert [rows for rows, _ in seen] == [2, 2, 1]
    torch.autograd.grad(loss, leaves)


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what a GPU would be given to do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not function.is_view
        return function(*args, **(kwargs or {}))


def test_chunks_do_nothing_that_could_be_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are few, a GPU waits for each of their operations to be launched."""

    def operations(rows: int) -> int:
        monkeypatch.setattr("radix_mlp.torch.labels.MAX_LOGITS", rows * VOCABULARY)
        hidden, head, _ = draw(fold, torch.float32, "plain")
        with Count() as count:
            cross_entropy(hidden, head, fold, labels)
        return int(count.operations)

    fold, labels = packed(SEQUENCES, "depth_first")
    # Five rows predict something. Three products, a softmax and its logarithm, what is read of the logits at labels and
    # written there, and states in and out.
    assert operations(rows=1) - operations(rows=5) <= 4 * 19


@pytest.mark.parametrize("function", [cross_entropy, log_probs])
@pytest.mark.parametrize(
    ("limits", "widths"),
    [
        ({"MAX_LOGITS": 20}, [4, 4, 3]),
        ({"MAX_LOGITS": 25, "TILE": 2}, [4, 4, 3]),
        ({"MIN_ROWS": 1, "MAX_SHARE": 0.4}, [4, 4, 3]),
        ({}, [VOCABULARY]),
    ],
)
def test_logits_are_made_again_some_columns_at_a_time(
    monkeypatch: pytest.MonkeyPatch, function: Any, limits: dict[str, float], widths: list[int]
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(f"radix_mlp.torch.labels.{name}", value)
    make_logits_again(monkeypatch)
    fold, labels = packed(SEQUENCES, "depth_first")
    hidden, head, leaves = draw(fold, torch.float32, "plain")
    loss = function(hidden, head, fold, labels).sum()
    seen: list[tuple[torch.Size, StorageWeakRef]] = []

    def spy(logits: Tensor, *args: Tensor) -> None:
        assert all(earlier.expired() for _, earlier in seen)  # type: ignore[no-untyped-call]
        seen.append((logits.shape, StorageWeakRef(logits.untyped_storage())))  # type: ignore[no-untyped-call]
        softmax_(logits, *args)

    monkeypatch.setattr("radix_mlp.torch.logits.softmax_", spy)
    once, twice = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert [tuple(shape) for shape, _ in seen] == [(5, width) for width in widths] * 2
    for mine, theirs in zip(once, twice, strict=True):
        assert torch.equal(mine, theirs)


def test_only_large_heads_of_few_rows_make_logits_again() -> None:
    rows, large, small = (
        8 * 2560,
        Head(torch.empty(151_936, 2560, device="meta")),
        Head(torch.empty(151_936, 1024, device="meta")),
    )
    assert has_large_sums(large, rows - 1)
    assert not has_large_sums(large, rows)
    assert not has_large_sums(small, 100)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shapes of what matrix products allocate."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            self.shapes.add(result.shape)
        return result


def test_the_gradient_of_a_head_is_added_to_where_it_is() -> None:
    fold, labels = packed(SEQUENCES, "depth_first")
    hidden, head, _ = draw(fold, torch.float32, "plain")
    with Products() as products:
        cross_entropy(hidden, head, fold, labels)
    assert products.shapes == {(5, VOCABULARY), (5, HIDDEN)}


def test_frozen_heads_get_no_gradient() -> None:
    fold, labels = packed(SEQUENCES, "depth_first")
    hidden, head, _ = draw(fold, torch.float32, "plain")
    assert head is not None
    frozen = head.weight.detach()
    (gradient,) = torch.autograd.grad(cross_entropy(hidden, frozen, fold, labels), hidden)
    assert gradient.any()
    with torch.no_grad():
        assert not cross_entropy(hidden, head, fold, labels).requires_grad


def test_compiled_steps_take_a_loss() -> None:
    """The graph breaks around it, once for all folds: what a fold has is for the host to read."""

    def step(hidden: Tensor, head: Tensor, fold: Fold, labels: Tensor) -> Tensor:
        return 2 * cross_entropy(hidden, head, fold, labels) - log_probs(hidden, head, fold, labels).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", dynamic=True)
    for length in (3, 9, 40):
        fold = Fold.from_sequences([[1] * length, [1, 2]])
        hidden, head = torch.randn(fold.num_rows, 4), torch.randn(7, 4)
        labels = torch.arange(fold.num_tokens) % 7
        torch.testing.assert_close(compiled(hidden, head, fold, labels), step(hidden, head, fold, labels))


def test_nothing_to_predict_is_zero() -> None:
    fold, labels = packed([[1], [1]], "depth_first")
    hidden, head, leaves = draw(fold, torch.float32, "plain")
    loss = cross_entropy(hidden, head, fold, labels)
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, leaves))
    assert not log_probs(hidden, head, fold, labels).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, HIDDEN)}, r"hidden must be \[\d+, width\], got shape \(3, 6\)"),
        ({"lm_head": torch.zeros(VOCABULARY, 5)}, r"the head must be \[vocabulary, 6\], got shape \(11, 5\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be \[19\], got shape \(3,\)"),
        ({"labels": torch.full((19,), VOCABULARY)}, r"labels\[0\] is 11, which is not in 0..11"),
        ({"labels": torch.full((19,), -1)}, r"labels\[0\] is -1"),
        ({"weights": torch.ones(2)}, r"weights must be \[19\], got shape \(2,\)"),
        ({"sequence_weights": torch.ones(2)}, r"sequence_weights must be \[7\], got shape \(2,\)"),
        ({"weights": torch.ones(19, requires_grad=True)}, "weights must not require gradients"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in 0..=1, got 1\.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in 0..=1, got -0\.1"),
        ({"z_loss": -1e-3}, r"z_loss must not be negative, got -0\.001"),
        ({"lm_head": torch.zeros(VOCABULARY, HIDDEN, device="meta")}, "head's weight is on meta, but hidden is on cpu"),
        (
            {"lm_head": Head(torch.zeros(VOCABULARY, HIDDEN), torch.zeros(VOCABULARY, device="meta"))},
            "head's bias is on meta, but hidden is on cpu",
        ),
        (
            {"lm_head": Head(2 * torch.zeros(VOCABULARY, HIDDEN, requires_grad=True), into_grad=True)},
            "the head's weight has no grad to add to: it is no leaf, but made by <MulBackward0",
        ),
    ],
)
def test_errors_name_what_is_wrong(change: Options, message: str) -> None:
    fold, labels = packed(SEQUENCES, "depth_first")
    call: Options = {"hidden": torch.zeros(fold.num_rows, HIDDEN), "lm_head": torch.zeros(VOCABULARY, HIDDEN)}
    with pytest.raises(ValueError, match=message):
        cross_entropy(fold=fold, **{**call, "labels": labels, **change})


@pytest.mark.parametrize("labels", [torch.zeros(19), torch.full((19,), 3.5)])
@pytest.mark.parametrize("function", [cross_entropy, log_probs])
def test_labels_are_integers(function: Any, labels: Tensor) -> None:
    fold, _ = packed(SEQUENCES, "depth_first")
    with pytest.raises(TypeError, match=rf"labels must hold integers, got torch.float32 with {labels[0]}"):
        function(torch.zeros(fold.num_rows, HIDDEN), torch.zeros(VOCABULARY, HIDDEN), fold, labels)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("function", [cross_entropy, log_probs])
def test_backward_has_the_logits_of_an_autocast_forward(
    monkeypatch: pytest.MonkeyPatch, function: Any, again: bool
) -> None:
    """The backward pass runs outside autocast, as torch advises: logits that it makes again are bfloat16 still."""
    if again:
        make_logits_again(monkeypatch)
    fold, labels = packed([[1, 2, 3, 4, 5, 6, 7, 8]], "depth_first")
    hidden, head, leaves = draw(fold, torch.float32, "plain")
    with torch.autocast("cpu", torch.bfloat16):
        found = function(hidden, head, fold, labels).sum()
        every = functional.cross_entropy(logits_of(hidden, head).float(), labels, reduction="sum")
    # Gradients of logits are rounded before they are divided.
    by = 1 / (len(labels) - 1) if function is cross_entropy else -1
    gradients = [torch.autograd.grad(value, leaves) for value in (found, every)]
    for mine, theirs in zip(*gradients, strict=True):
        assert_close(mine, theirs * by)
