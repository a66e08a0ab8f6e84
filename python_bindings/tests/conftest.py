import os
from typing import Any

import pytest
from hypothesis import settings

# The first example pays for imports: no example is judged by its time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Where there is no GPU, Triton interprets its kernels. It reads this when it is imported.
try:
    import torch
except ImportError:
    pass
else:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def model() -> Any:
    from tiny import make

    return make()


@pytest.fixture(params=["right", "left"])
def batch(request: pytest.FixtureRequest) -> Any:
    from tiny import padded

    return padded(request.param)
