//! What texts share is tokenized once: to the same tokens as each text alone.
#![cfg(feature = "candle")]

use std::collections::HashMap;
use std::path::Path;

use proptest::prelude::*;
use radix_mlp::text::{MaxLength, TextEncoder};
use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

const ALL: MaxLength = MaxLength {
    tokens: usize::MAX,
    truncate: false,
};
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Pieces of which any two may merge where a tokenizer does not split between them. "Ġ" is a space, "Ċ" a newline.
const PIECES: [&str; 8] = ["a", "b", "s", "Ġ", "Ċ", "'", "!", "1"];

/// What Qwen's pattern treats in its own ways, with more spaces than chance would have.
const TEXTS: [&str; 17] = [
    "a", "b", "s", " ", "a ", "b a", "  ", "\n", "'", "'s", "!", "1", "<x>", "é", "e\u{301}",
    "\u{301}", "語",
];

/// A tokenizer.json as Qwen's, which merges any two of `PIECES`, and puts tokens before and after.
fn qwen() -> Value {
    let pairs = PIECES
        .iter()
        .flat_map(|a| PIECES.map(|b| [a.to_string(), b.to_string()]));
    let merges: Vec<[String; 2]> = pairs.collect();
    let mut symbols: Vec<String> = ByteLevel::alphabet()
        .into_iter()
        .map(String::from)
        .collect();
    symbols.sort_unstable();
    symbols.extend(merges.iter().map(|pair| pair.concat()));
    symbols.extend(["<x>", "<begin>", "<end>"].map(str::to_owned));
    let vocabulary: HashMap<String, usize> = symbols.into_iter().zip(0..).collect();
    let added = |content: &str| {
        json!({"id": vocabulary[content], "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let ids = |token: &str| json!({"id": token, "ids": [vocabulary[token]], "tokens": [token]});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [added("<x>"), added("<begin>"), added("<end>")],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        ]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special("<begin>"), {"Sequence": {"id": "A", "type_id": 0}}, special("<end>")],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<begin>": ids("<begin>"), "<end>": ids("<end>")},
        },
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges},
    })
}

/// Tokenizers that do not split between a letter and a space, or whose added tokens reach over it.
fn others() -> Vec<Value> {
    let with = |path: &str, value: Value| {
        let mut changed = qwen();
        *changed.pointer_mut(path).unwrap() = value;
        changed
    };
    let mut takes_spaces = qwen()["added_tokens"][0].clone();
    takes_spaces["content"] = json!("ba");
    takes_spaces["rstrip"] = json!(true);
    let lowered = json!({"type": "Replace", "pattern": {"String": "a "}, "content": "b"});
    vec![
        with(
            "/pre_tokenizer/pretokenizers/0/pattern",
            json!({"Regex": r"\p{N}"}),
        ),
        with("/pre_tokenizer/pretokenizers/0/invert", json!(true)),
        with(
            "/pre_tokenizer",
            json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false, "trim_offsets": true}),
        ),
        with("/normalizer", lowered),
        with("/added_tokens/0/content", json!("a b")),
        with("/added_tokens/0", takes_spaces),
    ]
}

fn encoder(tokenizer: &Value) -> TextEncoder {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    TextEncoder::from_file(&path).unwrap()
}

/// Texts that begin alike.
fn texts() -> impl Strategy<Value = Vec<String>> {
    let text = || {
        prop::collection::vec(prop::sample::select(&TEXTS[..]), 0..12)
            .prop_map(|pieces| pieces.concat())
    };
    (text(), prop::collection::vec(text(), 1..5))
        .prop_map(|(start, ends)| ends.into_iter().map(|end| start.clone() + &end).collect())
}

/// Of each text by itself, where nothing is shared.
fn check(encoder: &TextEncoder, texts: &[String]) {
    let prompt = encoder.prompt("a b", "!").unwrap();
    let most = MaxLength {
        tokens: 8,
        truncate: true,
    };
    let encode = |texts: &[String]| {
        let around = [
            encoder.encode(texts, ALL),
            encoder.encode(texts, most),
            encoder.encode_in_prompt(texts, &prompt, ALL),
        ];
        around.map(|results| {
            results
                .into_iter()
                .map(|ids| ids.map_err(|error| error.to_string()))
                .collect::<Vec<_>>()
        })
    };
    let alone = texts.iter().map(|text| encode(std::slice::from_ref(text)));
    let mut whole = [vec![], vec![], vec![]];
    for one in alone {
        for (all, one) in whole.iter_mut().zip(one) {
            all.extend(one);
        }
    }
    assert_eq!(encode(texts), whole, "{texts:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn texts_that_begin_alike_have_their_own_tokens(texts in texts()) {
        thread_local!(static QWEN: TextEncoder = encoder(&qwen()));
        QWEN.with(|encoder| check(encoder, &texts));
    }

    #[test]
    fn tokenizers_that_split_elsewhere_are_left_alone(texts in texts()) {
        thread_local!(static OTHERS: Vec<TextEncoder> = others().iter().map(encoder).collect());
        OTHERS.with(|encoders| encoders.iter().for_each(|encoder| check(encoder, &texts)));
    }

    #[test]
    fn real_texts_have_their_own_tokens(texts in texts()) {
        thread_local!(static REAL: Option<TextEncoder> = {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/qwen3-tokenizer/tokenizer.json");
            let found = path.exists().then(|| TextEncoder::from_file(&path).unwrap());
            if found.is_none() {
                println!("skipped: no tokenizer at {}", path.display());
            }
            found
        });
        REAL.with(|encoder| encoder.iter().for_each(|encoder| check(encoder, &texts)));
    }
}
