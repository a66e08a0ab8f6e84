"""What importing the package imports."""

import subprocess
import sys

import pytest

import radix_mlp

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
"""


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_root_imports_neither_torch_nor_transformers() -> None:
    loaded = run("import sys, radix_mlp; radix_mlp.Fold.from_sequences([[1]]).fold([1]); print(*sys.modules)")
    assert {"torch", "transformers"}.isdisjoint(loaded.split())


def test_modules_come_when_they_are_asked_for() -> None:
    code = "import sys, radix_mlp; print('torch' in sys.modules, radix_mlp.transformers.fold, radix_mlp.torch.Head)"
    assert run(code).startswith("False <function fold at ")
    with pytest.raises(AttributeError, match="has no attribute 'jax'"):
        _ = radix_mlp.jax


def test_folds_without_torch() -> None:
    code = """
import radix_mlp
from radix_mlp import *
fold = Fold.from_sequences([[1, 2, 3], [1, 2, 4]])
print(fold.unfold(fold.fold([1, 2, 3, 1, 2, 4])).tolist())
for use in (lambda: radix_mlp.compute_fold_and_scatter_torch, fold.tensors):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    printed = run(BLOCK.format(blocked=("torch", "transformers")) + code).splitlines()
    assert printed == ["[1, 2, 3, 1, 2, 4]", "torch is blocked", "torch is blocked"]


def test_attends_without_transformers() -> None:
    code = """
import torch
from radix_mlp import Fold
from radix_mlp.torch import attention
q = torch.randn(4, 2, 8)
print(attention(q, q, q, Fold.from_sequences([[1, 2, 3], [1, 2, 4]])).shape)
for module in ("transformers", "sentence_transformers"):
    try:
        __import__("radix_mlp." + module)
    except ImportError as error:
        print(error)
"""
    printed = run(BLOCK.format(blocked=("transformers", "sentence_transformers")) + code).splitlines()
    blocked = ["transformers is blocked", "sentence_transformers is blocked"]
    assert printed == ["torch.Size([4, 2, 8])", *blocked]


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compute'"):
        _ = radix_mlp.compute
    for name in radix_mlp.__all__:
        assert getattr(radix_mlp, name) is not None
