"""What benchmark/README.md says of the GPU, drawn from the JSON results between markers.

python benchmark/gpu_forward/report.py            # prints it
python benchmark/gpu_forward/report.py --write    # rewrites it, and the targets in the results
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))

import gpu_attention.report  # noqa: E402
import gpu_attention.targets  # noqa: E402
import gpu_forward.targets  # noqa: E402
import gpu_kernels.report  # noqa: E402
import gpu_kernels.targets  # noqa: E402
import gpu_training.report  # noqa: E402
import gpu_training.targets  # noqa: E402
from gpu_forward.checks import missed  # noqa: E402
from gpu_forward.targets import FOLDED, OTHER_SIZES, UNFOLDED, fastest, pooled  # noqa: E402
from readme import REPORT, RESULTS, write_sections  # noqa: E402
from steady import method, names  # noqa: E402

# Speed-ups over `none`, by their column's title.
COLUMNS = {
    "padded": "padded",
    "mlp": "`mlp`",
    "full": "`full`",
    "full graphs": "`full`, graphs",
    "padded compiled": "padded, compiled",
    "none compiled": "`none`, compiled",
    "full compiled": "`full`, compiled",
}
ORDER = (
    "32 x 2048+256",
    "256 x 2048+16",
    "three-level tree",
    "rerank",
    "few-shot BBH",
    "tau-bench turns",
    "little shared",
    "nothing shared",
)

Row = dict[str, Any]


def forward(result: Row) -> str:
    """The table of the forward pass, the flips and the targets that were missed."""
    names = [name for name in COLUMNS if any(name in row["wall_ms"] for row in result["rows"])]
    titles = [
        "batch",
        "N → N'",
        "N/N'",
        "Qwen3",
        "flops",
        *(COLUMNS[name] for name in names),
        "fastest folded over fastest unfolded",
        "GiB, `none` → `full`",
    ]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in sorted(result["rows"], key=lambda row: (ORDER.index(row["batch"]), row["shape"])):
        none = row["wall_ms"].get("none")
        speeds = [ratio(none, row["wall_ms"].get(name)) for name in names]
        best = ratio(fastest(row, UNFOLDED), fastest(row, FOLDED))
        size = f"{row['tokens']:,} → {row['nodes']:,} | {row['compression']:.2f}"
        shape = row["shape"].removeprefix("qwen3-").upper()
        peaks = " → ".join(f"{row['peak_gib'][name]:.1f}" for name in ("none", "full"))
        cells = [row["batch"], size, shape, f"{row['flop_compression']:.2f}", *speeds, best, peaks]
        lines.append(f"| {' | '.join(cells)} |")
    checks = missed(gpu_forward.targets.targets(result["rows"]))
    parts = [method(result["rows"]), same_bits(result["rows"]), flips(result["rows"]), checks]
    return "\n\n".join(["\n".join(lines), *filter(None, parts)])


def ratio(slow: float | None, fast: float | None) -> str:
    return "" if slow is None or fast is None else f"{slow / fast:.2f}"


def same_bits(rows: list[Row]) -> str:
    """Of which rows folding changed no bit of the states."""
    folded = ("mlp", "full", "full graphs")
    same = [row for row in rows if all(row["difference"].get(name, 0) == 0 for name in folded)]
    return (
        f"Last tokens' states of `mlp` and `full` are those of `none` to the bit: {names(same, rows)}." if same else ""
    )


def flips(rows: list[Row]) -> str:
    """How many top-1 decisions differ, of all batches together."""
    found = [row["flips"] for row in rows if "flips" in row]

    def share(*names: str, kind: str = "sampled") -> str:
        """The largest of them."""
        own = [row for row in found if kind in row["decisions"]]
        most = max(pooled(own, name, kind) for name in names)
        return f"{most / pooled(own, 'decisions', kind):.2%}".replace("%", " %")

    sizes = [size for size in OTHER_SIZES if all(f"{size} from none" in row for row in found)]
    others = ", ".join(f"with {size} {share(f'{size} from none')}" for size in sizes)
    ways = {"query_folded": "`full` with `query_folded`", "padded": "the padded model"}
    told = [name for name in ways if all(f"{name} from none" in row for row in found)]
    more = "".join(f", {ways[name]} {share(f'{name} from none')}" for name in told)
    alone = ""
    if all("tree full from tree none" in row for row in found):
        by_size = share(*(f"tree {size} from tree none" for size in sizes))
        alone = f" With the tree kernel on both sides the fold flips {share('tree full from tree none')}, "
        alone += f"another size up to {by_size}."
    for kind, what in (("last", "last tokens' decisions"), ("pairs", "orders of two reranked texts")):
        if own := [row for row in found if kind in row["decisions"]]:
            alone += (
                f" Of {pooled(own, 'decisions', kind):,} {what} `full` flips {share('full from none', kind=kind)}; "
            )
            alone += f"from float32 `none` differs in {share('none from float32', kind=kind)}, "
            alone += f"`full` in {share('full from float32', kind=kind)}."
    return (
        f"Of {pooled(found, 'decisions', 'sampled'):,} top-1 decisions at random weights (0.6B), `none` differs from "
        f"float32 in {share('none from float32')} and `full` in {share('full from float32')}; from `none`, `full` "
        f"differs in {share('full from none')}{more}, `none` {others}.{alone}"
    )


SECTIONS = {
    "gpu_forward": (forward, gpu_forward.targets.targets),
    "gpu_attention": (gpu_attention.report.section, gpu_attention.targets.targets),
    "gpu_kernels": (gpu_kernels.report.section, gpu_kernels.targets.targets),
    "gpu_training": (gpu_training.report.section, gpu_training.targets.targets),
    "gpu_gradients": (gpu_training.report.gradients, gpu_training.targets.gradient_targets),
}


def measured() -> dict[str, Row]:
    """The results that there are, by name."""
    paths = {name: RESULTS / f"{name}.json" for name in SECTIONS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def sections() -> dict[str, str]:
    """What is told of them."""
    return {name: SECTIONS[name][0](result) for name, result in measured().items()}


def write() -> None:
    for name, result in measured().items():
        result["targets"] = SECTIONS[name][1](result["rows"])
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_sections(REPORT, sections())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        write()
        return
    print("\n\n".join(sections().values()))


if __name__ == "__main__":
    main()
