"""Requests as retrieval sends them: a query with passages, each pair one text."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from real_batches import DATA, tokenizer

RECORDED = "rerank_msmarco_dl19_bm25.dev.jsonl"

# How a pair becomes a text. "reranker" is the prompt of Qwen3-Reranker and "instruct" that of Qwen3-Embedding's queries
# with a passage behind it, from their model cards; "passage" leaves only what the passages themselves share.
TEMPLATES = {
    "passage": "{passage}",
    "plain": "{query}\n{passage}",
    "instruct": (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query: {query}\nPassage: {passage}"
    ),
    "reranker": (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a '
        "web search query, retrieve relevant passages that answer the query\n<Query>: {query}\n<Document>: {passage}"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
}


@dataclass(frozen=True)
class Request:
    """Texts of one query. /rerank is asked for the query too, and makes its own prompt of the two."""

    texts: list[str]
    query: str = ""


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


def requests(source: str, template: str, pairs: int, most: int, words: int | None = None) -> list[Request]:
    """At most `most` requests of at most `pairs` texts of one query, in the order of the source.

    `template` is a name of `TEMPLATES`, or a text with {query} and {passage}. Passages are cut after `words`; of
    equal ones one is left.
    """
    form = TEMPLATES.get(template, template)

    def made() -> Iterator[Request]:
        for query, passages in rows(source):
            cut = shortened(passages, words) if words else passages
            texts = [form.replace("{query}", query).replace("{passage}", passage) for passage in cut]
            yield from (Request(texts[start : start + pairs], query) for start in range(0, len(texts), pairs))

    return list(islice(made(), most))


def shortened(passages: list[str], words: int) -> list[str]:
    """The different starts of some passages: servers compute a text once that is asked for twice, also unfolded."""
    return list(dict.fromkeys(" ".join(passage.split()[:words]) for passage in passages))


def strangers(source: str, texts: int, count: int, words: int) -> list[Request]:
    """`count` requests of passages alone, each of another query where there are enough: what chance lets them share."""
    columns = [passages for _, passages in rows(source)]
    deepest = max(map(len, columns))
    ordered = [passages[place] for place in range(deepest) for passages in columns if place < len(passages)]
    cut = shortened(ordered, words)
    return [Request(cut[start : start + texts]) for start in range(0, len(cut), texts)][:count]


def shared_prefixes(prefix: int, own: int, texts: int, count: int) -> list[Request]:
    """`count` requests of random words, each one token of Qwen3's: the texts of a request share their first `prefix`.

    Requests share nothing, and texts nothing behind the prefix: the first tokens of all are different ones. Raises
    ValueError where the vocabulary has too few words.
    """
    draw = random.Random(prefix)
    words = sorted(word[1:] for word in tokenizer().get_vocab() if word[0] == "Ġ" and word[1:].isascii())
    words = [word for word in words if word.isalpha()]
    first = iter(draw.sample(words, count * (1 + texts)))

    def some(number: int) -> str:
        return "".join(f" {word}" for word in [next(first), *draw.choices(words, k=number - 1)][:number])

    made = []
    for _ in range(count):
        start = some(prefix)
        made.append(Request([start + some(own) for _ in range(texts)]))
    return made
