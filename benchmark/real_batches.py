"""Tokenises real batches of ../shared/data with its Qwen3 tokenizer.

Run by itself it writes them to target/real_batches.json, which the Rust bench `fold` reads.
"""

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
OUTPUT = ROOT / "target" / "real_batches.json"

# Groups that share a prefix join a batch, in the order of the file, until it has this many tokens.
MIN_TOKENS = 16_384
# How render.py turns the rows of these files into sequences.
MODES = [("rerank", "qwen3"), ("taubench", "turns")]

Batch = list[list[int]]


def real_batches() -> dict[str, Batch]:
    """Token ids of each sequence of each file's first batch; none, and the reason printed, without the data."""
    if not DATA.is_dir():
        print(f"skipped: no real batches at {DATA}")
        return {}
    return {path.name.split(".")[0]: first_batch(path) for path in sorted(DATA.glob("*.jsonl"))}


def first_batch(path: Path) -> Batch:
    batch: Batch = []
    tokens = 0
    for _, sequences in groups(path):
        batch += sequences
        tokens += sum(map(len, sequences))
        if tokens >= MIN_TOKENS:
            break
    return batch


def groups(path: Path) -> Iterator[tuple[str, Batch]]:
    """The groups of a data file that share prefixes: each one's name and the token ids of its sequences."""
    mode = next((mode for word, mode in MODES if word in path.name), None)
    for group, texts in render().groups(path, mode):
        encoded = tokenizer().encode_batch(texts, add_special_tokens=False)
        yield str(group), [encoding.ids for encoding in encoded]


@cache
def render() -> Any:
    spec = importlib.util.spec_from_file_location("render", DATA / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DATA / "qwen3-tokenizer" / "tokenizer.json"))


if __name__ == "__main__":
    batches = real_batches()
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(batches))
    print(f"{len(batches)} batches, {sum(len(ids) for batch in batches.values() for ids in batch)} tokens: {OUTPUT}")
