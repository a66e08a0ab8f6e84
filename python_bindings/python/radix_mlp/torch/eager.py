"""What torch.compile leaves alone."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Run `function`, and all that it calls, as they are: a compiled graph breaks around it."""
    return cast("Function", torch.compiler.disable(function))  # type: ignore[no-untyped-call]
