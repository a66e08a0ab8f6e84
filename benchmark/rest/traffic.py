"""Requests as retrieval sends them: a query with passages, each pair one text."""

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from real_batches import DATA

# One request: texts to be embedded.
Texts = list[str]

RECORDED = "rerank_msmarco_dl19_bm25.dev.jsonl"

# How a pair becomes a text. "reranker" is the prompt of Qwen3-Reranker, from its model card.
TEMPLATES = {
    "plain": "{query}\n{passage}",
    "reranker": (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a '
        "web search query, retrieve relevant passages that answer the query\n<Query>: {query}\n<Document>: {passage}"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
}


def rows(source: str) -> Iterator[tuple[str, list[str]]]:
    """Queries with their passages.

    `source` is "recorded" (MS MARCO passages of TREC DL 2019 in ../shared/data), "msmarco" (v1.1, from the hub through
    datasets), or a file of JSON lines {"query": …, "passages": [… or {"text": …}]}. Raises FileNotFoundError.
    """
    if source == "msmarco":
        from datasets import load_dataset

        for row in load_dataset("microsoft/ms_marco", "v1.1", split="validation", streaming=True):
            yield row["query"], row["passages"]["passage_text"]
        return
    with (DATA / RECORDED if source == "recorded" else Path(source)).open(encoding="utf-8") as lines:
        for line in lines:
            yield _pair(json.loads(line))


def _pair(row: dict[str, Any]) -> tuple[str, list[str]]:
    return row["query"], [text if isinstance(text, str) else text["text"] for text in row["passages"]]


def requests(source: str, template: str, pairs: int, most: int) -> list[Texts]:
    """At most `most` requests of at most `pairs` texts of one query, in the order of the source.

    `template` is a name of `TEMPLATES`, or a text with {query} and {passage}.
    """
    form = TEMPLATES.get(template, template)

    def made() -> Iterator[Texts]:
        for query, passages in rows(source):
            texts = [form.replace("{query}", query).replace("{passage}", passage) for passage in passages]
            yield from (texts[start : start + pairs] for start in range(0, len(texts), pairs))

    return list(islice(made(), most))


def shared_prefixes(words: int, own_words: int, texts: int, count: int) -> list[Texts]:
    """`count` requests of random words: the texts of a request share their first `words`, requests share nothing."""
    draw = random.Random(words)

    def some(number: int) -> str:
        return " ".join(str(draw.randrange(10**6)) for _ in range(number))

    return [[f"{prefix} {some(own_words)}" for _ in range(texts)] for prefix in (some(words) for _ in range(count))]
