"""Folds transformers models without touching their code. Importing this imports torch and transformers (≥ 5.17)."""

from radix_mlp.transformers.folding import fold, folded, is_folded, unfold
from radix_mlp.transformers.support import UnsupportedModelError

__all__ = ["UnsupportedModelError", "fold", "folded", "is_folded", "unfold"]
