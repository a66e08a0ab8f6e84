"""Makes a CUDA toolkit to build with, on a machine without a GPU, from the wheels of PyPI.

The wheels bring nvcc, headers and libraries. What they lack is made here: the names that a linker looks for, and a
driver library without code, `stubs/libcuda.so`, for machines that have no driver to link against.

    python3 kernels/toolkit.py target/cuda     # prints the folder to set CUDA_HOME to
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Of one CUDA release, the oldest that has machine code for all GPUs of build.rs and that candle 0.11 knows.
WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-nvrtc==13.0.88",
    "nvidia-cublas==13.1.0.3",
    "nvidia-curand==10.4.0.35",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put it; what is complete there is kept")
    folder = parser.parse_args().folder.resolve()
    home = folder / "nvidia" / "cu13"
    complete = folder / "complete"
    if not complete.exists() or complete.read_text().split() != WHEELS:
        install(folder)
        name_libraries(home / "lib")
        make_driver_stub(home)
        complete.write_text("\n".join(WHEELS))
    print(home)


def install(folder: Path) -> None:
    print("Installing a CUDA toolkit from PyPI: 700 MB, once.", file=sys.stderr)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--root-user-action=ignore",
    ]
    subprocess.run([*pip, "--no-deps", "--upgrade", "--target", str(folder), *WHEELS], check=True)


def name_libraries(libraries: Path) -> None:
    """A linker looks for libx.so in lib64, and the wheels have libx.so.13 in lib."""
    for library in libraries.glob("lib*.so.*"):
        name = libraries / library.name.split(".so.")[0]
        link = name.with_name(f"{name.name}.so")
        if not link.exists():
            link.symlink_to(library.name)
    link = libraries.with_name("lib64")
    if not link.exists():
        link.symlink_to(libraries.name)


def make_driver_stub(home: Path) -> None:
    """A library with every function of the driver's header, none of which does anything."""
    header = (home / "include" / "cuda.h").read_text()
    functions = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()|(?<=[ \t])cu[A-Z]\w+_v\d+\b", header)))
    stubs = home / "lib" / "stubs"
    stubs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "cuda.c"
        source.write_text("".join(f"void {function}(void) {{}}\n" for function in functions))
        library = stubs / "libcuda.so"
        command = [
            "cc",
            "-shared",
            "-fPIC",
            "-w",
            "-fno-builtin",
            "-Wl,-soname,libcuda.so.1",
            "-o",
            str(library),
            str(source),
        ]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
