"""sentence-transformers models encode and rank folded as they do by themselves, in the order of the input."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
)

from radix_mlp.transformers import fold, is_folded

pytest.importorskip("sentence_transformers")

from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers

import radix_mlp.sentence_transformers
from radix_mlp.sentence_transformers import encode, predict

# f32, embeddings of norm 1 and scores around 1: sums in another order.
TOLERANCE = 1e-5

PROMPT = "w1 w2 w3 w4 "
# Neighbours share nothing: the plan must bring them together and the results back.
TEXTS = ["w5 w6 w7", "w20", "w5 w6 w8", "w20 w21 w22 w23", "w5", "w30 w31"] * 2
PAIRS = [(query, text) for text in TEXTS for query in ("w1 w2 w3", "w9 w8")]


def save(model_class: type[PreTrainedModel], path: Path, **options: Any) -> str:
    words = ["<pad>", "<unk>", "<eos>", "yes", "no", *(f"w{i}" for i in range(40))]
    tokenizer: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, padding_side="left", **special).save_pretrained(path)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        initializer_range=0.2,
        **options,
    )
    torch.manual_seed(0)
    model_class(config).save_pretrained(path)
    return str(path)


@pytest.fixture
def embedder(tmp_path: Path) -> SentenceTransformer:
    modules = [Transformer(save(Qwen3Model, tmp_path)), Pooling(32, pooling_mode="lasttoken"), Normalize()]
    return SentenceTransformer(modules=modules, prompts={"query": PROMPT}, device="cpu")


def count_rows(model: Any) -> list[int]:
    rows: list[int] = []
    embeddings = model.transformers_model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, __, out: rows.append(out.shape[:-1].numel()))
    return rows


@pytest.mark.parametrize("prompt", [{}, {"prompt_name": "query"}, {"prompt": "w9 w8 "}])
def test_encode(embedder: SentenceTransformer, prompt: dict[str, Any]) -> None:
    expected = embedder.encode(TEXTS, **prompt)
    rows = count_rows(embedder)
    found = encode(embedder, TEXTS, unique_tokens=9, **prompt)
    assert np.abs(found - expected).max() < TOLERANCE
    assert len(rows) > 1
    assert max(rows) <= 9
    assert not is_folded(embedder)


def test_one_batch_computes_each_node_once(embedder: SentenceTransformer) -> None:
    rows = count_rows(embedder)
    encode(embedder, TEXTS, prompt=PROMPT)
    # The prompt, then w5 w6 (w7 | w8), w20 w21 w22 w23, w30 w31.
    assert rows == [4 + 4 + 4 + 2]


def test_many_texts_behind_a_long_prompt_are_not_padded_at_once(
    embedder: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = embedder.encode(TEXTS, prompt=PROMPT)
    shapes: list[int] = []
    monkeypatch.setattr(radix_mlp.sentence_transformers, "MAX_PLACES", 20)
    encode_once = embedder.encode

    def counted(texts: list[str], **own: Any) -> Any:
        shapes.append(len(texts))
        return encode_once(texts, **own)

    monkeypatch.setattr(embedder, "encode", counted)
    assert np.abs(encode(embedder, TEXTS, prompt=PROMPT) - expected).max() < TOLERANCE
    # Seven or eight tokens each, the prompt included.
    assert max(shapes) == 2
    assert sum(shapes) == len(TEXTS)


def test_encode_takes_the_options_of_encode(embedder: SentenceTransformer) -> None:
    found = encode(embedder, TEXTS, convert_to_tensor=True, normalize_embeddings=True, truncate_dim=8)
    expected = embedder.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True, truncate_dim=8)
    assert isinstance(found, Tensor)
    assert (found - expected).abs().max() < TOLERANCE
    listed = encode(embedder, TEXTS, convert_to_numpy=False)
    assert isinstance(listed, list)
    assert (torch.stack(listed) - embedder.encode(TEXTS, convert_to_tensor=True)).abs().max() < TOLERANCE


def test_a_model_that_is_folded_already_stays_so(embedder: SentenceTransformer) -> None:
    expected = embedder.encode(TEXTS)
    fold(embedder)
    assert np.abs(embedder.encode(TEXTS) - expected).max() < TOLERANCE
    assert np.abs(encode(embedder, TEXTS) - expected).max() < TOLERANCE
    assert is_folded(embedder)


def test_encode_plans_with_the_options_of_the_tokeniser(embedder: SentenceTransformer) -> None:
    options: dict[str, Any] = {"processing_kwargs": {"text": {"max_length": 1, "truncation": True}}}
    expected = embedder.encode(TEXTS, **options)
    rows = count_rows(embedder)
    assert np.abs(encode(embedder, TEXTS, unique_tokens=3, **options) - expected).max() < TOLERANCE
    # w5, w20 and w30 are all that is left.
    assert rows == [3]


def test_encode_without_padding(embedder: SentenceTransformer) -> None:
    """With FlashAttention, which a CPU has not, sentence-transformers packs a batch into one row."""
    expected = embedder.encode(TEXTS)
    transformer, collator = cast("tuple[Any, Any]", (embedder[0], DataCollatorWithFlattening))
    transformer.data_collator = collator(return_seq_idx=True, return_flash_attn_kwargs=True)
    transformer.can_flatten_inputs, transformer._flatten_position_offset = True, 0
    assert "attention_mask" not in embedder.preprocess(TEXTS)
    rows = count_rows(embedder)
    assert np.abs(encode(embedder, TEXTS, unique_tokens=9) - expected).max() < TOLERANCE
    assert max(rows) <= 9


@pytest.mark.parametrize("inputs", ["w1", [], [{"role": "user", "content": "w1"}]])
def test_encode_wants_several_texts(embedder: SentenceTransformer, inputs: Any) -> None:
    with pytest.raises(ValueError, match="at least one text"):
        encode(embedder, inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "'int8' takes the range of all embeddings"),
        ({"precision": "uint8"}, "'uint8' takes the range of all embeddings"),
        ({"device": ["cpu", "cpu"]}, "on one device"),
        ({"pool": {}}, "on one device"),
        ({"batch_size": 8}, "there is no batch_size, got 8"),
    ],
)
def test_encode_refuses_what_batches_cannot_give(
    embedder: SentenceTransformer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode(embedder, TEXTS, **options)


def test_encode_to_bits(embedder: SentenceTransformer) -> None:
    found = encode(embedder, TEXTS, unique_tokens=9, precision="binary")
    assert (found == embedder.encode(TEXTS, precision="binary")).all()


def test_progress_bar(embedder: SentenceTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    encode(embedder, TEXTS, show_progress_bar=True)
    assert "12/12" in capsys.readouterr().err
    encode(embedder, TEXTS)
    assert not capsys.readouterr().err


@pytest.fixture
def classifier(tmp_path: Path) -> CrossEncoder:
    path = save(Qwen3ForSequenceClassification, tmp_path, num_labels=1)
    model: CrossEncoder = CrossEncoder(path, device="cpu", prompts={"rank": PROMPT})
    return model


@pytest.mark.parametrize("form", [list, np.array])
@pytest.mark.parametrize("prompt", [{}, {"prompt_name": "rank"}, {"prompt": "w9 w8 "}])
def test_predict_with_a_classifier(classifier: CrossEncoder, form: Any, prompt: dict[str, Any]) -> None:
    expected = classifier.predict(PAIRS, **prompt)
    rows = count_rows(classifier)
    assert np.abs(predict(classifier, form(PAIRS), unique_tokens=12, **prompt) - expected).max() < TOLERANCE
    assert len(rows) > 1
    assert max(rows) <= 12


@pytest.mark.parametrize("pair", [("w1 w2", "w3"), ["w1 w2", "w3"], np.array(["w1 w2", "w3"])])
def test_predict_wants_several_pairs(classifier: CrossEncoder, pair: Any) -> None:
    with pytest.raises(ValueError, match="at least one text or pair"):
        predict(classifier, pair)


def test_predict_with_a_language_model_that_says_yes_or_no(tmp_path: Path) -> None:
    """Qwen3-Reranker's way: the score is the logit of yes minus that of no after the last token."""
    path = save(Qwen3ForCausalLM, tmp_path)
    modules = [Transformer(path, transformer_task="text-generation"), LogitScore(true_token_id=3, false_token_id=4)]
    model = CrossEncoder(modules=modules, device="cpu", prompts={"rank": PROMPT}, default_prompt_name="rank")
    expected = model.predict(PAIRS)
    rows = count_rows(model)
    assert np.abs(predict(model, PAIRS) - expected).max() < TOLERANCE
    assert sum(rows) < 60
    assert np.abs(predict(model, PAIRS, prompt="w7 ") - model.predict(PAIRS, prompt="w7 ")).max() < TOLERANCE
