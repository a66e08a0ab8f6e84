//! Flags, and the environment variables that stand for them.

use serde_json::{Value, json};

use super::super::fixtures::{CONTEXT, Fixture};
use super::{Server, header};

/// What options change, as clients see it.
fn observe(server: &Server) -> Value {
    let mut info = server
        .agent
        .get(format!("{}/info", server.url))
        .call()
        .unwrap();
    let info: Value = info.body_mut().read_json().unwrap();
    let status = |body: Value| server.post("/embed", &body).status().as_u16();
    let pair = server.post("/embed", &json!({"inputs": ["abcd", "abce"]}));
    let answered = pair.status() == 200;
    json!({
        "host": server.address().split(':').next(),
        "info": info,
        "long text": status(json!({"inputs": "x".repeat(CONTEXT)})),
        "long body": status(json!({"inputs": "", "prompt_name": "x".repeat(1000)})),
        "folded": answered.then(|| header(&pair, "x-folded-tokens")),
        "waited": answered.then(|| header(&pair, "x-queue-time") >= 300),
    })
}

#[test]
fn flags_and_environment_variables_do_the_same() {
    let fixture = Fixture::new();
    let default = observe(&Server::start(&fixture, &[]));
    for (name, value) in [
        ("host", "127.0.0.2"),
        ("dtype", "bf16"),
        ("threads", "7"),
        ("max-batch-tokens", "99"),
        ("max-concurrent-requests", "7"),
        ("max-client-batch-size", "2"),
        ("auto-truncate", "1"),
        ("pooling", "mean"),
        ("task", "embed"),
        ("api-key", "secret"),
        ("fold", "none"),
        ("radix-mlp-threshold", "0"),
        ("batch-window", "300"),
        ("payload-limit", "900"),
    ] {
        let flag = format!("--{name}");
        let by_flag = match name {
            "auto-truncate" => Server::start(&fixture, &[&flag]),
            _ => Server::start(&fixture, &[&flag, value]),
        };
        let variable = match name {
            "radix-mlp-threshold" => "RADIX_MLP_THRESHOLD".to_owned(),
            _ => format!("RADIX_MLP_{}", name.replace('-', "_").to_uppercase()),
        };
        let mut command = fixture.command(&["serve", "-m", "model", "--port", "0"]);
        command.env(variable, value);
        let by_variable = Server::spawn(command);
        let seen = observe(&by_flag);
        assert_ne!(seen, default, "{name} changes nothing");
        assert_eq!(seen, observe(&by_variable), "{name}");
    }
}

#[test]
fn a_server_needs_no_flag() {
    let fixture = Fixture::new();
    let mut command = fixture.command(&["serve"]);
    let command_line = [("MODEL", "model"), ("PORT", "0"), ("DEVICE", "cpu")];
    command.envs(command_line.map(|(name, value)| (format!("RADIX_MLP_{name}"), value)));
    let server = Server::spawn(command);
    assert!(!server.address().ends_with(":3000"));
    server.ok("/embed", &json!({"inputs": "a"}));
}

#[test]
fn switches_of_the_environment_are_words_or_numbers() {
    let fixture = Fixture::new();
    for (value, status) in [
        ("1", 200),
        ("true", 200),
        ("on", 200),
        ("0", 422),
        ("false", 422),
    ] {
        let mut command = fixture.command(&["serve", "-m", "model", "--port", "0"]);
        command.env("RADIX_MLP_AUTO_TRUNCATE", value);
        let server = Server::spawn(command);
        let body = json!({"inputs": "x".repeat(CONTEXT)});
        assert_eq!(server.post("/embed", &body).status(), status, "{value}");
    }
}
