//! The real Qwen3 tokenizer against public test vectors.

use std::path::Path;

use radix_mlp::text::{MaxLength, TextEncoder};

#[test]
fn qwen3_vectors_are_tokenized_as_published() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/qwen3-tokenizer");
    if !data.exists() {
        println!("skipped: no tokenizer at {}", data.display());
        return;
    }
    let read = |name: &str| std::fs::read_to_string(data.join(name)).unwrap();
    let encoder = TextEncoder::from_file(&data.join("tokenizer.json")).unwrap();
    let texts = read("ggml-vocab-qwen2.gguf.inp");
    let texts: Vec<String> = texts
        .split("\n__ggml_vocab_test__\n")
        .map(str::to_owned)
        .collect();
    let expected = read("ggml-vocab-qwen2.gguf.out");
    let max = MaxLength {
        tokens: usize::MAX,
        truncate: false,
    };
    let mut compared = 0;
    for (text, line) in texts.iter().zip(expected.lines()) {
        let ids: Vec<u32> = line
            .split_whitespace()
            .map(|id| id.parse().unwrap())
            .collect();
        if ids.is_empty() {
            continue;
        }
        let tokens = encoder
            .encode(std::slice::from_ref(text), max)
            .remove(0)
            .unwrap();
        assert_eq!(tokens, ids, "{text:?}");
        compared += 1;
    }
    assert!(compared >= 40, "{compared} vectors compared");
}
