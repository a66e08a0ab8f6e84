use radix_mlp::qwen3::FoldLevel;
use radix_mlp::text::{MaxLength, TextEncoder, reranker};
use serde_json::{Value, json};

use super::fixtures::{Fixture, fold};

#[derive(serde::Deserialize)]
struct Scored {
    index: usize,
    score: f32,
}

fn rankings(lines: &str) -> Vec<Vec<Scored>> {
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn scores_are_those_of_each_pair_alone_best_first() {
    let fixture = Fixture::new();
    let passages = |n: usize| (0..n).map(|i| format!("passage {i}")).collect::<Vec<_>>();
    let queries: Vec<Value> = [3, 0, 5]
        .map(|n| json!({"query": format!("query {n}"), "passages": passages(n)}))
        .into();
    let lines: String = queries.iter().map(|query| format!("{query}\n")).collect();
    fixture.write("pairs.jsonl", &lines);
    let output = fixture.succeed(&["rerank", "-m", "model", "-i", "pairs.jsonl"]);

    let model = fixture.model();
    let encoder = TextEncoder::from_file(&fixture.path("model/tokenizer.json")).unwrap();
    let prompt = encoder.prompt(reranker::BEFORE, reranker::AFTER).unwrap();
    let max = MaxLength {
        tokens: usize::MAX,
        truncate: false,
    };
    let (yes, no) = (
        encoder.token_id("yes").unwrap(),
        encoder.token_id("no").unwrap(),
    );
    let rankings = rankings(&output);
    assert_eq!(rankings.iter().map(Vec::len).collect::<Vec<_>>(), [3, 0, 5]);
    for (n, ranking) in [3, 0, 5].into_iter().zip(&rankings) {
        assert!(
            ranking
                .windows(2)
                .all(|pair| pair[0].score >= pair[1].score)
        );
        for Scored { index, score } in ranking {
            let pair = reranker::pair(
                reranker::INSTRUCTION,
                &format!("query {n}"),
                &passages(n)[*index],
            );
            let tokens = encoder
                .encode_in_prompt(&[pair], &prompt, max)
                .remove(0)
                .unwrap();
            let fold = fold(&tokens);
            let states = model.forward(&fold, FoldLevel::None).unwrap();
            let alone = model.yes_probabilities(&states, yes, no).unwrap()[0];
            assert!((alone - score).abs() < 1e-5, "{alone} is not {score}");
        }
    }
}

#[test]
fn long_passages_are_cut_within_the_prompt() {
    let fixture = Fixture::new();
    let pairs = json!({"query": "why", "passages": ["x".repeat(300), "x".repeat(900)]});
    fixture.write("pairs.jsonl", &format!("{pairs}\n"));
    let message = fixture.fail(&["rerank", "-m", "model", "-i", "pairs.jsonl"]);
    assert!(
        message.contains("line 1") && message.contains("600"),
        "{message}"
    );
    // Both are cut to the same tokens: equal scores, in the order of the input.
    let output = fixture.succeed(&["rerank", "-m", "model", "-i", "pairs.jsonl", "--truncate"]);
    let ranking = rankings(&output).remove(0);
    assert_eq!((ranking[0].index, ranking[1].index), (0, 1));
    assert_eq!(ranking[0].score.to_bits(), ranking[1].score.to_bits());
}

#[test]
fn texts_without_a_query_are_refused() {
    let fixture = Fixture::new();
    fixture.write("texts.jsonl", "\"text\"\n");
    let message = fixture.fail(&[
        "rerank",
        "-m",
        "model",
        "-i",
        "texts.jsonl",
        "-o",
        "out.jsonl",
    ]);
    assert!(
        message.contains("line 1") && message.contains("passages"),
        "{message}"
    );
    assert_eq!(fixture.files(), ["texts.jsonl"]);
}
