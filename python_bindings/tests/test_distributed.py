"""Two processes that share a batch have the gradients of one that has all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = 2
# More than the workers give themselves, which say where they hang.
SECONDS = 300


@pytest.mark.parametrize("made", ["once", "again"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp_head"])
def test_two_processes_have_the_gradients_of_one(kind: str, made: str, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("distributed_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    logs = [tmp_path / f"rank{rank}.log" for rank in range(RANKS)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(worker), kind, made, str(rank), str(RANKS)]
        with log.open("w") as file:
            arguments = [*command, str(tmp_path / "store")]
            processes.append(subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * RANKS, "\n".join(log.read_text()[-3000:] for log in logs)
