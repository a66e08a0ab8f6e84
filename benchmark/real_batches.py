"""Tokenises real batches of ../shared/data with its Qwen3 tokenizer.

Run by itself it writes them to target/real_batches.json, which the Rust bench `fold` reads.
"""

import importlib.util
import json
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


def real_batches() -> dict[str, list[list[int]]]:
    """Token ids of each sequence of each file's first batch; none, and the reason printed, without the data."""
    if not DATA.is_dir():
        print(f"skipped: no real batches at {DATA}")
        return {}
    spec = importlib.util.spec_from_file_location("render", DATA / "render.py")
    assert spec is not None
    assert spec.loader is not None
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    tokenizer = Tokenizer.from_file(str(DATA / "qwen3-tokenizer" / "tokenizer.json"))
    return {path.name.split(".")[0]: first_batch(render, tokenizer, path) for path in sorted(DATA.glob("*.jsonl"))}


def first_batch(render: Any, tokenizer: Any, path: Path) -> list[list[int]]:
    mode = next((mode for word, mode in MODES if word in path.name), None)
    batch: list[list[int]] = []
    tokens = 0
    for _, texts in render.groups(path, mode):
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
        batch += ids
        tokens += sum(map(len, ids))
        if tokens >= MIN_TOKENS:
            break
    return batch


if __name__ == "__main__":
    batches = real_batches()
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(batches))
    print(f"{len(batches)} batches, {sum(len(ids) for batch in batches.values() for ids in batch)} tokens: {OUTPUT}")
