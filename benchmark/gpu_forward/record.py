"""JSON results that several runs fill, and what they say of the machine and the code."""

import argparse
import json
import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from gpu_forward.checks import announce
from gpu_forward.models import SHAPES
from machine import cpu, output_of, refuse_other_kernels
from radix_mlp._core import cuda_sources


class Record:
    """A result file, `{"hardware", "versions", "rows"}`; the rows that other runs put there stay.

    No two rows agree in all of `keys`: a new one replaces the old one. Each says with which commit and driver and on
    which day it was measured. Raises ValueError for a file that another GPU or other versions wrote, RuntimeError where
    the extension module was built with other kernels than the tree has.
    """

    def __init__(self, path: Path, commit: str | None, keys: tuple[str, ...]) -> None:
        refuse_other_kernels(cuda_sources())
        self.path, self.keys = path, keys
        self.origin = {
            "commit": commit or output_of("git", "describe", "--always", "--dirty"),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "cpu": cpu(),
        }
        if torch.cuda.is_available():
            self.origin["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        self.result: dict[str, Any] = environment() | {"rows": []}
        if path.exists():
            self.result = json.loads(path.read_text())
        for key, value in environment().items():
            if self.result[key] != value:
                raise ValueError(f"{path} was measured with {self.result[key]}, and this is {value}: take another file")

    def add(self, row: dict[str, Any]) -> None:
        """Put `row` into the file, which is written at once: a run may be cut off."""
        others = [old for old in self.result["rows"] if any(old[key] != row[key] for key in self.keys)]
        self.result["rows"] = [*others, row | self.origin]
        self.write()

    def conclude(self, checks: list[dict[str, Any]]) -> None:
        """Write and print what the targets are found to be."""
        self.result["targets"] = checks
        self.write()
        announce(checks)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.result, indent=1, ensure_ascii=False) + "\n")


def arguments(description: str | None, result: Path, shapes: list[str], rounds: int, ways: Iterable[str] = ()) -> Any:
    """What the measuring scripts of the GPU take: see their help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--batches-file", type=Path, help="what batches.py wrote; none: the synthetic ones only")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the batches to run")
    if ways:
        text = "the only columns to measure, which replace a row of others; none is compared with"
        parser.add_argument("--ways", nargs="+", choices=ways, metavar="NAME", help=f"{text}: {', '.join(ways)}")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, default=result, help="keeps the other rows of the file")
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and small batches, one round")
    given = parser.parse_args()
    if given.smoke:
        given.shapes, given.rounds = ["tiny"], 1
        if given.out == result:
            parser.error("--smoke measures nothing: name another file with --out")
    return given


def environment() -> dict[str, dict[str, Any]]:
    gpu: dict[str, Any] = {}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        gpu = {"gpu": torch.cuda.get_device_name(), "memory_gib": round(memory / 2**30)}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "triton": triton.__version__,
    }
    return {"hardware": gpu, "versions": versions}
