"""Imported first, has Triton interpret its kernels where there is no GPU: Triton reads this when it is imported."""

import os

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
