"""Builds what runs the model on CUDA elsewhere: `make cuda-bundle`.

The bundle is a folder, and the same as .tar.xz, for any x86-64 Linux with a driver and CUDA 13's libraries:

- radix-mlp: the command, with `--device cuda:N` and the server;
- test: runs every test that needs a GPU and prints a summary (`test --sanitize` under compute-sanitizer);
- measure, forward: what benchmark/gpu_kernels/measure.py asks for times;
- sources.json: digests of what all that was built from.

    python3 kernels/bundle.py target/cuda target/cuda-bundle     # where the toolkit goes, and the bundle
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "sources.json"
BUILT = [
    "Cargo.lock",
    "Cargo.toml",
    "kernels/Cargo.toml",
    "kernels/build.rs",
    "package/Cargo.toml",
    *(
        f"{folder}/**/*"
        for folder in ("kernels/cuda", "kernels/src", "kernels/examples", "package/src", "package/examples")
    ),
]
# The oldest GPUs that the kernels run on; drivers translate candle's for newer ones.
OLDEST = "80"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toolkit", type=Path, help="as for toolkit.py, where CUDA_HOME is not set")
    parser.add_argument("bundle", type=Path, help="a folder that is made anew")
    given = parser.parse_args()
    environment = os.environ | cuda(given.toolkit)
    shutil.rmtree(given.bundle, ignore_errors=True)
    given.bundle.mkdir(parents=True)
    radix_mlp = ["-p", "radix_mlp", "--features", "cuda,server"]
    kernels = ["-p", "radix_mlp_kernels", "--features", "cuda"]
    programs = {
        "radix-mlp": ["build", *radix_mlp, "--bin", "radix-mlp"],
        "forward": ["build", *radix_mlp, "--example", "forward"],
        "measure": ["build", *kernels, "--example", "measure"],
        "tests/radix_mlp_kernels": ["test", "--no-run", *kernels, "--lib"],
        "tests/kernels": ["test", "--no-run", *kernels, "--test", "kernels"],
        "tests/qwen3_transformers": ["test", "--no-run", *radix_mlp, "--test", "qwen3_transformers"],
    }
    for name, command in programs.items():
        place = given.bundle / name
        place.parent.mkdir(exist_ok=True)
        shutil.copy2(build(command, place.name, environment), place)
        subprocess.run(["strip", place], check=True)
    shutil.copy2(ROOT / "kernels" / "bundle_test.sh", given.bundle / "test")
    shutil.copy2(ROOT / "package" / "tests" / "make_checkpoints.py", given.bundle / "tests")
    (given.bundle / SOURCES).write_text(json.dumps(sources(), indent=1))
    print(shutil.make_archive(str(given.bundle), "xztar", given.bundle.parent, given.bundle.name))


def sources() -> dict[str, str]:
    """The SHA-256 of each file that the programs are built from, by its path in the repository."""
    files = [file for pattern in BUILT for file in sorted(ROOT.glob(pattern)) if file.is_file()]
    return {str(file.relative_to(ROOT)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def refuse_other_sources(bundle: Path) -> None:
    """Raises RuntimeError where a bundle was built from other sources than the tree has."""
    file = bundle / SOURCES
    built = json.loads(file.read_text()) if file.exists() else {}
    own = sources()
    if other := sorted(name for name in own | built if own.get(name) != built.get(name)):
        raise RuntimeError(f"{bundle} was built with another {', '.join(other)}: run `make cuda-bundle` first")


def cuda(toolkit: Path) -> dict[str, str]:
    """Variables that candle's and our build scripts look at."""
    home = os.environ.get("CUDA_HOME")
    if not home:
        command = [sys.executable, str(ROOT / "kernels" / "toolkit.py"), str(toolkit)]
        home = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return {"CUDA_HOME": home, "PATH": f"{home}/bin:{os.environ['PATH']}", "CUDA_COMPUTE_CAP": OLDEST}


def build(command: list[str], target: str, environment: dict[str, str]) -> Path:
    """What `cargo COMMAND` makes of `target`; for tests it makes the package's programs too."""
    # Beside the builds without CUDA, whose programs have the same names.
    apart = ["--target-dir", str(ROOT / "target" / "cuda-build")]
    cargo = ["cargo", *command, "--release", *apart, "--message-format=json-render-diagnostics"]
    output = subprocess.run(cargo, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines()]
    made = [message for message in messages if message.get("executable")]
    (executable,) = [message["executable"] for message in made if message["target"]["name"] == target]
    return Path(executable)


if __name__ == "__main__":
    main()
