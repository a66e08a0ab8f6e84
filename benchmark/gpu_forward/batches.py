"""The batches that the GPU benchmarks run, as lists of token ids.

    python benchmark/gpu_forward/batches.py    # tokenises the real ones of ../shared/data to target/gpu_batches.json

The measuring scripts read that file with `--batches-file`: the machine with the GPU needs neither the data nor the
tokenizer. Its texts must not be committed, and target/ is not.
"""

import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "target" / "gpu_batches.json"
# Qwen3's, of the words that its tokenizer knows.
VOCABULARY = 151_643
# With the words between which a reranker decides.
SMOKE_VOCABULARY = 10_000
TASK = "logical_deduction_three_objects"

Batch = list[list[int]]


def synthetic(scale: int = 1) -> dict[str, Batch]:
    """Random tokens in trees of several forms; `scale` divides all lengths."""
    draw = random.Random(0)

    def tree(*levels: tuple[int, int]) -> Batch:
        """Every node of a level has children at the next: (how many, of how many tokens)."""
        paths: Batch = [[]]
        for children, length in levels:
            count = -(-length // scale)
            paths = [path + draw.choices(range(VOCABULARY), k=count) for path in paths for _ in range(children)]
        return paths

    return {
        "32 x 2048+256": tree((1, 2048), (32, 256)),
        "256 x 2048+16": tree((1, 2048), (256, 16)),
        "three-level tree": tree((1, 1024), (8, 256), (8, 128)),
        "nothing shared": tree((32, 2048)),
        "little shared": tree((1, 100), (32, 1948)),
    }


def unshared(like: Batch, tokens: int) -> Batch:
    """Random sequences of `tokens` tokens in all, of lengths drawn from those of `like`; the last one is cut."""
    draw = random.Random(0)
    words = range(1 + max(map(max, like)))
    batch: Batch = []
    while tokens:
        length = min(len(draw.choice(like)), tokens)
        batch.append(draw.choices(words, k=length))
        tokens -= length
    return batch


def load(path: Path | None, only: list[str] | None = None, *, smoke: bool = False) -> dict[str, Batch]:
    """The synthetic batches and those of the file `path`, or `only` those named; at `smoke` a small part of each."""
    real: dict[str, Batch] = json.loads(path.read_text()) if path else {}
    batches = synthetic(64 if smoke else 1) | real
    if unknown := set(only or ()) - set(batches):
        raise SystemExit(f"no batch {', '.join(unknown)}: there are {', '.join(batches)}")
    batches = {name: batches[name] for name in only or batches}
    return {name: small(batch) for name, batch in batches.items()} if smoke else batches


def small(batch: Batch) -> Batch:
    """A part of `batch` for a tiny model."""
    return [[token % SMOKE_VOCABULARY for token in ids[:128]] for ids in batch[:8]]


def tokenise() -> dict[str, Batch]:
    """64 pairs of one query, 32 questions behind one few-shot prompt, 22 turns of one task's conversations."""
    from real_batches import DATA, groups

    _, pairs = next(groups(DATA / "rerank_msmarco_dl19_bm25.dev.jsonl"))
    questions = next(batch for name, batch in groups(DATA / "fewshot_bbh_cot.dev.jsonl") if name == TASK)
    _, turns = next(groups(DATA / "tree_taubench_airline_gpt4o.dev.jsonl"))
    return {"rerank": pairs[:64], "few-shot BBH": questions[:32], "tau-bench turns": turns[:22]}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "benchmark"))
    batches = tokenise()
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(batches, separators=(",", ":")))
    for name, batch in batches.items():
        print(f"{name}: {len(batch)} sequences, {sum(map(len, batch))} tokens")
    print(OUTPUT)
