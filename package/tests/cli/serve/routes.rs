//! What each route answers.

use radix_mlp::qwen3::{FoldLevel, Pooling};
use radix_mlp::text::{MaxLength, TextEncoder, reranker};
use serde_json::{Value, json};

use super::super::fixtures::{
    CONTEXT, Fixture, HIDDEN, assert_close, byte, embed_alone, fold, tokens,
};
use super::{Server, header, vector, vectors};

#[test]
fn embed_takes_texts_and_token_ids() {
    let fixture = Fixture::new();
    let (server, model) = (Server::start(&fixture, &[]), fixture.model());
    let texts = ["shared prefix one", "shared prefix two", "other"];
    let expected = texts.map(|text| embed_alone(&model, &tokens(text), Pooling::LastToken));
    let ids: Vec<Vec<u32>> = texts.map(tokens).into();
    for (inputs, first, count) in [
        (json!(texts), 0, 3),
        (json!(ids), 0, 3),
        (json!(texts[1]), 1, 1),
        (json!(ids[2]), 2, 1),
    ] {
        for route in ["/embed", "/"] {
            let found = vectors(&server.ok(route, &json!({"inputs": inputs})));
            assert_eq!(found.len(), count);
            for (found, expected) in found.iter().zip(&expected[first..]) {
                assert_close(found, expected);
            }
        }
    }
}

#[test]
fn embed_tells_what_it_took() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &["--fold", "full"]);
    let response = server.post("/embed", &json!({"inputs": ["abcd", "abce", "abce"]}));
    // Each text and an end token; of the second, three are shared, of the third all.
    assert_eq!(header(&response, "x-compute-tokens"), 15);
    assert_eq!(header(&response, "x-folded-tokens"), 8);
    assert_eq!(header(&response, "x-compute-characters"), 12);
    let time = |name: &str| header(&response, &format!("x-{name}-time"));
    let parts = ["tokenization", "queue", "inference"].map(time);
    // Each is rounded down to milliseconds.
    assert!(parts.into_iter().sum::<usize>() <= time("total"));
    assert_eq!(response.headers()["x-compute-type"], "cpu");
    assert_eq!(server.metric("radix_mlp_tokens"), 15.0);
    assert_eq!(server.metric("radix_mlp_computed_tokens"), 7.0);
}

#[test]
fn nothing_is_folded_where_that_is_asked_for() {
    let fixture = Fixture::new();
    for (options, computed) in [
        (&[][..], 7),
        (&["--fold", "auto"], 7),
        (&["--fold", "none"], 10),
        (&["--radix-mlp-threshold", "0"], 10),
        (&["--radix-mlp-threshold", "0.6"], 10),
        (&["--radix-mlp-threshold", "0.8"], 7),
        (&["--radix-mlp-threshold", "1"], 7),
        (&["--fold", "mlp"], 7),
    ] {
        let server = Server::start(&fixture, options);
        let response = server.post("/embed", &json!({"inputs": ["abcd", "abce"]}));
        assert_eq!(
            header(&response, "x-folded-tokens"),
            10 - computed,
            "{options:?}"
        );
        assert_eq!(server.metric("radix_mlp_computed_tokens"), computed as f64);
    }
}

#[test]
fn embed_normalizes_and_cuts_dimensions() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &[]);
    let embed = |options: Value| {
        let mut body = json!({"inputs": "a text"});
        body.as_object_mut()
            .unwrap()
            .extend(options.as_object().unwrap().clone());
        vector(&server.ok("/embed", &body)[0])
    };
    let raw = embed(json!({"normalize": false}));
    let norm = |vector: &[f32]| vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    assert!((norm(&raw) - 1.0).abs() > 0.1);
    let unit = embed(json!({}));
    assert_close(
        &unit,
        &raw.iter().map(|x| x / norm(&raw)).collect::<Vec<_>>(),
    );
    let cut = embed(json!({"dimensions": 5}));
    assert_close(
        &cut,
        &raw[..5]
            .iter()
            .map(|x| x / norm(&raw[..5]))
            .collect::<Vec<_>>(),
    );
}

#[test]
fn the_directory_names_prompts_and_pooling() {
    let fixture = Fixture::new();
    let prompts =
        json!({"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": "query"});
    fixture.write(
        "model/config_sentence_transformers.json",
        &prompts.to_string(),
    );
    std::fs::create_dir(fixture.path("model/1_Pooling")).unwrap();
    let pooling = json!({"pooling_mode_mean_tokens": true, "word_embedding_dimension": HIDDEN});
    fixture.write("model/1_Pooling/config.json", &pooling.to_string());
    let (server, model) = (Server::start(&fixture, &[]), fixture.model());
    for (name, text) in [
        (json!(null), "find: a"),
        (json!("query"), "find: a"),
        (json!("document"), "a"),
    ] {
        let found = server.ok("/embed", &json!({"inputs": "a", "prompt_name": name}));
        assert_close(
            &vector(&found[0]),
            &embed_alone(&model, &tokens(text), Pooling::Mean),
        );
    }
    let (status, error) = server.refused("/embed", &json!({"inputs": "a", "prompt_name": "code"}));
    assert_eq!((status, &error["error_type"]), (422, &json!("Validation")));
    assert_eq!(
        error["error"],
        r#"no prompt is named "code": the model has ["document", "query"]"#
    );
    let (status, _) = server.refused("/embed", &json!({"inputs": [1], "prompt_name": "query"}));
    assert_eq!(status, 422);
    let info: Value = serde_json::from_str(&server.get("/info")).unwrap();
    assert_eq!(info["model_type"]["embedding"]["pooling"], "mean");

    let server = Server::start(&fixture, &["--pooling", "cls"]);
    let found = server.ok("/embed", &json!({"inputs": "a"}));
    assert_close(
        &vector(&found[0]),
        &embed_alone(&model, &tokens("find: a"), Pooling::Cls),
    );
}

/// The logit of "yes" less that of "no" after a pair, computed alone.
fn logit(fixture: &Fixture, query: &str, passage: &str) -> f32 {
    let model = fixture.model();
    let encoder = TextEncoder::from_file(&fixture.path("model/tokenizer.json")).unwrap();
    let prompt = encoder.prompt(reranker::BEFORE, reranker::AFTER).unwrap();
    let max = MaxLength {
        tokens: CONTEXT,
        truncate: false,
    };
    let pair = reranker::pair(reranker::INSTRUCTION, query, passage);
    let tokens = encoder
        .encode_in_prompt(&[pair], &prompt, max)
        .remove(0)
        .unwrap();
    let fold = fold(&tokens);
    let states = model.forward(&fold, FoldLevel::None).unwrap();
    let [yes, no] = ["yes", "no"].map(|token| encoder.token_id(token).unwrap());
    model.yes_logits(&states, yes, no).unwrap()[0]
}

#[test]
fn rerank_scores_pairs_best_first() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &[]);
    let texts = ["first", "second", "third", "fourth"];
    let logits = texts.map(|text| logit(&fixture, "which?", text));
    let request = |options: Value| {
        let mut body = json!({"query": "which?", "texts": texts});
        body.as_object_mut()
            .unwrap()
            .extend(options.as_object().unwrap().clone());
        server.ok("/rerank", &body).as_array().unwrap().clone()
    };
    let ranks = request(json!({}));
    let raw = request(json!({"raw_scores": true, "return_text": true}));
    assert_eq!(ranks.len(), 4);
    let score = |rank: &Value| rank["score"].as_f64().unwrap() as f32;
    assert!(
        ranks
            .windows(2)
            .all(|pair| score(&pair[0]) >= score(&pair[1]))
    );
    for (rank, raw) in ranks.iter().zip(&raw) {
        let index = rank["index"].as_u64().unwrap() as usize;
        assert!(rank.get("text").is_none());
        assert_eq!(raw["text"], texts[index]);
        assert_close(&[score(raw)], &[logits[index]]);
        assert_close(&[score(rank)], &[1.0 / (1.0 + (-logits[index]).exp())]);
    }
}

#[test]
fn openai_embeddings() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &[]);
    let expected = vectors(&server.ok("/embed", &json!({"inputs": ["one", "three"]})));
    let answer = server.ok(
        "/v1/embeddings",
        &json!({"input": ["one", "three"], "model": "mine"}),
    );
    assert_eq!(
        (&answer["object"], &answer["model"]),
        (&json!("list"), &json!("mine"))
    );
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": 10, "total_tokens": 10})
    );
    for (index, (item, expected)) in answer["data"]
        .as_array()
        .unwrap()
        .iter()
        .zip(&expected)
        .enumerate()
    {
        assert_eq!(
            (&item["object"], &item["index"]),
            (&json!("embedding"), &json!(index))
        );
        assert_close(&vector(&item["embedding"]), expected);
    }
    let coded = server.ok(
        "/v1/embeddings",
        &json!({"input": "one", "encoding_format": "base64"}),
    );
    assert_eq!(coded["model"], "model");
    let text = coded["data"][0]["embedding"].as_str().unwrap();
    assert_eq!(text.len(), (4 * HIDDEN).div_ceil(3) * 4);
    let ids = server.ok("/v1/embeddings", &json!({"input": tokens("one")}));
    assert_close(&vector(&ids["data"][0]["embedding"]), &expected[0]);
    let unknown = json!({"input": "one", "encoding_format": "hex"});
    let (status, error) = server.refused("/v1/embeddings", &unknown);
    assert_eq!((status, &error["type"]), (422, &json!("Validation")));
}

#[test]
fn tokenize_tells_ids_and_places() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &[]);
    // "é" in UTF-8 is C3 A9, which the byte-level alphabet spells "Ã©".
    let ids = [tokens("n")[0], byte('Ã'), byte('©'), tokens("")[0]];
    let found = server.ok("/tokenize", &json!({"inputs": "né"}));
    let found = found[0].as_array().unwrap();
    // "é" is two bytes, and one character.
    let places = [
        json!([0, 1]),
        json!([1, 2]),
        json!([1, 2]),
        json!([null, null]),
    ];
    assert_eq!(found.len(), 4);
    for (index, token) in found.iter().enumerate() {
        assert_eq!(token["special"], index == 3);
        assert_eq!(json!([token["start"], token["stop"]]), places[index]);
        assert_eq!(token["id"], ids[index]);
    }
    let bare = json!({"inputs": ["a", "bc"], "add_special_tokens": false});
    let bare = server.ok("/tokenize", &bare);
    assert_eq!(bare[1].as_array().unwrap().len(), 2);
}

#[test]
fn info_health_metrics_and_docs() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &["--max-batch-tokens", "99", "--auto-truncate"]);
    let info: Value = serde_json::from_str(&server.get("/info")).unwrap();
    assert_eq!(info["model_id"], "model");
    assert_eq!(info["model_dtype"], "float32");
    assert_eq!(info["max_input_length"], CONTEXT);
    assert_eq!(info["max_batch_tokens"], 99);
    assert!(info["tokenization_workers"].as_u64() >= Some(1));
    assert_eq!(
        (&info["model_sha"], &info["max_batch_requests"]),
        (&json!(null), &json!(null))
    );
    assert_eq!(
        info["model_type"]["reranker"]["id2label"],
        json!({"0": "yes"})
    );
    assert_eq!(info["auto_truncate"], true);
    assert_eq!(server.get("/health"), "");
    server.ok("/embed", &json!({"inputs": "a"}));
    server.refused("/embed", &json!({"inputs": []}));
    server.refused("/", &json!({}));
    assert_eq!(server.metric(r#"te_request_count{method="embed"}"#), 3.0);
    assert_eq!(server.metric("te_request_duration_count"), 1.0);
    assert_eq!(server.metric("te_batch_next_size_count"), 1.0);
    let api: Value = serde_json::from_str(&server.get("/api-doc/openapi.json")).unwrap();
    let routes: Vec<&String> = api["paths"].as_object().unwrap().keys().collect();
    let expected = [
        "/embed",
        "/health",
        "/info",
        "/metrics",
        "/rerank",
        "/tokenize",
        "/v1/embeddings",
    ];
    assert_eq!(routes, expected);
    assert!(server.get("/docs/").contains("swagger"));
    let scheme = &api["components"]["securitySchemes"]["key"];
    assert_eq!(scheme, &json!({"type": "http", "scheme": "bearer"}));
    for route in ["/embed", "/rerank", "/v1/embeddings", "/tokenize"] {
        assert_eq!(
            api["paths"][route]["post"]["security"],
            json!([{"key": []}])
        );
    }
    assert_eq!(
        api["paths"]["/info"]["get"]["security"],
        json!([{"key": []}])
    );
}

#[test]
fn a_model_of_hugging_faces_cache_has_its_name_and_revision() {
    let fixture = Fixture::new();
    let snapshots = "models--Qwen--Qwen3/snapshots";
    std::fs::create_dir_all(fixture.path(snapshots)).unwrap();
    let directory = format!("{snapshots}/0123abc");
    std::fs::rename(fixture.path("model"), fixture.path(&directory)).unwrap();
    let command = fixture.command(&["serve", "-m", &directory, "--port", "0"]);
    let info: Value = serde_json::from_str(&Server::spawn(command).get("/info")).unwrap();
    assert_eq!(info["model_id"], "Qwen/Qwen3");
    assert_eq!(info["model_sha"], "0123abc");
}

/// Tokens, which are bytes, that a pair of the query "q" leaves for its text.
fn room_for_text() -> usize {
    let pair = reranker::pair(reranker::INSTRUCTION, "q", "");
    CONTEXT - reranker::BEFORE.len() - pair.len() - reranker::AFTER.len()
}

#[test]
fn long_texts_are_cut_where_that_is_asked_for() {
    let fixture = Fixture::new();
    let long = "ab".repeat(CONTEXT);
    let cut = json!({"inputs": &long[..CONTEXT - 1]});
    let server = Server::start(&fixture, &["--auto-truncate"]);
    let expected = vector(&server.ok("/embed", &cut)[0]);
    assert_close(
        &vector(&server.ok("/embed", &json!({"inputs": long}))[0]),
        &expected,
    );
    let (status, _) = server.refused("/embed", &json!({"inputs": long, "truncate": false}));
    assert_eq!(status, 422);
    let server = Server::start(&fixture, &[]);
    let asked = json!({"inputs": long, "truncate": true, "truncation_direction": "right"});
    assert_close(&vector(&server.ok("/embed", &asked)[0]), &expected);
    let [long, cut] = [CONTEXT, 0].map(|more| {
        let text = &"ab".repeat(CONTEXT)[..room_for_text() + more];
        let body = json!({"query": "q", "texts": [text], "truncate": true, "raw_scores": true});
        server.ok("/rerank", &body)[0]["score"].as_f64().unwrap() as f32
    });
    assert_close(&[long], &[cut]);
}
