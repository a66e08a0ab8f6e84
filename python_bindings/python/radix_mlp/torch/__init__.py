"""Folding batches of torch tensors, and attention over what is folded. Importing this imports torch."""

from radix_mlp.torch.attend import attention
from radix_mlp.torch.dispatch import pick_backend
from radix_mlp.torch.fold import FoldTensors, compute_fold_and_scatter_torch, fold_tensors
from radix_mlp.torch.handle import fold_handle
from radix_mlp.torch.logits import Head
from radix_mlp.torch.loss import cross_entropy, log_probs, next_token_labels
from radix_mlp.torch.sampler import BalancedBatchSampler, PrefixBatchSampler, restore_order

__all__ = [
    "BalancedBatchSampler",
    "FoldTensors",
    "Head",
    "PrefixBatchSampler",
    "attention",
    "compute_fold_and_scatter_torch",
    "cross_entropy",
    "fold_handle",
    "fold_tensors",
    "log_probs",
    "next_token_labels",
    "pick_backend",
    "restore_order",
]
