"""What every result says of the machine and the code that it was measured with."""

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def output_of(*command: str) -> str:
    """What a command prints in the repository's root."""
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def refuse_other_kernels(built: Mapping[str, str]) -> None:
    """Raises RuntimeError where the CUDA sources that the extension module was built with are not those of the tree."""
    own = {name: ROOT / "kernels" / "cuda" / name for name in built}
    other = [name for name, path in own.items() if not path.exists() or path.read_text() != built[name]]
    if other:
        raise RuntimeError(f"the extension module was built with another {', '.join(other)}: run `make python` first")
