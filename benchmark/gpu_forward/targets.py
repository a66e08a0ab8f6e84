"""What the measured speed-ups are held to.

The fastest folded way is held against `none`, compiled or not, and then against the fastest unfolded way, which is the
padded one where sequences are of equal length. Where the unshared batch is the measure, models are compared as they
are, replayed as graphs or not, and then with compiled layers as well, of which attention is the larger part.
"""

from collections.abc import Callable, Iterable
from typing import Any

from gpu_forward.checks import at_least, at_most, with_flops

Row = dict[str, Any]

SHARE = {"qwen3-0.6b": 0.9, "qwen3-4b": 0.95, "qwen3-8b": 0.95}
CONTROLS = ("nothing shared", "little shared")
NONE = ("none", "none compiled")
UNFOLDED = ("padded", "none", "none graphs", "padded compiled", "none compiled")
FOLDED = ("full", "full graphs", "full compiled")
UNSHARED = ("unshared", "unshared graphs", "unshared compiled")
OVER = {"`none`": NONE, "the fastest unfolded way": UNFOLDED}
# Folded and unshared ways that are compared.
BESIDE = {"without compiled layers": (FOLDED[:2], UNSHARED[:2]), "the fastest of all": (FOLDED, UNSHARED)}
# Below so many nodes, `full` is held to an unshared batch of as many tokens.
SMALL = 8000
KINDS_OF_DECISIONS = ("last", "sampled", "pairs")
# Batch sizes at which `none` decides otherwise than at the whole batch.
OTHER_SIZES = ("half a batch", "a quarter", "two at a time", "one at a time")
# What the fold flips and what a size does: the kernel that `full` picks against FlashAttention of `none`, then with one
# kernel on both sides.
COMPARED = {
    "": ("full from none", "{} from none"),
    ", both with FlashAttention": ("query_folded from none", "{} from none"),
    ", both with the tree kernel": ("tree full from tree none", "tree {} from tree none"),
}


def targets(rows: list[Row]) -> list[Row]:
    """Each target with the worst value of the rows that it is about, by the wall clock; none without such rows."""
    checks: list[Row] = []
    for shape, share in SHARE.items():
        own = [row for row in rows if row["shape"] == shape]
        large = [row for row in own if row["nodes"] >= SMALL and row["compression"] >= 2]
        small = [row for row in own if row["nodes"] < SMALL]
        text = f"{shape}, from {SMALL:,} nodes on: speed-up over {{}} as a share of compression"
        checks += speed_targets(text, share, large, of_compression)
        text = f"{shape}, below {SMALL:,} nodes: time of as many unshared tokens over that of the nodes"
        for which, ways in BESIDE.items():
            found = [(over_unshared(row, *ways), with_unshared_flops(row)) for row in small]
            checks += at_least(f"{text}, {which}", 1 / 1.1, found)
    rerank = [row for row in rows if (row["shape"], row["batch"]) == ("qwen3-4b", "rerank")]
    checks += speed_targets(
        "qwen3-4b, rerank: speed-up over {} as a share of compression", 0.95, rerank, of_compression
    )
    control = [row for row in rows if row["shape"] in SHARE and row["batch"] in CONTROLS]
    checks += speed_targets("controls: speed-up over {}", 0.98, control, speedup)
    return checks + flip_targets([row["flips"] for row in rows if row["shape"] in SHARE and "flips" in row])


def speed_targets(
    text: str, limit: float, rows: list[Row], value: Callable[[Row, Iterable[str]], float | None]
) -> list[Row]:
    """Over each of OVER, whose name goes into the text."""
    return [
        check
        for name, over in OVER.items()
        for check in at_least(
            text.format(name),
            limit,
            [(value(row, over), with_flops(f"{row['shape']}, {row['batch']}", row)) for row in rows],
        )
    ]


def fastest(row: Row, names: Iterable[str]) -> float | None:
    """Milliseconds of the fastest of the columns that were measured."""
    return min((row["wall_ms"][name] for name in names if name in row["wall_ms"]), default=None)


def speedup(row: Row, over: Iterable[str], folded: Iterable[str] = FOLDED) -> float | None:
    """Of the fastest folded way."""
    slow, fast = fastest(row, over), fastest(row, folded)
    return None if slow is None or fast is None else slow / fast


def of_compression(row: Row, over: Iterable[str]) -> float | None:
    found = speedup(row, over)
    return None if found is None else found / row["compression"]


def over_unshared(row: Row, folded: Iterable[str], unshared: Iterable[str]) -> float | None:
    """By the rounds of these columns alone, where they had some."""
    return speedup(row | row.get("beside_unshared", {}), unshared, folded)


def with_unshared_flops(row: Row) -> str:
    """The batch, and how many flops the unshared one takes for each of its own: long prefixes attend once a branch."""
    share = row.get("unshared_flops")
    return row["batch"] if share is None else f"{row['batch']}; flops {share:.4g}"


def flip_targets(flips: list[Row]) -> list[Row]:
    """Decisions that `full` flips from `none`, of all batches together, against those of `none` at other sizes."""
    checks: list[Row] = []
    for kind in KINDS_OF_DECISIONS:
        of_kind = [row for row in flips if kind in row["decisions"]]
        for kernels, (flipped, by_size) in COMPARED.items():
            if not of_kind or any(flipped not in row for row in of_kind):
                continue
            sizes = [size for size in OTHER_SIZES if all(by_size.format(size) in row for row in of_kind)]
            others = {size: pooled(of_kind, by_size.format(size), kind) for size in sizes}
            most = max(others, key=lambda size: others[size])
            decided = pooled(of_kind, "decisions", kind)
            text = f"{kind} decisions of {decided:,} that full flips{kernels}, none with {most} setting the limit"
            checks += at_most(text, others[most], [(pooled(of_kind, flipped, kind), "all batches")])
    return checks


def pooled(flips: list[Row], name: str, kind: str) -> int:
    """The count of all batches together."""
    return sum(row[name][kind] for row in flips)
