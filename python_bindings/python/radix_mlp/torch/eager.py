"""What torch.compile leaves alone."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Run `function`, and all that it calls, as they are: a compiled graph breaks around it."""
    return cast("Function", torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def eager_itself(function: Function) -> Function:
    """Run `function` itself as it is, but compile what it calls of the model."""
    return cast("Function", torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]
