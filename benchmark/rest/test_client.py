"""The driver of the REST benchmark, against a server of its own."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from rest.client import Run, arrivals, drive
from rest.servers import Server, serving
from rest.traffic import TEMPLATES, requests, rows, shared_prefixes

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def against(handler: Handler, bodies: list[list[str]], **options: Any) -> Run:
    """Drive a server whose two routes are `handler`."""

    async def run() -> Run:
        app = web.Application()
        app.router.add_post("/embed", handler)
        app.router.add_post("/v1/embeddings", handler)
        async with TestServer(app) as server:
            return await drive(str(server.make_url("")).rstrip("/"), bodies, **options)

    return asyncio.run(run())


async def lengths(request: web.Request) -> web.Response:
    """A vector of each text's length; the counts of a server that folds half of ten tokens."""
    body = await request.json()
    headers = {"x-compute-tokens": "10", "x-folded-tokens": "5"}
    if "input" in body:
        data = [{"embedding": [len(text)]} for text in body["input"]]
        return web.json_response({"data": data, "model": body["model"]})
    return web.json_response([[len(text)] for text in body["inputs"]], headers=headers)


BODIES = [["a" * n, "b"] for n in range(1, 8)]


@pytest.mark.parametrize("options", [{"concurrency": 3}, {"rate": 1000.0}])
def test_every_request_is_answered_and_counted(options: dict[str, Any]) -> None:
    run = against(lengths, BODIES, **options)
    assert [vectors[:, 0].tolist() for vectors in run.vectors] == [[n, 1] for n in range(1, 8)]
    assert (run.tokens, run.folded, run.errors) == (70, 35, [])
    summary = run.summary()
    assert summary["fold_ratio"] == 2
    assert summary["tokens_per_second"] == pytest.approx(70 / run.seconds)
    assert summary["requests_per_second"] == pytest.approx(7 / run.seconds)
    assert summary["p50"] == pytest.approx(np.median(run.latencies))
    assert max(run.latencies) <= run.seconds


def test_openai_route() -> None:
    run = against(lengths, BODIES, openai_model="any")
    assert [vectors[:, 0].tolist() for vectors in run.vectors] == [[n, 1] for n in range(1, 8)]
    assert run.summary(tokens=99)["tokens_per_second"] == pytest.approx(99 / run.seconds)


def test_a_closed_loop_keeps_its_concurrency() -> None:
    running = [0, 0]

    async def slow(request: web.Request) -> web.Response:
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0.01)
        running[0] -= 1
        return await lengths(request)

    against(slow, BODIES * 3, concurrency=4)
    assert running[1] == 4


def test_errors_are_told() -> None:
    async def fails(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if len(body["inputs"][0]) == 2:
            return web.json_response({"error": "no"}, status=429)
        return await lengths(request)

    run = against(fails, BODIES)
    assert len(run.vectors) == len(run.latencies) == 6
    (error,) = run.errors
    assert error.startswith("429")
    assert asyncio.run(drive("http://127.0.0.1:9", BODIES[:2])).summary()["errors"] == 2


def test_arrivals_have_their_rate() -> None:
    times = np.array(arrivals(10_000, rate=50.0))
    assert (np.diff(times) >= 0).all()
    # The mean of 10,000 exponential gaps is within four of its standard deviations, 1 % each.
    assert times[-1] == pytest.approx(200, rel=0.04)


def test_requests_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    lines = [{"query": "q{1}", "passages": ["a", {"text": "b"}, "c"]}, {"query": "r", "passages": []}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert list(rows(str(file))) == [("q{1}", ["a", "b", "c"]), ("r", [])]
    assert requests(str(file), "{passage} for {query}", 2, 9) == [["a for q{1}", "b for q{1}"], ["c for q{1}"]]
    assert len(requests(str(file), "plain", 1, 2)) == 2
    (text,) = requests(str(file), "reranker", 1, 1)[0]
    assert text == TEMPLATES["reranker"].replace("{query}", "q{1}").replace("{passage}", "a")
    with pytest.raises(FileNotFoundError):
        requests("absent.jsonl", "plain", 1, 1)


def test_prefixes_are_shared_within_requests_only() -> None:
    first, second = shared_prefixes(5, 3, 4, 2)
    for texts in (first, second):
        words = [text.split() for text in texts]
        assert {len(each) for each in words} == {8}
        assert len({tuple(each[:5]) for each in words}) == 1
        assert len({tuple(each) for each in words}) == 4
    assert first[0].split()[:5] != second[0].split()[:5]


def test_a_server_that_ends_is_told() -> None:
    server = Server(["python3", "-c", "import sys; sys.exit('no model, ' + ' '.join(sys.argv[1:2]))"])
    with pytest.raises(RuntimeError, match="ended with 1: no model, --port"), serving(server):
        pass
