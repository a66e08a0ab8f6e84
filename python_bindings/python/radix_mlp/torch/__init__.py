"""Folding batches of torch tensors, and attention over what is folded. Importing this imports torch."""

from radix_mlp.torch.dispatch import attention, pick_backend
from radix_mlp.torch.fold import FoldTensors, compute_fold_and_scatter_torch, fold_tensors
from radix_mlp.torch.sampler import PrefixBatchSampler, restore_order

__all__ = [
    "FoldTensors",
    "PrefixBatchSampler",
    "attention",
    "compute_fold_and_scatter_torch",
    "fold_tensors",
    "pick_backend",
    "restore_order",
]
