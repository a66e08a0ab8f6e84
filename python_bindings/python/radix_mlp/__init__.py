"""Fold a batch of causal sequences onto its prefix trie, so that what they share is computed once.

Importing this package imports neither torch nor transformers: what needs them stands in modules of
its own, `radix_mlp.torch` first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from radix_mlp._core import __version__
from radix_mlp.batching import plan_batches
from radix_mlp.fold import BlockMask, Fold, PathMask, compute_fold_and_scatter

if TYPE_CHECKING:
    from radix_mlp.torch import compute_fold_and_scatter_torch as compute_fold_and_scatter_torch

# Without what needs torch: `import *` works where torch is absent.
__all__ = ["BlockMask", "Fold", "PathMask", "__version__", "compute_fold_and_scatter", "plan_batches"]


# What is there once somebody asks for it.
MODULES = ("sentence_transformers", "torch", "transformers")


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return import_module(f"{__name__}.{name}")
    if name == "compute_fold_and_scatter_torch":
        from radix_mlp.torch import compute_fold_and_scatter_torch

        return compute_fold_and_scatter_torch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
