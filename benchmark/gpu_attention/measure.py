"""What one layer's attention over a folded batch costs on a GPU, in bfloat16, by backend.

Random queries, keys and values at the heads of Qwen3, for the batches of gpu_forward:

- none, none tree: FlashAttention's varlen kernel and our tree kernel, every copy computed;
- query_folded, tree: the backends of radix_mlp.torch.attention on the folded batch;
- flex: FlexAttention, compiled for dynamic shapes, with the block lists of the fold.

"forward_ms" and "training_ms" (forward and backward) are medians of `triton.testing.do_bench`, by CUDA events.
"first_..." is the first call of each on this batch, which compiles where it must: that of a run's first row is the
first of its process. "new_shape_ms" is what a batch of another shape takes at its first call beyond its second, the
median of a few once everything is compiled; the fold is made before. "work" is what the cost model counts: fit.py.

    python benchmark/gpu_attention/measure.py --batches-file target/gpu_batches.json
    python benchmark/gpu_attention/measure.py --smoke --out target/smoke.json    # small batches: does it run?
    python benchmark/gpu_attention/measure.py --plot    # draws the plot from the JSON result
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))

from gpu_attention.fit import picked, predicted  # noqa: E402
from gpu_attention.targets import targets  # noqa: E402
from gpu_forward.batches import Batch, load  # noqa: E402
from gpu_forward.record import Record  # noqa: E402
from radix_mlp import Fold  # noqa: E402
from radix_mlp.torch import attention  # noqa: E402
from radix_mlp.torch.cost import Work, flash_work, tree_work  # noqa: E402
from radix_mlp.torch.forward_mask import forward_mask  # noqa: E402

RESULT = ROOT / "benchmark" / "results" / "gpu_attention.json"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HEADS = [(16, 8), (32, 8)]
HEAD_DIM = 128
# Of FlexAttention's block lists; its folds are padded to it.
BLOCK = 128
METHODS = ("none", "none tree", "query_folded", "tree", "flex")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Beyond its limit of compiled versions it would compute every score.
torch._dynamo.config.recompile_limit = 64
compiled = torch.compile(flex_attention, dynamic=True) if CUDA else flex_attention


def fold(batch: Batch, method: str) -> Fold:
    salts = list(range(len(batch))) if method.startswith("none") else None
    multiple = BLOCK if method == "flex" else None
    return Fold.from_sequences(batch, layout="depth_first", salts=salts, pad_multiple_of=multiple)


def attend(method: str, folded: Fold) -> Attend:
    """`method` over `folded`, on whose first call what it needs beside the fold is made."""
    if method == "flex":
        return flex(folded)
    backend: Any = {"none": "query_folded", "none tree": "tree"}.get(method, method) if CUDA else "sequential"
    return lambda q, k, v: attention(q, k, v, folded, backend=backend)


def flex(folded: Fold) -> Attend:
    mask: BlockMask | None = None

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal mask
        if mask is None:
            mask = block_mask(folded)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out.squeeze(0).transpose(0, 1)

    return call


def block_mask(folded: Fold) -> BlockMask:
    blocks = folded.block_mask(BLOCK)
    partial, full = dense(*blocks.partial), dense(*blocks.full)
    ends = folded.tensors(DEVICE).subtree_end
    assert ends is not None
    # A tensor of its own: compiled code wants its inputs aligned.
    subtree_end = ends.clone()

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (q < subtree_end[kv])

    lengths = (folded.num_rows, folded.num_rows)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK, sees, lengths)


def dense(offsets: Any, keys: Any) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, [1, 1, blocks], and which, [1, 1, blocks, blocks]."""
    counts = np.diff(offsets).astype(np.int32)
    table = np.zeros((len(counts), len(counts)), np.int32)
    queries = np.repeat(np.arange(len(counts)), counts)
    table[queries, np.arange(len(keys)) - np.repeat(offsets[:-1].astype(np.int64), counts)] = keys
    return torch.from_numpy(counts).to(DEVICE)[None, None], torch.from_numpy(table).to(DEVICE)[None, None]


def inputs(folded: Fold, heads: int, kv_heads: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(folded.num_rows, count, HEAD_DIM) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def train(call: Attend, qkv: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(call(*qkv), qkv, gradient)


def wall_ms(call: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return round(1e3 * (time.perf_counter() - start), 4)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def median_ms(call: Callable[[], object]) -> float:
    """Of a call on the device."""
    if not CUDA:
        return statistics.median(wall_ms(call) for _ in range(3))
    from triton import testing

    do_bench: Any = testing.do_bench
    milliseconds: float = do_bench(call, warmup=20, rep=100, return_mode="median")
    return round(milliseconds, 4)


def measure(method: str, batch: Batch, heads: int, kv_heads: int) -> dict[str, float]:
    folded = fold(batch, method)
    qkv = inputs(folded, heads, kv_heads)
    gradient = torch.randn_like(qkv[0])
    call = attend(method, folded)

    @torch.no_grad()
    def forward() -> Tensor:
        return call(*(x.detach() for x in qkv))

    def training() -> None:
        train(call, qkv, gradient)

    result = {"first_forward_ms": wall_ms(forward), "forward_ms": median_ms(forward)}
    if CUDA or method != "flex":  # FlexAttention has no backward pass on the CPU.
        result |= {"first_training_ms": wall_ms(training), "training_ms": median_ms(training)}
    shapes = [batch[:-fewer] for fewer in (1, 2, 3)]
    new = [new_shape_ms(method, other, heads, kv_heads) for other in shapes]
    return result | {"new_shape_ms": round(statistics.median(new), 4)}


@torch.no_grad()
def new_shape_ms(method: str, batch: Batch, heads: int, kv_heads: int) -> float:
    folded = fold(batch, method)
    qkv = [x.detach() for x in inputs(folded, heads, kv_heads)]
    call = attend(method, folded)
    first, second = (wall_ms(lambda: call(*qkv)) for _ in range(2))
    return first - second


def work(batch: Batch, heads: int, kv_heads: int) -> dict[str, Work]:
    """What the cost model counts, by way."""
    unshared, folded = fold(batch, "none"), fold(batch, "tree")
    q, k = (torch.empty(folded.num_rows, n, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE) for n in (heads, kv_heads))
    mask = forward_mask(folded, q, k, None)
    return {
        "none": flash_work(unshared, heads, kv_heads, HEAD_DIM, None),
        "query_folded": flash_work(folded, heads, kv_heads, HEAD_DIM, None),
        "tree": tree_work(folded.num_rows, mask.pairs, mask.tiles, kv_heads, heads // kv_heads, HEAD_DIM),
    }


def row(name: str, batch: Batch, heads: int, kv_heads: int) -> dict[str, Any]:
    folded = fold(batch, "tree")
    measured: dict[str, dict[str, float]] = {}
    skipped: dict[str, str] = {}
    for method in METHODS:
        try:
            measured[method] = measure(method, batch, heads, kv_heads)
        except torch.OutOfMemoryError as error:
            skipped[method] = str(error).split(". ")[0]
    return {
        "batch": name,
        "heads": f"{heads}/{kv_heads}",
        "tokens": folded.num_tokens,
        "nodes": folded.num_nodes,
        "compression": round(folded.compression, 4),
        "work": work(batch, heads, kv_heads),
        "measured": measured,
        "skipped": skipped,
    }


def show(row: dict[str, Any]) -> None:
    print(f"\n{row['batch']}, heads {row['heads']}, compression {row['compression']:.2f}")
    for method, times in (row["measured"] | row["skipped"]).items():
        print(f"  {method:14}{times}")
    for kind in ("forward", "training"):
        expected = {way: round(milliseconds, 4) for way, milliseconds in predicted(row, kind).items()}
        print(f"  {kind}: expected {expected}, cheapest {picked(row, kind)}")


def plot(result: dict[str, Any], output: Path) -> None:
    """Speed-up over `none` of each backend, forward and training, with compression as the ceiling."""
    rows = sorted(result["rows"], key=lambda row: row["heads"])
    figure, panels = plt.subplots(2, 1, figsize=(11, 8), layout="constrained")
    x = np.arange(len(rows))
    for axes, kind in zip(panels, ("forward", "training"), strict=True):
        for index, method in enumerate(METHODS[1:]):
            heights = [ratio(row["measured"], method, f"{kind}_ms") for row in rows]
            bars = axes.bar(x + 0.2 * (index - 1.5), heights, 0.19, label=method)
            axes.bar_label(
                bars,
                ["" if np.isnan(height) else f"{height:.{2 if height < 10 else 1}f}" for height in heights],
                fontsize=6,
            )
        ceilings = [row["compression"] for row in rows]
        axes.hlines(ceilings, x - 0.42, x + 0.42, "black", "dashed", label="compression N/N'")
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set_yscale("log")
        axes.margins(x=0.01)
        axes.set_ylabel(f"{kind}: speed over none")
        axes.set_xticks(x, [f"{row['batch'].replace(' ', chr(10))}\n{row['heads']}" for row in rows], fontsize=7)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"Attention of one layer, bf16, heads of {HEAD_DIM}, {result['hardware'].get('gpu', 'CPU')}")
    figure.savefig(output, dpi=110)
    plt.close(figure)


def ratio(measured: dict[str, dict[str, float]], method: str, key: str) -> float:
    both = [measured.get(name, {}).get(key, np.nan) for name in ("none", method)]
    return float(both[0] / both[1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches-file", type=Path, help="what gpu_forward/batches.py wrote; none: the synthetic ones")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the batches to run")
    parser.add_argument("--out", type=Path, default=RESULT, help="keeps the other rows of the file; --plot reads it")
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--smoke", action="store_true", help="small batches")
    parser.add_argument("--plot", action="store_true", help="only draw the plot beside the JSON result")
    arguments = parser.parse_args()
    if arguments.smoke and arguments.out == RESULT:
        parser.error("--smoke measures nothing: name another file with --out")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.plot:
        plot(json.loads(arguments.out.read_text()), arguments.out.with_suffix(".png"))
        return
    record = Record(arguments.out, arguments.commit, ("batch", "heads"))
    batches = load(arguments.batches_file, arguments.only, smoke=arguments.smoke)
    for heads, kv_heads in HEADS[:1] if arguments.smoke else HEADS:
        for name in tqdm(batches, desc=f"{heads}/{kv_heads}"):
            measured = row(name, batches[name], heads, kv_heads)
            record.add(measured)
            show(measured)
    record.conclude(targets(record.result["rows"]))


if __name__ == "__main__":
    main()
