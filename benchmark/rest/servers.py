"""Starts and stops the servers that are compared."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BINARY = ROOT / "target" / "release" / "radix-mlp"
# To load a model and answer for the first time, and to end.
PATIENCE = 300.0


@dataclass(frozen=True)
class Server:
    """How a server is started; `--port` is added. With `openai_model` it speaks OpenAI's route only."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    openai_model: str | None = None


def radix_mlp(model: Path, *options: str) -> Server:
    return Server([str(BINARY), "serve", "-m", str(model), "--request-timeout", "3600", *options])


def sentence_transformers(model: Path) -> Server:
    return Server([sys.executable, str(Path(__file__).with_name("baseline.py")), str(model)])


def vllm(executable: str, model: Path, *, prefix_caching: bool) -> Server:
    """vLLM's CPU build; prefixes of earlier requests stay in its cache."""
    caching = "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching"
    options = ["--runner", "pooling", "--dtype", "float32", "--max-model-len", "4096", caching]
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }
    return Server([executable, "serve", str(model), *options], environment, str(model))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """The URL of `server` once it is healthy. Raises RuntimeError where it ends before."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = ROOT / "target" / "rest" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        environment = os.environ | server.environment
        command = [*server.command, "--port", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            _wait(process, url, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError(f"the server is not healthy after {PATIENCE} s: {log.read_text()[-2000:]}")
