//! What is refused, and how clients are told.

use serde_json::{Value, json};

use super::super::fixtures::{CONTEXT, Fixture, HIDDEN};
use super::{Server, json};

#[test]
fn what_is_no_request_is_refused() {
    let fixture = Fixture::new();
    let options = ["--max-client-batch-size", "3", "--payload-limit", "5000"];
    let server = Server::start(&fixture, &options);
    let long = "x".repeat(CONTEXT);
    for (route, body, status, kind) in [
        ("/embed", json!({"inputs": []}), 400, "Empty"),
        ("/embed", json!({"inputs": [[]]}), 400, "Empty"),
        ("/rerank", json!({"query": "q", "texts": []}), 400, "Empty"),
        (
            "/embed",
            json!({"inputs": ["a", "b", "c", "d"]}),
            413,
            "Validation",
        ),
        (
            "/embed",
            json!({"inputs": "x".repeat(5000)}),
            413,
            "Validation",
        ),
        (
            "/embed",
            json!({"inputs": long, "truncate": false}),
            422,
            "Validation",
        ),
        (
            "/embed",
            json!({"inputs": vec![1; CONTEXT + 1]}),
            422,
            "Validation",
        ),
        (
            "/rerank",
            json!({"query": long, "texts": ["a"]}),
            422,
            "Validation",
        ),
        ("/embed", json!({"inputs": [1_000_000]}), 422, "Validation"),
        ("/embed", json!({"inputs": [-1]}), 422, "Validation"),
        ("/embed", json!({"inputs": [1.5]}), 422, "Validation"),
        ("/embed", json!({"inputs": ["a", 1]}), 422, "Validation"),
        ("/embed", json!({"inputs": null}), 422, "Validation"),
        ("/embed", json!({}), 422, "Validation"),
        ("/embed", json!([]), 422, "Validation"),
        (
            "/embed",
            json!({"inputs": "a", "dimensions": 0}),
            422,
            "Validation",
        ),
        (
            "/embed",
            json!({"inputs": "a", "dimensions": HIDDEN + 1}),
            422,
            "Validation",
        ),
        (
            "/embed",
            json!({"inputs": "a", "truncation_direction": "Left"}),
            422,
            "Validation",
        ),
        (
            "/rerank",
            json!({"query": "q", "texts": "a"}),
            422,
            "Validation",
        ),
        ("/tokenize", json!({"inputs": [1]}), 422, "Validation"),
    ] {
        let (found, error) = server.refused(route, &body);
        assert_eq!(
            (found, &error["error_type"]),
            (status, &json!(kind)),
            "{body}: {error}"
        );
        assert!(error["error"].as_str().is_some_and(|text| !text.is_empty()));
    }
    let (status, error) = server.refused("/v1/embeddings", &json!({"input": []}));
    assert_eq!(status, 400);
    assert_eq!(
        error,
        json!({"message": "inputs must not be empty", "code": 400, "type": "Empty"})
    );
    assert!(server.metric(r#"te_request_failure{err="422"}"#) >= 10.0);
    // What was refused left nothing behind.
    server.ok("/embed", &json!({"inputs": "a"}));
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model_fails_nobody_else() {
    let fixture = Fixture::new();
    let path = "model/tokenizer.json";
    let mut tokenizer: Value = serde_json::from_str(&fixture.read(path)).unwrap();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    let mut beyond = added[0].clone();
    (beyond["id"], beyond["content"]) = (json!(100_000), json!("<|beyond|>"));
    added.push(beyond);
    fixture.write(path, &tokenizer.to_string());
    let server = Server::start(&fixture, &[]);
    let (status, error) = server.refused("/embed", &json!({"inputs": "a <|beyond|>"}));
    assert_eq!((status, &error["error_type"]), (422, &json!("Validation")));
    server.ok("/embed", &json!({"inputs": "a"}));
}

#[test]
fn clients_that_send_too_much_are_told_so() {
    let fixture = Fixture::new();
    let server = Server::start(
        &fixture,
        &["--payload-limit", "1000", "--api-key", "secret"],
    );
    // More than the system buffers: the answer comes when all is sent.
    let body = json!({"inputs": "x".repeat(20_000_000)});
    let (status, _) = server.refused("/embed", &body);
    assert_eq!(status, 401);
    let request = server.agent.post(format!("{}/embed", server.url));
    let request = request.header("authorization", "Bearer secret");
    let mut response = request.send_json(body).unwrap();
    assert_eq!(response.status(), 413);
    let message = "20000018 bytes are more than the 1000 of --payload-limit";
    assert_eq!(json(&mut response)["error"], message);
}

#[test]
fn a_body_must_be_json() {
    let fixture = Fixture::new();
    let server = Server::start(&fixture, &[]);
    let deep = "[".repeat(100_000);
    for (kind, body, status) in [
        ("application/json", "{\"inputs\": ", 422),
        ("application/json", "", 422),
        ("application/json", &deep, 422),
        ("text/plain", "{\"inputs\": \"a\"}", 415),
    ] {
        let request = server.agent.post(format!("{}/embed", server.url));
        let mut response = request.content_type(kind).send(body).unwrap();
        assert_eq!(response.status(), status);
        assert_eq!(json(&mut response)["error_type"], "Validation");
    }
}

#[test]
fn a_key_is_needed_where_there_is_one() {
    let fixture = Fixture::new();
    let mut command = fixture.command(&["serve", "-m", "model", "--port", "0"]);
    command.env("RADIX_MLP_API_KEY", "secret");
    let server = Server::spawn(command);
    let embed = |key: Option<&str>| {
        let mut request = server.agent.post(format!("{}/embed", server.url));
        if let Some(key) = key {
            request = request.header("authorization", key);
        }
        request
            .send_json(json!({"inputs": "a"}))
            .unwrap()
            .status()
            .as_u16()
    };
    for wrong in [
        None,
        Some("Bearer secre"),
        Some("Bearer secret2"),
        Some("Basic secret"),
        Some("Bearer"),
        Some("secret"),
    ] {
        assert_eq!(embed(wrong), 401);
    }
    for scheme in ["Bearer", "bearer", "BEARER"] {
        assert_eq!(embed(Some(&format!("{scheme} secret"))), 200);
    }
    for route in ["/", "/embed", "/rerank", "/tokenize"] {
        let (status, error) = server.refused(route, &json!({}));
        assert_eq!(
            (status, &error["error_type"]),
            (401, &json!("Unauthorized"))
        );
    }
    let (status, error) = server.refused("/v1/embeddings", &json!({"input": "a"}));
    assert_eq!((status, &error["type"]), (401, &json!("Unauthorized")));
    let info = server.agent.get(format!("{}/info", server.url));
    assert_eq!(info.call().unwrap().status(), 401);
    // Whoever watches the server needs none, nor who reads how to use it.
    for open in ["/health", "/metrics", "/docs/", "/api-doc/openapi.json"] {
        server.get(open);
    }
}

#[test]
fn a_model_without_head_does_not_score() {
    let fixture = Fixture::new();
    let path = fixture.path("model/config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["tie_word_embeddings"] = json!(false);
    std::fs::write(&path, config.to_string()).unwrap();
    let server = Server::start(&fixture, &[]);
    server.ok("/embed", &json!({"inputs": "a"}));
    let (status, error) = server.refused("/rerank", &json!({"query": "q", "texts": ["a"]}));
    assert_eq!((status, &error["error_type"]), (422, &json!("Validation")));
    let error = fixture.fail(&["serve", "-m", "model", "--task", "rerank"]);
    assert!(error.contains("is no reranker"), "{error}");
}

#[test]
fn a_model_answers_what_it_was_trained_for() {
    let fixture = Fixture::new();
    let rerank = json!({"query": "q", "texts": ["a"]});
    let embed = json!({"inputs": "a"});
    let kinds = |server: &Server| -> Vec<String> {
        let info: Value = serde_json::from_str(&server.get("/info")).unwrap();
        info["model_type"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect()
    };
    let both = Server::start(&fixture, &[]);
    assert_eq!(kinds(&both), ["embedding", "reranker"]);
    both.ok("/rerank", &rerank);

    let scores = Server::start(&fixture, &["--task", "rerank"]);
    assert_eq!(kinds(&scores), ["reranker"]);
    scores.ok("/rerank", &rerank);
    assert_eq!(scores.refused("/embed", &embed).0, 422);
    assert_eq!(
        scores.refused("/v1/embeddings", &json!({"input": "a"})).0,
        422
    );

    let saved = "model/config_sentence_transformers.json";
    fixture.write(saved, r#"{"model_type": "CrossEncoder"}"#);
    assert_eq!(kinds(&Server::start(&fixture, &[])), ["reranker"]);
    std::fs::remove_file(fixture.path(saved)).unwrap();

    std::fs::create_dir(fixture.path("model/1_Pooling")).unwrap();
    fixture.write(
        "model/1_Pooling/config.json",
        r#"{"pooling_mode": "lasttoken"}"#,
    );
    let embeddings = Server::start(&fixture, &[]);
    assert_eq!(kinds(&embeddings), ["embedding"]);
    embeddings.ok("/embed", &embed);
    let (status, error) = embeddings.refused("/rerank", &rerank);
    assert_eq!((status, &error["error_type"]), (422, &json!("Validation")));
    Server::start(&fixture, &["--task", "any"]).ok("/rerank", &rerank);
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let fixture = Fixture::new();
    for options in [
        ["--radix-mlp-threshold", "1.5"],
        ["--radix-mlp-threshold", "x"],
        ["--max-batch-tokens", "0"],
        ["--max-client-batch-size", "70000"],
        ["--request-timeout", "0"],
        ["--host", "nowhere"],
        ["--api-key", ""],
        ["--task", "translate"],
    ] {
        // Taken, they would end with another code, for there is no such model.
        let output = fixture.run(&[&["serve", "-m", "absent"], &options[..]].concat());
        assert_eq!(output.status.code(), Some(2), "{options:?}");
    }
    let error = fixture.fail(&["serve", "-m", "absent"]);
    assert!(error.contains("absent"), "{error}");
    let server = Server::start(&fixture, &[]);
    let port = server.address().rsplit(':').next().unwrap();
    let error = fixture.fail(&["serve", "-m", "model", "--port", port]);
    assert!(
        error.contains(&format!("cannot listen on 127.0.0.1:{port}")),
        "{error}"
    );
}
