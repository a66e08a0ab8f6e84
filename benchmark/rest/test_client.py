"""The driver of the REST benchmark, against a server of its own."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from rest import client
from rest.client import Run, Target, arrivals, drive
from rest.traffic import Request

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def against(handler: Handler, bodies: list[Request], target: Target | None = None, **options: Any) -> Run:
    """Drive a server whose routes are all `handler`."""

    async def run() -> Run:
        app = web.Application()
        app.router.add_post("/{route:.*}", handler)
        async with TestServer(app) as server:
            url = str(server.make_url("")).rstrip("/")
            return await drive(replace(target or Target(""), url=url), bodies, **options)

    return asyncio.run(run())


async def lengths(request: web.Request) -> web.Response:
    """A vector of each text's length; the counts of a server that folds half of ten tokens."""
    body = await request.json()
    headers = {"x-compute-tokens": "10", "x-folded-tokens": "5", "x-queue-time": "3"}
    if "input" in body:
        data = [{"embedding": [len(text)]} for text in body["input"]]
        return web.json_response({"data": data, "model": body["model"]})
    return web.json_response([[len(text)] for text in body["inputs"]], headers=headers)


BODIES = [Request(["a" * n, "b"], f"query {n}") for n in range(1, 8)]


@pytest.mark.parametrize("options", [{"concurrency": 3}, {"rate": 1000.0}])
def test_every_request_is_answered_and_counted(options: dict[str, Any]) -> None:
    run = against(lengths, BODIES, **options)
    assert [vectors[:, 0].tolist() for vectors in run.vectors] == [[n, 1] for n in range(1, 8)]
    assert (run.tokens, run.folded, run.errors) == (70, 35, [])
    summary = run.summary()
    assert summary["fold_ratio"] == 2
    assert [summary["queue"], summary["inference"]] == pytest.approx([0.003, 0])
    assert summary["tokens_per_second"] == pytest.approx(70 / run.seconds)
    assert summary["requests_per_second"] == pytest.approx(7 / run.seconds)
    assert summary["p50"] == pytest.approx(np.median(run.latencies))
    assert max(run.latencies) <= run.seconds


def test_openai_route() -> None:
    run = against(lengths, BODIES, Target("", "openai", model="any"))
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
    assert asyncio.run(drive(Target("http://127.0.0.1:9"), BODIES[:2])).summary()["errors"] == 2


def test_rerank_scores_come_in_the_order_of_the_texts() -> None:
    async def best_first(request: web.Request) -> web.Response:
        body = await request.json()
        assert request.path == "/rerank"
        assert body["query"] == f"query {len(body['texts'][0])}"
        scores = [{"index": i, "score": len(text)} for i, text in enumerate(body["texts"])]
        return web.json_response(sorted(scores, key=lambda item: item["score"], reverse=True))

    run = against(best_first, [Request(["a", "abc", "ab"], "query 1")], Target("", "rerank"))
    assert not run.errors
    assert run.vectors[0][:, 0].tolist() == [1, 3, 2]


def test_the_key_is_sent() -> None:
    async def guarded(request: web.Request) -> web.Response:
        return web.json_response([[1.0]], status=200 if request.headers.get("authorization") == "Bearer k" else 401)

    one = [Request(["a"])]
    assert against(guarded, one, Target("", api_key="k")).errors == []
    assert against(guarded, one).errors[0].startswith("401")


@pytest.mark.parametrize("body", [b"{", b"null", b"[[1.0], [2.0, 3.0]]", b"[[1.0]]", b'[{"score": 1.0}]'])
def test_a_bad_answer_is_an_error_and_the_run_goes_on(body: bytes) -> None:
    async def sometimes(request: web.Request) -> web.Response:
        asked = await request.json()
        return web.Response(body=body) if len(asked["inputs"][0]) == 3 else await lengths(request)

    run = against(sometimes, BODIES)
    assert (len(run.errors), len(run.latencies), run.tokens) == (1, 6, 60)


def test_a_late_answer_is_an_error_and_the_run_goes_on() -> None:
    async def late(request: web.Request) -> web.Response:
        if len((await request.json())["inputs"][0]) == 2:
            await asyncio.sleep(2)
        return await lengths(request)

    run = against(late, BODIES, Target("", timeout=aiohttp.ClientTimeout(total=0.5)))
    assert (len(run.errors), len(run.latencies)) == (1, 6)
    assert "TimeoutError" in run.errors[0]


def test_open_loop_latency_starts_when_a_request_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    # All are due at once and a second before they can be sent.
    monkeypatch.setattr(client, "arrivals", lambda count, rate: [-1.0] * count)
    assert min(against(lengths, BODIES, rate=1.0).latencies) >= 1


def test_the_command_writes_its_files_and_fails_on_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"query": "q", "passages": ["a", "b"]}))
    files = {name: tmp_path / f"run.{name}" for name in ("json", "markdown", "plot")}
    files["plot"] = files["plot"].with_suffix(".png")
    named = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    monkeypatch.setattr(sys, "argv", ["client", "http://127.0.0.1:9", "--data", str(pairs), *named])
    with pytest.raises(SystemExit, match="1 errors"):
        client.main()
    assert json.loads(files["json"].read_text())["summary"]["errors"] == 1
    assert files["markdown"].read_text().count("\n") == 3
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_arrivals_have_their_rate() -> None:
    times = np.array(arrivals(10_000, rate=50.0))
    assert (np.diff(times) >= 0).all()
    # The mean of 10,000 exponential gaps is within four of its standard deviations, 1 % each.
    assert times[-1] == pytest.approx(200, rel=0.04)
