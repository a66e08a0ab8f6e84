"""What is measured is what the tree holds."""

import pytest

from machine import refuse_other_kernels
from radix_mlp._core import cuda_sources


def test_the_extension_module_has_the_kernels_of_the_tree() -> None:
    refuse_other_kernels(cuda_sources())


@pytest.mark.parametrize("name", ["warp.cuh", "gone.cuh"])
def test_other_kernels_are_named(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"another {name}: run `make python`"):
        refuse_other_kernels(cuda_sources() | {name: "other"})
