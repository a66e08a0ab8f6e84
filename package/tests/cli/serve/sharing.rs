//! Requests that meet in a batch: each gets the answer that it would get alone.

use radix_mlp::qwen3::Pooling;
use serde_json::{Value, json};

use super::super::fixtures::{Fixture, assert_close, embed_alone, tokens};
use super::{Server, header, json, vector, vectors};

/// Longer than it takes to send what should meet.
const WINDOW: &str = "1000";

#[test]
fn answers_do_not_depend_on_who_shares_the_batch() {
    let fixture = Fixture::new();
    let (server, model) = (
        Server::start(&fixture, &["--max-batch-tokens", "200"]),
        fixture.model(),
    );
    let text = |client: usize, request: usize| {
        format!("prefix of group {}: {client} {request}", client % 3)
    };
    std::thread::scope(|scope| {
        for client in 0..12 {
            let (server, model) = (&server, &model);
            scope.spawn(move || {
                for request in 0..8 {
                    let texts = [text(client, request), text(client + 1, request)];
                    let found = vectors(&server.ok("/embed", &json!({"inputs": texts})));
                    for (found, text) in found.iter().zip(&texts) {
                        assert_close(
                            found,
                            &embed_alone(model, &tokens(text), Pooling::LastToken),
                        );
                    }
                }
            });
        }
    });
    assert_eq!(server.metric("te_queue_size"), 0.0);
    let batches = server.metric("te_batch_next_size_count");
    assert!(batches < 12.0 * 8.0, "{batches} batches");
}

#[test]
fn requests_of_one_query_that_arrive_together_are_one_batch() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &["--batch-window", WINDOW, "--fold", "full"]);
    let folded: usize = std::thread::scope(|scope| {
        let requests = (0..6).map(|passage| {
            let server = &server;
            scope.spawn(move || {
                let body = json!({"query": "one query", "texts": [format!("passage {passage}")]});
                header(&server.post("/rerank", &body), "x-folded-tokens")
            })
        });
        let requests: Vec<_> = requests.collect();
        requests
            .into_iter()
            .map(|request| request.join().unwrap())
            .sum()
    });
    assert_eq!(server.metric("te_batch_next_size_count"), 1.0);
    assert_eq!(server.metric("te_batch_next_size_sum"), 6.0);
    let [asked, computed] =
        ["radix_mlp_tokens", "radix_mlp_computed_tokens"].map(|n| server.metric(n));
    assert_eq!(folded as f64, asked - computed);
    assert!(asked > 3.0 * computed, "{asked} {computed}");
}

#[test]
fn the_same_text_asked_twice_is_computed_once() {
    let fixture = Fixture::new();
    for level in ["none", "full"] {
        let server = Server::start(&fixture, &["--fold", level]);
        let found = server.ok("/embed", &json!({"inputs": vec!["the same"; 50]}));
        let found = vectors(&found);
        assert!(found.iter().all(|vector| *vector == found[0]));
        assert_eq!(server.metric("radix_mlp_computed_tokens"), 9.0);
    }
}

#[test]
fn a_large_request_is_split_into_batches() {
    let fixture = Fixture::new();
    let (server, model) = (
        Server::start(&fixture, &["--max-batch-tokens", "64"]),
        fixture.model(),
    );
    let texts: Vec<String> = (0..100).map(|n| format!("{n} and more of it")).collect();
    let found = vectors(&server.ok("/embed", &json!({"inputs": texts})));
    for (found, text) in found.iter().zip(&texts) {
        assert_close(
            found,
            &embed_alone(&model, &tokens(text), Pooling::LastToken),
        );
    }
    assert!(server.metric("te_batch_next_size_count") > 10.0);
}

#[test]
fn a_batch_that_is_not_folded_keeps_to_its_tokens_too() {
    let fixture = Fixture::new();
    // Filled by unique tokens, and then shared too little for the threshold.
    let options = ["--max-batch-tokens", "128", "--radix-mlp-threshold", "0.01"];
    let (server, model) = (Server::start(&fixture, &options), fixture.model());
    let texts: Vec<String> = (10..50).map(|n| format!("{}{n}", "x".repeat(40))).collect();
    let found = vectors(&server.ok("/embed", &json!({"inputs": texts})));
    for (found, text) in found.iter().zip(&texts) {
        assert_close(
            found,
            &embed_alone(&model, &tokens(text), Pooling::LastToken),
        );
    }
    // 40 texts of 43 tokens, 124 of them unique; unfolded, two texts fit.
    assert_eq!(server.metric("radix_mlp_forward_tokens_count"), 20.0);
    assert_eq!(server.metric("radix_mlp_forward_tokens_sum"), 40.0 * 43.0);
    assert_eq!(server.metric("te_batch_next_size_count"), 1.0);
}

#[test]
fn embeddings_and_scores_share_a_batch() {
    let fixture = Fixture::new();
    let alone = Server::start(&fixture, &[]);
    let server = Server::start(&fixture, &["--batch-window", WINDOW]);
    let rerank = json!({"query": "q", "texts": ["a", "b"], "raw_scores": true});
    let embed = json!({"inputs": ["a", "q"]});
    let [ranks, embeddings]: [Value; 2] = std::thread::scope(|scope| {
        let ranks = scope.spawn(|| json(&mut server.post("/rerank", &rerank)));
        let embeddings = scope.spawn(|| json(&mut server.post("/embed", &embed)));
        [ranks, embeddings].map(|request| request.join().unwrap())
    });
    assert_eq!(server.metric("te_batch_next_size_count"), 1.0);
    let score = |rank: &Value| rank["score"].as_f64().unwrap() as f32;
    let expected = alone.ok("/rerank", &rerank);
    for (found, expected) in ranks
        .as_array()
        .unwrap()
        .iter()
        .zip(expected.as_array().unwrap())
    {
        assert_eq!(found["index"], expected["index"]);
        assert_close(&[score(found)], &[score(expected)]);
    }
    assert_close(
        &vector(&embeddings[1]),
        &vector(&alone.ok("/embed", &embed)[1]),
    );
}
