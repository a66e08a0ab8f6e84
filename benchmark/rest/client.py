"""Drives a server that speaks text-embeddings-inference's /embed or OpenAI's, and says how long its answers took.

    python -m rest.client http://localhost:3000 --data recorded --pairs 64 --concurrency 16
    python -m rest.client http://localhost:3000 --data my.jsonl --template "{query} {passage}" --rate 5

Run it in benchmark/. Closed loop: `--concurrency` clients, each sends its next request when it has its answer. Open
loop, with `--rate`: requests arrive at random, so many a second on average, whether or not others are answered.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

from rest.traffic import TEMPLATES, Texts, requests

# Of one request, with all that it waits for.
TIMEOUT = aiohttp.ClientTimeout(total=3600)


@dataclass(frozen=True)
class Run:
    """What came of some requests: `latencies` [answered] in seconds, in the order of the requests, and their vectors.

    `tokens` and `folded` are what the server's headers x-compute-tokens and x-folded-tokens add up to, 0 without them.
    """

    latencies: list[float]
    seconds: float
    tokens: int
    folded: int
    errors: list[str]
    vectors: list[Any]

    def summary(self, tokens: int | None = None) -> dict[str, float]:
        """Percentiles in seconds, and rates; `tokens` for a server that does not count them."""
        tokens = self.tokens or tokens or 0
        p50, p90, p99 = np.percentile(self.latencies, [50, 90, 99]).tolist() if self.latencies else [np.nan] * 3
        return {
            "p50": p50,
            "p90": p90,
            "p99": p99,
            "mean": float(np.mean(self.latencies)) if self.latencies else np.nan,
            "requests_per_second": len(self.latencies) / self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "fold_ratio": tokens / max(1, tokens - self.folded),
            "errors": len(self.errors),
        }


def arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """When the requests of an open loop are sent, in seconds: a Poisson process."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times


async def drive(
    url: str, bodies: list[Texts], *, concurrency: int = 16, rate: float | None = None, openai_model: str | None = None
) -> Run:
    """Send `bodies` to `url`/embed, or with `openai_model` to `url`/v1/embeddings; errors are kept, not raised."""
    route = "/embed" if openai_model is None else "/v1/embeddings"

    def request(texts: Texts) -> Any:
        return {"inputs": texts} if openai_model is None else {"input": texts, "model": openai_model}

    latencies: dict[int, float] = {}
    vectors: dict[int, Any] = {}
    errors: list[str] = []
    counts = {"x-compute-tokens": 0, "x-folded-tokens": 0}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=connector) as session:
        with tqdm(total=len(bodies), desc="requests", leave=False, disable=None) as bar:

            async def send(index: int) -> None:
                start = time.perf_counter()
                try:
                    async with session.post(f"{url}{route}", json=request(bodies[index])) as response:
                        answer = await response.read()
                        if response.status != 200:
                            errors.append(f"{response.status} {answer[:200]!r}")
                            return
                        latencies[index] = time.perf_counter() - start
                        vectors[index] = vectors_of(json.loads(answer))
                        for name in counts:
                            counts[name] += int(response.headers.get(name, 0))
                except aiohttp.ClientError as error:
                    errors.append(f"{type(error).__name__} {error}")
                finally:
                    bar.update()

            begin = time.perf_counter()
            await (_closed(send, len(bodies), concurrency) if rate is None else _open(send, len(bodies), rate))
            seconds = time.perf_counter() - begin
    order = sorted(latencies)
    tokens, folded = counts.values()
    return Run([latencies[i] for i in order], seconds, tokens, folded, errors, [vectors[i] for i in order])


def vectors_of(answer: Any) -> Any:
    """Float32 [texts, dimensions] of either route's JSON."""
    rows = [item["embedding"] for item in answer["data"]] if isinstance(answer, dict) else answer
    return np.array(rows, np.float32)


Send = Callable[[int], Awaitable[None]]


async def _closed(send: Send, count: int, concurrency: int) -> None:
    left = iter(range(count))

    async def client() -> None:
        for index in left:
            await send(index)

    await asyncio.gather(*(client() for _ in range(concurrency)))


async def _open(send: Send, count: int, rate: float) -> None:
    begin = time.perf_counter()

    async def later(index: int, due: float) -> None:
        await asyncio.sleep(due - (time.perf_counter() - begin))
        await send(index)

    await asyncio.gather(*(later(index, due) for index, due in enumerate(arrivals(count, rate))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="where the server listens, as http://localhost:3000")
    parser.add_argument("--data", default="recorded", help="recorded, msmarco, or a file of JSON lines; recorded")
    parser.add_argument(
        "--template", default="reranker", help=f"{', '.join(TEMPLATES)} or a text of your own; reranker"
    )
    parser.add_argument("--pairs", type=int, default=64, help="texts of one request; 64")
    parser.add_argument("--requests", type=int, default=64, help="most requests; 64")
    parser.add_argument("--concurrency", type=int, default=16, help="clients of the closed loop; 16")
    parser.add_argument("--rate", type=float, help="requests a second: an open loop")
    options = parser.parse_args()
    bodies = requests(options.data, options.template, options.pairs, options.requests)
    run = asyncio.run(drive(options.url, bodies, concurrency=options.concurrency, rate=options.rate))
    print(json.dumps(run.summary(), indent=1))
    for error in run.errors[:5]:
        print(error)


if __name__ == "__main__":
    main()
