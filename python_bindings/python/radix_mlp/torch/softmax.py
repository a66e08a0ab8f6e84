"""Softmax over a vocabulary, without a copy of the logits in float32 where a kernel of ours can do without."""

import torch
from torch import Tensor

BLOCK = 4096


def reads_logits(logits: Tensor) -> bool:
    """Whether the kernels take these logits as they are; torch's operations want float32 or float64."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return logits.dtype in dtypes and logits.stride(-1) == 1 and runs_on(logits.device)


def logsumexp(logits: Tensor) -> Tensor:
    """That of each row of `logits` [rows, vocabulary]; float32 at least."""
    if not reads_logits(logits):
        return logits.logsumexp(-1)
    from radix_mlp.torch.softmax_kernels import row_logsumexp

    rows, columns = logits.shape
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    row_logsumexp[(rows,)](logits, lse, columns, logits.stride(0), BLOCK=BLOCK)  # type: ignore[arg-type]
    return lse


def softmax_(logits: Tensor, lse: Tensor, factor: Tensor, shift: Tensor) -> None:
    """Replace `logits` [rows, vocabulary] by exp(logits - lse) * factor - shift, the last three [rows]."""
    if not reads_logits(logits):
        logits.sub_(lse[:, None]).exp_().mul_(factor[:, None]).sub_(shift[:, None])
        return
    from radix_mlp.torch.softmax_kernels import softmax_in_place

    rows, columns = logits.shape
    grid = (rows, -(-columns // BLOCK))
    softmax_in_place[grid](logits, lse, factor, shift, columns, logits.stride(0), BLOCK=BLOCK)  # type: ignore[arg-type]


def runs_on(device: torch.device) -> bool:
    """Whether kernels run there."""
    if device.type != "cuda":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
