"""What is measured is what the tree holds."""

from pathlib import Path

import pytest

from gpu_forward import record
from machine import refuse_other_kernels
from radix_mlp._core import cuda_sources


def test_the_extension_module_has_the_kernels_of_the_tree() -> None:
    refuse_other_kernels(cuda_sources())


@pytest.mark.parametrize("name", ["warp.cuh", "gone.cuh"])
def test_other_kernels_are_named(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"another {name}: run `make python`"):
        refuse_other_kernels(cuda_sources() | {name: "other"})


def test_no_result_is_opened_for_other_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "cuda_sources", lambda: {"warp.cuh": "other"})
    with pytest.raises(RuntimeError, match="run `make python` first"):
        record.Record(tmp_path / "result.json", "none", ("shape",))
