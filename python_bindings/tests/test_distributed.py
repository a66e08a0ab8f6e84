"""Two processes that share a batch have the gradients of one that has all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one(kind: str) -> None:
    worker = Path(__file__).with_name("distributed_worker.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker), kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
