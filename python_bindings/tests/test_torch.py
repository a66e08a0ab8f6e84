"""The fold over torch tensors."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

import radix_mlp
from oracle import Batch, batches, naive_fold, paddings
from radix_mlp import Fold
from radix_mlp.torch import FoldTensors, attention, compute_fold_and_scatter_torch
from radix_mlp.torch.fold import _in_one_copy

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
BATCH = Batch([1, 2, 3, 1, 2, 4], [0, 1, 2, 0, 1, 2], [0, 3, 6], [0, 0])
FOLDED = ([1, 2, 3, 4], [0, 1, 2, 2], [0, 1, 2, 0, 1, 3], [0, 1, 2, 5])


def tensors(
    batch: Batch, dtype: torch.dtype = torch.int64, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.tensor(batch.input_ids, dtype=dtype, device=device)
    positions = torch.tensor(batch.position_ids, dtype=dtype, device=device)
    return ids, positions, torch.tensor(batch.cu_seq_lengths, dtype=dtype, device=device)


@given(batches(), paddings)
def test_compute_equals_naive(batch: Batch, pad_multiple_of: int | None) -> None:
    # int32 tensors come back.
    batch.input_ids = [min(token, 2**31 - 1) for token in batch.input_ids]
    folded = compute_fold_and_scatter_torch(*tensors(batch), pad_multiple_of)
    assert tuple(tensor.tolist() for tensor in folded) == naive_fold(batch, pad_multiple_of)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32, torch.uint8])
def test_dtypes_and_devices(dtype: torch.dtype, device: str) -> None:
    batch = tensors(BATCH, dtype, device)
    for bound_checks in (None, False, True):
        folded = compute_fold_and_scatter_torch(*batch, bound_checks=bound_checks)
        assert tuple(tensor.tolist() for tensor in folded) == FOLDED
        assert all(tensor.dtype == torch.int32 for tensor in folded)
        assert all(tensor.device == batch[0].device for tensor in folded)
    assert Fold(*batch).scatter_indices.tolist() == FOLDED[2]


def test_strides_and_the_name_at_the_root() -> None:
    ids, positions, offsets = (torch.stack([tensor, tensor + 1], 1)[:, 0] for tensor in tensors(BATCH))
    assert not ids.is_contiguous()
    folded = radix_mlp.compute_fold_and_scatter_torch(ids, positions, offsets)
    assert tuple(tensor.tolist() for tensor in folded) == FOLDED


def test_empty_batches() -> None:
    nothing = torch.tensor([], dtype=torch.int32)
    assert [len(tensor) for tensor in compute_fold_and_scatter_torch(nothing, nothing, nothing)] == [0] * 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": np.array([1, 2, 3])}, TypeError, "input_ids must be a torch.Tensor, got"),
        ({"input_ids": torch.tensor([1.5, 2, 3])}, TypeError, "input_ids must hold integers.*float32 with 1.5"),
        ({"input_ids": torch.tensor([1.5, 2, 3]).bfloat16()}, TypeError, "input_ids must.*bfloat16 with 1.5"),
        ({"input_ids": torch.tensor([True, False, True])}, TypeError, "input_ids must hold integers.*bool"),
        ({"input_ids": torch.tensor([[1, 2, 3]])}, ValueError, "input_ids must be 1-dimensional"),
        ({"input_ids": torch.tensor([1, -2, 3])}, ValueError, r"input_ids\[1\] is -2"),
        ({"input_ids": torch.tensor([1, 2, 2**31])}, ValueError, "2147483648 does not fit in an int32"),
        ({"position_ids": torch.tensor([0, 1])}, ValueError, "must have same length"),
        ({"position_ids": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "same device.*meta and cpu"),
        ({"pad_multiple_of": 0}, ValueError, "multiple of 0"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "input_ids": torch.tensor([1, 2, 3]),
        "position_ids": torch.tensor([0, 1, 2]),
        "cu_seq_lengths": torch.tensor([0, 3]),
    }
    with pytest.raises(error, match=message):
        compute_fold_and_scatter_torch(**(arguments | change))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["first_occurrence", "depth_first"])
def test_fold_tensors_equal_its_arrays(layout: Any, device: str) -> None:
    fold = Fold(*tensors(BATCH, device=device), layout=layout, pad_multiple_of=8)
    on_device = fold.tensors(device)
    assert fold.tensors(torch.device(device)) is on_device
    for name in FoldTensors.__dataclass_fields__:
        array, tensor = getattr(fold, name), getattr(on_device, name)
        assert (array is None) == (tensor is None)
        if array is not None:
            assert (tensor.dtype, tensor.device.type) == (torch.int32, device)
            assert tensor.tolist() == array.tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_fold_and_unfold_tensors_and_their_gradients(device: str) -> None:
    fold = Fold(*BATCH.arrays())
    states = torch.randn(4, 5, device=device, dtype=torch.float64, requires_grad=True)
    original = fold.unfold(states)
    assert original.device == states.device
    assert torch.equal(original, states[fold.scatter_indices.tolist()])
    assert torch.equal(fold.fold(original), states)
    # Each row's gradient is the sum over its copies.
    (gradient,) = torch.autograd.grad(original.sum(), states)
    assert gradient[:, 0].tolist() == [2, 2, 1, 1]
    with pytest.raises(ValueError, match=r"expected 4 rows, got shape \(6, 5\)"):
        fold.unfold(original)
    with pytest.raises(ValueError, match=r"expected 4 rows, got shape \(\)"):
        fold.unfold(torch.tensor(1.0))


def test_from_padded_takes_tensors_of_one_device_and_integer_masks() -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention_mask must be on the same device as input_ids, got meta and cpu"):
        Fold.from_padded(ids, ids.to("meta"))
    with pytest.raises(TypeError, match=r"attention_mask must hold integers, got torch.float32 with 1\.0"):
        Fold.from_padded(ids, ids.float())
    with pytest.raises(ValueError, match="attention_mask must hold 0 and 1, got 2"):
        Fold.from_padded(ids, ids * 2)


@pytest.mark.parametrize("device", DEVICES)
def test_from_padded_and_from_sequences_take_tensors(device: str) -> None:
    ids = torch.tensor([[0, 1, 2], [1, 2, 3]], device=device)
    mask = torch.tensor([[False, True, True], [True, True, True]], device=device)
    positions = torch.tensor([[7, 0, 1], [0, 1, 2]], device=device)
    sequences = [ids[0, 1:], ids[1]]
    for fold in (
        Fold.from_padded(ids, mask),
        Fold.from_padded(ids, mask.long(), positions),
        Fold.from_sequences(sequences),
    ):
        assert fold.input_ids.tolist() == [1, 2, 3]
        assert fold.position_ids.tolist() == [0, 1, 2]
        assert fold.cu_seq_lengths.tolist() == [0, 2, 5]
    assert Fold.from_sequences(sequences, salts=torch.tensor([1, 2], device=device)).num_nodes == 5


@pytest.mark.parametrize("device", DEVICES)
def test_one_copy_keeps_shapes_and_dtypes(device: str) -> None:
    tensors = {
        "ids": torch.tensor([[2**40, -1], [3, 4]], device=device),
        "mask": torch.tensor([[True, False]], device=device),
        "none": torch.zeros(0, dtype=torch.int32, device=device),
        "wide": torch.tensor([2**32 - 1], device=device).to(torch.uint32),
        "bytes": torch.tensor([7, 255], dtype=torch.uint8, device=device),
    }
    copied = _in_one_copy(tensors)
    assert list(copied) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(copied[name], tensor.cpu().numpy(), strict=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["first_occurrence", "depth_first"])
def test_a_fold_that_inference_has_used_takes_gradients(device: str, layout: Any) -> None:
    """As a policy's old log-probabilities come before its step."""
    fold = Fold(*tensors(BATCH), layout=layout)

    def run() -> torch.Tensor:
        x = torch.ones(4, 2, 8, device=device, requires_grad=True)
        return fold.unfold(attention(x, x, x, fold)) + fold.unfold(x)

    with torch.inference_mode():
        expected = run()
    found = run()
    assert torch.equal(found, expected)
    torch.autograd.backward(found.sum())
