"""Text in, vectors out, over HTTP: the server unfolded, at the paper's level and folded, and sentence-transformers.

Each configuration is a server of its own, with the same threads; rounds alternate, so that a slow moment of the machine
meets all of them. On a CPU they are started in turn, on a GPU once, for loading takes longer there than measuring. The
model is a Qwen3 with random weights. Where vLLM is on the PATH, it is measured too, without and with its cache of
prefixes. The numbers are medians of the rounds.

examples:
  python benchmark/rest/run.py           # 45 minutes on two idle cores; rewrites the result, plot and README
  python benchmark/rest/run.py --smoke   # a tiny model, two requests, writes nothing: does it run?
  python benchmark/rest/run.py --plot    # draws the plot and the README's tables from the JSON results
  python benchmark/rest/run.py --shape 4b --device cuda:0 --dtype bf16 --template reranker --words 0 --requests 48 \\
      --prefixes 64 256 1024 --own 64 --out benchmark/results/rest_gpu_4b.json
  python benchmark/rest/run.py --url none=http://host:3000 --url full=http://host:3001 --out running.json
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from machine import cpu, output_of  # noqa: E402
from readme import REPORT, RESULTS, write_sections  # noqa: E402
from real_batches import DATA  # noqa: E402
from rest import servers  # noqa: E402
from rest.client import Run, Target, drive  # noqa: E402
from rest.models import SHAPES, write_model  # noqa: E402
from rest.report import plot, section, sections  # noqa: E402
from rest.servers import Machine, Server, cache_counters, serving, starting  # noqa: E402
from rest.targets import CONTROLS, targets  # noqa: E402
from rest.traffic import TEMPLATES, Request, requests, shared_prefixes, strangers  # noqa: E402

RESULT = RESULTS / "rest.json"
LEVELS = ("none", "mlp", "full")
# Of the throughput of the unfolded server in the closed loop: it keeps up, and queues are short.
OPEN_LOAD = 0.7
# So many times as many rounds where nothing is to be gained: runs of some seconds differ by more than the 2 % that the
# target allows.
CONTROL_ROUNDS = 5
# Of vectors of length 1: sums in another order, in f32 through 12 layers of 768, and in bf16, which has 8 bits, through
# up to 36.
TOLERANCE = {"f32": 1e-4, "bf16": 5e-2, "f16": 1e-2}


def configurations(options: argparse.Namespace) -> dict[str, Server]:
    """By name: the fold level as the server is told, and the tokens of a batch. "auto" is what users have."""
    if options.url:
        named = dict(pair.split("=", 1) for pair in options.url)
        return {f"{name}, 16384": Server(url=url.rstrip("/")) for name, url in named.items()}
    model = write_model(options.shape, ROOT / "target" / "rest" / options.shape, options.device)
    machine = Machine(model, options.device, options.dtype, options.threads)
    found = {"sentence-transformers": servers.sentence_transformers(machine)}
    if executable := shutil.which("vllm"):
        found["vLLM"] = servers.vllm(executable, machine, prefix_caching=False)
        found["vLLM, prefix caching"] = servers.vllm(executable, machine, prefix_caching=True)
    for tokens in (16384, 65536):
        for level in LEVELS:
            found[f"{level}, {tokens}"] = servers.radix_mlp(machine, level, tokens, options.binary)
    found["auto, 16384"] = servers.radix_mlp(machine, "auto", 16384, options.binary)
    return chosen(found, options.without)


def chosen(found: dict[str, Server], without: list[str]) -> dict[str, Server]:
    """The servers but those named. Exits where there is no such server, or it is what others are compared with."""
    spare = found.keys() - {"none, 16384"}
    if unknown := set(without) - spare:
        sys.exit(f"--without {', '.join(sorted(unknown))}: there are {'; '.join(sorted(spare))} to leave out")
    return {name: server for name, server in found.items() if name not in without}


@contextmanager
def kept_running(configured: dict[str, Server], device: str) -> Iterator[dict[str, Server]]:
    """The servers, those on a GPU started already: one that idles leaves it to the others.

    vLLM is not: what it keeps of one run's prefixes, it would find in the next.
    """
    with ExitStack() as stack:
        kept = {name: server for name, server in configured.items() if device != "cpu" and not server.openai_model}
        healthy = {name: stack.enter_context(starting(server)) for name, server in kept.items()}
        bar = tqdm(kept.items(), desc="starting servers", leave=False, disable=None)
        yield configured | {name: replace(server, url=healthy[name]()) for name, server in bar}


def measured(
    server: Server, bodies: list[Request], concurrency: int, rate: float | None
) -> tuple[Run, dict[str, float]]:
    """What came of it, and what vLLM counted of its cache."""
    with serving(server) as url:
        target = Target(url, model=server.openai_model or "", route="openai" if server.openai_model else "embed")
        # Another text, so that caches of prefixes stay empty, but for what finds everything cold.
        asyncio.run(drive(target, [Request(["a first text"])]))
        before = cache_counters(url)
        run = asyncio.run(drive(target, bodies, concurrency=concurrency, rate=rate))
        after = cache_counters(url)
    if run.errors:
        raise RuntimeError(f"{server.told()}: {len(run.errors)} errors, the first: {run.errors[0]}")
    return run, {name: value - before.get(name, 0) for name, value in after.items()}


def compare(
    bodies: list[Request],
    configured: dict[str, Server],
    rounds: int,
    tolerance: float,
    *,
    concurrency: int = 16,
    rate: float | None = None,
) -> dict[str, Any]:
    """For each server medians of the rounds, and all latencies. Raises RuntimeError where vectors differ."""
    runs: dict[str, list[Run]] = {name: [] for name in configured}
    caches: dict[str, dict[str, float]] = {}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for name, server in tqdm(configured.items(), desc="servers", leave=False, disable=None):
            run, caches[name] = measured(server, bodies, concurrency, rate)
            # The first round's vectors are compared; those of all would fill the memory.
            runs[name].append(run if not runs[name] else replace(run, vectors=[]))
    reference = next(found[0] for name, found in runs.items() if name.startswith("none"))
    result = {}
    for name, found in runs.items():
        pairs = zip(found[0].vectors, reference.vectors, strict=True)
        # Python's max would forget NaN.
        difference = float(np.max([np.abs(a - b).max() for a, b in pairs]))
        if not difference < tolerance:
            raise RuntimeError(f"{name} gives other vectors: they differ by {difference:.1e}")
        result[name] = medians(found, reference.tokens) | {"largest_difference": difference} | caches[name]
    return result


def medians(runs: list[Run], tokens: int) -> dict[str, Any]:
    """Of each figure of the rounds; `latencies` are those of all rounds."""
    rounds = [run.summary(tokens) for run in runs]
    return {
        **{key: round(statistics.median(each[key] for each in rounds), 4) for key in rounds[0]},
        "mean_of_each_round": [round(each["mean"], 4) for each in rounds],
        "latencies": [round(latency, 4) for run in runs for latency in run.latencies],
    }


def sharing(configured: dict[str, Server], options: argparse.Namespace) -> dict[str, Any]:
    """Traffic from nothing shared to long shared prefixes; without latencies, which nothing draws."""
    count, texts = options.sweep_requests, options.sweep_pairs
    traffic = {
        "nothing": shared_prefixes(0, options.own, texts, count),
        "strangers": strangers(options.data, texts, count, options.words or 10**6),
    }
    traffic |= {f"{prefix} tokens": shared_prefixes(prefix, options.own, texts, count) for prefix in options.prefixes}
    some = {
        name: server for name, server in configured.items() if name in ("none, 16384", "full, 16384", "auto, 16384")
    }
    result = {}
    for case, bodies in tqdm(traffic.items(), desc="sharing", disable=None):
        rounds = options.rounds * (CONTROL_ROUNDS if case in CONTROLS else 1)
        result[case] = compare(bodies, some, rounds, TOLERANCE[options.dtype], concurrency=options.concurrency)
        for run in result[case].values():
            del run["latencies"]
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    configured = configurations(options)
    bodies = requests(options.data, options.template, options.pairs, options.requests, options.words or None)
    tolerance = TOLERANCE[options.dtype]
    result = origin(configured, options)
    with kept_running(configured, options.device) as running:
        result["passages"] = compare(bodies, running, options.rounds, tolerance, concurrency=options.concurrency)
        rate = OPEN_LOAD * result["passages"]["none, 16384"]["requests_per_second"]
        few = {name: server for name, server in running.items() if name in ("none, 16384", "full, 16384")}
        # One round: requests arrive at the same moments for all.
        result["open_loop"] = {"requests_per_second": round(rate, 4), "rounds": 1}
        result["open_loop"] |= {"servers": compare(bodies, few, 1, tolerance, rate=rate)}
        result["sharing"] = sharing(running, options)
    return result | {"targets": targets(result)}


def origin(configured: dict[str, Server], options: argparse.Namespace) -> dict[str, Any]:
    recorded = {key: getattr(options, key) for key in RECORDED_OPTIONS}
    if options.url:
        # What runs elsewhere says nothing of itself.
        return {"commit": options.commit, "note": options.note} | recorded | {"device": None, "threads": None}
    config = SHAPES[options.shape]
    gpu = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else None
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return {
        "cpu": cpu(),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "vllm": output_of("vllm", "--version") if "vLLM" in configured else "not measured: not installed",
        "llama.cpp": "not measured: llama-cpp-python's server empties its cache before each batch of embeddings",
        "note": options.note,
        "commit": options.commit or output_of("git", "rev-parse", "--short", "HEAD"),
        "dirty": None if options.commit else bool(changes()),
        "model": {"shape": options.shape, "weights": "random"} | {key: getattr(config, key) for key in keys},
        "servers": {name: server.told() for name, server in configured.items()},
        "vllm_block_tokens": servers.VLLM_BLOCK if "vLLM" in configured else None,
        "template_text": TEMPLATES.get(options.template, options.template),
        "control_rounds": CONTROL_ROUNDS * options.rounds,
        **recorded,
    }


RECORDED_OPTIONS = (
    *("device", "dtype", "threads", "data", "template", "words", "requests", "pairs", "concurrency", "rounds"),
    *("sweep_requests", "sweep_pairs", "prefixes", "own"),
)


def changes() -> str:
    """Changed files that may change a number: not the results, and not what git does not know."""
    return output_of("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmark/results")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help="a tiny model and two requests, writes nothing")
    made.add_argument("--plot", action="store_true", help="draw the plot and the table from the JSON result")
    made.add_argument("--out", type=Path, default=RESULT, help="needed where not this commit's build is measured")
    made.add_argument("--commit", help="where there is no git to ask")
    made.add_argument("--note", help="what else a reader of the README should know of this run")
    made.add_argument("--binary", type=Path, help="a server that is built; otherwise cargo builds it")
    made.add_argument("--url", action="append", metavar="NAME=URL", help="a running server; one is named none")
    made.add_argument("--without", action="append", default=[], metavar="NAME", help="a server not to measure")
    made.add_argument("--shape", choices=SHAPES, default="100m")
    made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    made.add_argument("--dtype", choices=TOLERANCE, default="f32")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each server; all cores")
    made.add_argument("--data", default="recorded", help="recorded, msmarco or a file of JSON lines; recorded")
    made.add_argument("--template", default="instruct", help=f"{', '.join(TEMPLATES)} or your own; instruct")
    made.add_argument("--words", type=int, default=8, help="passages are cut after; 0 does not; 8")
    made.add_argument("--requests", type=int, default=32, help="32")
    made.add_argument("--pairs", type=int, default=64, help="texts of one request; 64")
    made.add_argument("--concurrency", type=int, default=16, help="16")
    made.add_argument("--rounds", type=int, default=3, help="3")
    made.add_argument("--sweep-requests", type=int, default=64, help="at each length of prefixes; 64")
    made.add_argument("--sweep-pairs", type=int, default=8, help="texts of one of these; 8")
    made.add_argument("--prefixes", type=int, nargs="+", default=[16, 48], help="shared tokens; 16 48")
    made.add_argument("--own", type=int, default=16, help="tokens behind them; 16")
    return made


def arguments() -> argparse.Namespace:
    """Those of the command line. Exits where a committed result would not tell what was measured."""
    options = parser().parse_args()
    if options.smoke:
        options.shape, options.requests, options.pairs, options.rounds = "tiny", 2, 4, 1
        options.sweep_requests, options.sweep_pairs = 2, 4
    if options.url and not any(pair.startswith("none=") for pair in options.url):
        sys.exit("--url none=…: there is no unfolded server to compare with")
    if options.url and options.without:
        sys.exit("--without: name only the servers that are to be measured with --url")
    committed = options.out.resolve() == RESULT and not options.smoke and not options.plot
    if committed and (options.url or options.binary or options.commit):
        sys.exit("the committed result is of what this tree builds: name another file with --out")
    if committed and changes():
        sys.exit(f"the tree has changes: commit them, or name another file with --out\n{changes()}")
    return options


def main() -> None:
    options = arguments()
    if options.plot:
        result = json.loads(options.out.read_text())
    elif not DATA.is_dir():
        sys.exit(f"no tokenizer and no recorded passages at {DATA}")
    else:
        if not options.binary and not options.url:
            output_of("cargo", "build", "--release", "-q", "-p", "radix_mlp", "--features", "server")
        options.binary = options.binary or servers.BINARY
        result = measure(options)
    print(section(result))
    if options.smoke:
        return
    if not options.plot:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, options.out.with_suffix(".png"))
    if options.out.resolve().parent == RESULTS:
        write_sections(REPORT, sections())


if __name__ == "__main__":
    main()
