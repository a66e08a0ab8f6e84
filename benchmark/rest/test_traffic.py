"""What the REST benchmark asks for."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from real_batches import DATA, tokenizer
from rest.servers import ROOT
from rest.traffic import TEMPLATES, requests, rows, shared_prefixes, strangers

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no tokenizer at {DATA}")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    file = tmp_path / "pairs.jsonl"
    lines = [{"query": "q{1}", "passages": ["a x", {"text": "b"}, "a y"]}, {"query": "r", "passages": ["c", "b"]}]
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def test_requests_of_a_file(pairs: str) -> None:
    assert list(rows(pairs)) == [("q{1}", ["a x", "b", "a y"]), ("r", ["c", "b"])]
    made = requests(pairs, "{passage} for {query}", 2, 2)
    assert [request.texts for request in made] == [["a x for q{1}", "b for q{1}"], ["a y for q{1}"]]
    assert [request.query for request in made] == ["q{1}", "q{1}"]
    (text, *_) = requests(pairs, "reranker", 1, 1)[0].texts
    assert text == TEMPLATES["reranker"].replace("{query}", "q{1}").replace("{passage}", "a x")
    with pytest.raises(FileNotFoundError):
        requests("absent.jsonl", "plain", 1, 1)


def test_cut_passages_are_different(pairs: str) -> None:
    assert [request.texts for request in requests(pairs, "passage", 9, 9, words=1)] == [["a", "b"], ["c", "b"]]
    assert [request.texts for request in strangers(pairs, 2, 9, words=1)] == [["a", "c"], ["b"]]


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: str, **options: Any) -> list[dict[str, Any]]:
        assert names == ("microsoft/ms_marco", "v1.1")
        assert options == {"split": "validation", "streaming": True}
        return [{"query": "q", "passages": {"passage_text": ["a", "b"], "is_selected": [0, 1]}}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(rows("msmarco")) == [("q", ["a", "b"])]


def test_the_reranker_template_is_the_one_of_the_server() -> None:
    source = (ROOT / "package" / "src" / "text" / "mod.rs").read_text()

    def constant(name: str) -> str:
        found = re.search(rf'pub const {name}: &str =\s*"((?:[^"\\]|\\.)*)";', source, re.DOTALL)
        assert found, name
        # Rust skips a line break behind a backslash, and what the next line is indented by.
        joined = re.sub(r"\\\n\s*", "", found[1])
        text: str = json.loads(f'"{joined}"')
        return text

    (pair,) = re.findall(r'format!\("(<Instruct>[^"]*)"\)', source)
    pair = pair.replace("\\n", "\n").replace("{instruction}", constant("INSTRUCTION"))
    assert TEMPLATES["reranker"] == constant("BEFORE") + pair + constant("AFTER")


@needs_data
@pytest.mark.parametrize("prefix", [0, 5])
def test_requests_share_nothing_and_their_texts_a_prefix(prefix: int) -> None:
    made = [tokenizer().encode_batch(request.texts) for request in shared_prefixes(prefix, 3, 4, 6)]
    groups = [[encoding.ids for encoding in encodings] for encodings in made]
    everything = [ids for group in groups for ids in group]
    assert {len(ids) for ids in everything} == {prefix + 3}
    assert all(len({tuple(ids[:prefix]) for ids in group}) == 1 for group in groups)
    # Behind the prefix no two texts of a request go on alike, and without one no two of all start alike.
    assert all(len({ids[prefix] for ids in group}) == 4 for group in groups)
    assert len({ids[0] for ids in everything}) == (6 if prefix else 24)
