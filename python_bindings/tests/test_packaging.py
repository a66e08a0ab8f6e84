"""What `pip install` builds where there is no wheel."""

import subprocess
import sys
import tarfile
from pathlib import Path

from radix_mlp._core import cuda_sources

ROOT = Path(__file__).resolve().parents[2]


def test_the_source_distribution_has_what_cargo_reads(tmp_path: Path) -> None:
    maturin = [sys.executable, "-m", "maturin", "sdist", "--out", str(tmp_path)]
    subprocess.run(maturin, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    cargo = ["cargo", "metadata", "--offline", "--no-deps", "--format-version", "1"]
    subprocess.run(cargo, cwd=unpacked, check=True, capture_output=True)
    assert cuda_sources().keys() <= {path.name for path in (unpacked / "kernels" / "cuda").iterdir()}
