"""Drives a server that speaks text-embeddings-inference's routes or OpenAI's, and says how long its answers took.

Run it in benchmark/. Closed loop: `--concurrency` clients, each sends its next request when it has its answer. Open
loop, with `--rate`: requests are due at random, so many a second on average, whether or not others are answered;
latency counts from when a request was due.

examples:
  python -m rest.client http://localhost:3000
  python -m rest.client http://localhost:3000 --data my.jsonl --template "{query} {passage}" --rate 5
  python -m rest.client http://localhost:3000 --route rerank --pairs 100 --json run.json --plot run.png
  API_KEY=… python -m rest.client https://host --route openai --model name --markdown run.md
"""

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from rest.traffic import TEMPLATES, Request, requests

# Of one request, with all that it waits for.
TIMEOUT = aiohttp.ClientTimeout(total=3600)
ROUTES = {"embed": "/embed", "rerank": "/rerank", "openai": "/v1/embeddings"}
# What of its time to an answer text-embeddings-inference's headers tell, in milliseconds.
STAGES = ("tokenization", "queue", "inference")
FAILURES = (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError, TypeError, IndexError)


@dataclass(frozen=True)
class Target:
    """Where requests go. `model` is what OpenAI's route asks for; the others have no such field."""

    url: str
    route: str = "embed"
    model: str = ""
    api_key: str | None = None
    timeout: aiohttp.ClientTimeout = TIMEOUT

    def payload(self, request: Request) -> dict[str, Any]:
        if self.route == "rerank":
            return {"query": request.query, "texts": request.texts}
        if self.route == "openai":
            return {"input": request.texts, "model": self.model}
        return {"inputs": request.texts}


@dataclass(frozen=True)
class Run:
    """What came of some requests: `latencies` [answered] in seconds, in the order of the requests, and their vectors.

    `tokens` and `folded` are what the server's headers x-compute-tokens and x-folded-tokens add up to, and `stages` the
    seconds that it says each of STAGES took; all are 0 without headers.
    """

    latencies: list[float]
    seconds: float
    tokens: int
    folded: int
    stages: dict[str, float]
    errors: list[str]
    vectors: list[Any]

    def summary(self, tokens: int | None = None) -> dict[str, float]:
        """Percentiles and stages of a request in seconds, and rates; `tokens` for a server that does not count them."""
        tokens = self.tokens or tokens or 0
        p50, p90, p99 = np.percentile(self.latencies, [50, 90, 99]).tolist() if self.latencies else [np.nan] * 3
        return {
            "p50": p50,
            "p90": p90,
            "p99": p99,
            "mean": float(np.mean(self.latencies)) if self.latencies else np.nan,
            **{stage: seconds / max(1, len(self.latencies)) for stage, seconds in self.stages.items()},
            "requests_per_second": len(self.latencies) / self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "fold_ratio": tokens / max(1, tokens - self.folded),
            "errors": len(self.errors),
        }


@dataclass
class Answer:
    """The body stays bytes until all are there: parsing would hold up the clients that share the thread."""

    latency: float
    body: bytes
    headers: dict[str, str]


def arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """When the requests of an open loop are due, in seconds: a Poisson process."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection, whose pass over all that torch and transformers keep holds up every client."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def drive(target: Target, bodies: list[Request], *, concurrency: int = 16, rate: float | None = None) -> Run:
    """Send `bodies` to `target`; errors are kept, not raised."""
    answers: dict[int, Answer] = {}
    errors: list[str] = []
    # Before the clock runs: all clients share a thread, and the last would wait for what the others write.
    payloads = [json.dumps(target.payload(body)).encode() for body in bodies]
    headers = {"content-type": "application/json"}
    if target.api_key:
        headers["authorization"] = f"Bearer {target.api_key}"
    session = aiohttp.ClientSession(timeout=target.timeout, connector=aiohttp.TCPConnector(limit=0), headers=headers)
    with tqdm(total=len(bodies), desc="requests", leave=False, disable=None) as bar:

        async def send(index: int, due: float) -> None:
            try:
                url = target.url + ROUTES[target.route]
                async with session.post(url, data=payloads[index]) as response:
                    body = await response.read()
                    if response.status != 200:
                        errors.append(f"{response.status} {body[:200]!r}")
                        return
                    answers[index] = Answer(time.perf_counter() - due, body, dict(response.headers))
            except FAILURES as error:
                errors.append(f"{type(error).__name__} {error}")
            finally:
                bar.update()

        async with session:
            with uncollected():
                begin = time.perf_counter()
                await (_closed(send, len(bodies), concurrency) if rate is None else _open(send, len(bodies), rate))
                seconds = time.perf_counter() - begin
    return _run(answers, bodies, seconds, errors)


def _run(answers: dict[int, Answer], bodies: list[Request], seconds: float, errors: list[str]) -> Run:
    latencies, vectors, tokens, folded, stages = [], [], 0, 0, dict.fromkeys(STAGES, 0.0)
    for index, answer in sorted(answers.items()):
        try:
            found = vectors_of(json.loads(answer.body))
            if len(found) != len(bodies[index].texts):
                raise ValueError(f"{len(found)} answers to {len(bodies[index].texts)} texts")
        except FAILURES as error:
            errors.append(f"{type(error).__name__} {error} in {answer.body[:200]!r}")
            continue
        headers = {name.lower(): value for name, value in answer.headers.items()}
        latencies.append(answer.latency)
        vectors.append(found)
        tokens += int(headers.get("x-compute-tokens", 0))
        folded += int(headers.get("x-folded-tokens", 0))
        for stage in STAGES:
            stages[stage] += int(headers.get(f"x-{stage}-time", 0)) / 1e3
    return Run(latencies, seconds, tokens, folded, stages, errors, vectors)


def vectors_of(answer: Any) -> Any:
    """Float32 [texts, dimensions] of any route's JSON, in the order of the texts; scores have one dimension."""
    if isinstance(answer, dict):
        return np.array([item["embedding"] for item in answer["data"]], np.float32)
    if answer and isinstance(answer[0], dict):
        return np.array([[item["score"]] for item in sorted(answer, key=lambda item: item["index"])], np.float32)
    return np.array(answer, np.float32)


Send = Callable[[int, float], Awaitable[None]]


async def _closed(send: Send, count: int, concurrency: int) -> None:
    left = iter(range(count))

    async def client() -> None:
        for index in left:
            await send(index, time.perf_counter())

    await asyncio.gather(*(client() for _ in range(concurrency)))


async def _open(send: Send, count: int, rate: float) -> None:
    begin = time.perf_counter()

    async def later(index: int, due: float) -> None:
        await asyncio.sleep(due - time.perf_counter())
        await send(index, due)

    await asyncio.gather(*(later(index, begin + due) for index, due in enumerate(arrivals(count, rate))))


def markdown(summary: dict[str, float]) -> str:
    values = [f"{summary[key]:.3f} s" for key in ("p50", "p90", "p99", "mean")]
    values += [f"{summary['tokens_per_second']:,.0f}", f"{summary['fold_ratio']:.2f}", f"{summary['errors']}"]
    return f"| p50 | p90 | p99 | mean | tokens/s | N/N' | errors |\n|{'---|' * 7}\n| {' | '.join(values)} |\n"


def plot(run: Run, path: Path) -> None:
    figure, axes = plt.subplots(layout="constrained")
    latencies = np.sort(run.latencies)
    axes.plot(latencies, np.arange(1, len(latencies) + 1) / max(1, len(latencies)), drawstyle="steps-post")
    axes.set(xlabel="seconds to an answer", ylabel="part of the requests", xlim=(0, None), ylim=(0, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("url", help="where the server listens, as http://localhost:3000")
    made.add_argument("--route", choices=ROUTES, default="embed", help="embed")
    made.add_argument("--model", default="", help="what OpenAI's route asks for")
    made.add_argument("--api-key", default=os.environ.get("API_KEY"), help="sent as bearer; or $API_KEY")
    made.add_argument("--data", default="recorded", help="recorded, msmarco, or a file of JSON lines; recorded")
    made.add_argument("--template", default="reranker", help=f"{', '.join(TEMPLATES)} or a text of your own; reranker")
    made.add_argument("--words", type=int, help="cut passages after so many words")
    made.add_argument("--pairs", type=int, default=64, help="texts of one request; 64")
    made.add_argument("--requests", type=int, default=64, help="most requests; 64")
    made.add_argument("--concurrency", type=int, default=16, help="clients of the closed loop; 16")
    made.add_argument("--rate", type=float, help="requests a second: an open loop")
    made.add_argument("--timeout", type=float, default=3600, help="seconds for one answer; 3600")
    made.add_argument("--json", type=Path, help="file for the summary and all latencies")
    made.add_argument("--markdown", type=Path, help="file for a table")
    made.add_argument("--plot", type=Path, help="file for the distribution of latencies")
    return made


def main() -> None:
    options = parser().parse_args()
    # A reranker's server makes its prompt itself.
    template = "passage" if options.route == "rerank" else options.template
    bodies = requests(options.data, template, options.pairs, options.requests, options.words)
    timeout = aiohttp.ClientTimeout(total=options.timeout)
    target = Target(options.url.rstrip("/"), options.route, options.model, options.api_key, timeout)
    run = asyncio.run(drive(target, bodies, concurrency=options.concurrency, rate=options.rate))
    summary = run.summary()
    print(markdown(summary), end="")
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "latencies": run.latencies}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(summary))
    if options.plot:
        plot(run, options.plot)
    if run.errors:
        sys.exit("\n".join([f"{len(run.errors)} errors:", *run.errors[:5]]))


if __name__ == "__main__":
    main()
