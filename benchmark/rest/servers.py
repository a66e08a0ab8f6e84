"""Starts and stops the servers that are compared."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BINARY = ROOT / "target" / "release" / "radix-mlp"
# To load a model and answer for the first time, and to end.
PATIENCE = 300.0
# Tokens, the fewest that vLLM takes on a CPU: at its default there, 128, no prefix of any template here would be found.
VLLM_BLOCK = 32
VLLM_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True)
class Server:
    """How a server is started; `--port` is added. With `openai_model` it speaks OpenAI's route only.

    With `url` it runs already, and there is nothing to start.
    """

    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    openai_model: str | None = None
    url: str | None = None

    def told(self) -> str:
        """The command without what is this machine's own."""
        if self.url:
            return "a running server"
        program = "python" if self.command[0] == sys.executable else Path(self.command[0]).name
        words = [f"{name}={value}" for name, value in self.environment.items()] + [program, *self.command[1:]]
        return " ".join(word.replace(f"{ROOT}/", "") for word in words)


@dataclass(frozen=True)
class Machine:
    """What all servers get alike."""

    model: Path
    device: str
    dtype: str
    threads: int

    def environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads), "RAYON_NUM_THREADS": str(self.threads)}


def radix_mlp(machine: Machine, fold: str, tokens: int, binary: Path = BINARY) -> Server:
    options = ["--fold", fold, "--max-batch-tokens", str(tokens), "--threads", str(machine.threads)]
    options += ["--device", machine.device, "--dtype", machine.dtype, "--request-timeout", "3600"]
    return Server([str(binary), "serve", "-m", str(machine.model), *options], machine.environment())


def sentence_transformers(machine: Machine) -> Server:
    script = str(Path(__file__).with_name("baseline.py"))
    options = ["--device", machine.device, "--dtype", machine.dtype]
    return Server([sys.executable, script, str(machine.model), *options], machine.environment())


def vllm(executable: str, machine: Machine, *, prefix_caching: bool) -> Server:
    """vLLM; prefixes of earlier requests stay in its cache."""
    caching = "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching"
    options = ["--runner", "pooling", "--dtype", VLLM_DTYPES[machine.dtype], "--max-model-len", "4096"]
    options += ["--block-size", str(VLLM_BLOCK), caching]
    environment = machine.environment()
    if machine.device == "cpu":
        cores = sorted(os.sched_getaffinity(0))[: machine.threads]
        environment |= {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        }
    return Server([executable, "serve", str(machine.model), *options], environment, str(machine.model))


def cache_counters(url: str) -> dict[str, float]:
    """vLLM's counts of tokens that it looked for in its cache of prefixes, and found; none of other servers."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return {}
    found = re.findall(r"^vllm:(prefix_cache_(?:queries|hits))_total\S* (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """The URL of `server` once it is healthy. Raises RuntimeError where it ends before."""
    with starting(server) as healthy:
        yield healthy()


@contextmanager
def starting(server: Server) -> Iterator[Callable[[], str]]:
    """A server that starts, and the wait for its URL, which raises RuntimeError where it ends before."""
    if server.url:
        yield lambda: str(server.url)
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = ROOT / "target" / "rest" / f"server_{port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        environment = os.environ | server.environment
        command = [*server.command, "--port", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

        def healthy() -> str:
            _wait(process, url, log)
            return url

        try:
            yield healthy
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
    log.unlink()


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
