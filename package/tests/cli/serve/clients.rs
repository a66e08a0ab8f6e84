//! The public Python clients of text-embeddings-inference and OpenAI.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::super::fixtures::Fixture;
use super::{Server, python};

#[test]
fn public_clients_get_what_they_expect() {
    let Some(python) = python() else { return };
    let fixture = Fixture::new();
    let prompts = r#"{"prompts": {"query": "find: "}}"#;
    fixture.write("model/config_sentence_transformers.json", prompts);
    let server = Server::start(&fixture, &["--api-key", "secret"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/serve/clients.py");
    let output = Command::new(python)
        .arg(script)
        .args([&server.url, "secret"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
}

#[test]
fn pooling_that_sentence_transformers_saved_is_read() {
    let Some(python) = python() else { return };
    let fixture = Fixture::new();
    let modes = ["mean", "cls", "lasttoken"];
    let save = "import sys; from sentence_transformers.sentence_transformer.modules import Pooling; \
                [Pooling(32, pooling_mode=mode).save(mode) for mode in sys.argv[1:]]";
    for mode in modes {
        std::fs::create_dir(fixture.path(mode)).unwrap();
    }
    let mut command = Command::new(python);
    let command = command.current_dir(fixture.directory.path());
    let output = command.args(["-c", save]).args(modes).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    for (saved, read) in modes.into_iter().zip(["mean", "cls", "last_token"]) {
        let pooling = fixture.path("model/1_Pooling");
        std::fs::rename(fixture.path(saved), &pooling).unwrap();
        let server = Server::start(&fixture, &[]);
        let info: Value = serde_json::from_str(&server.get("/info")).unwrap();
        assert_eq!(info["model_type"]["embedding"]["pooling"], read);
        std::fs::remove_dir_all(pooling).unwrap();
    }
}

#[test]
fn several_poolings_at_once_are_refused() {
    let fixture = Fixture::new();
    std::fs::create_dir(fixture.path("model/1_Pooling")).unwrap();
    for several in [
        r#"{"pooling_mode": ["mean", "cls"]}"#,
        r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#,
        r#"{"pooling_mode": "max"}"#,
    ] {
        fixture.write("model/1_Pooling/config.json", several);
        let error = fixture.fail(&["serve", "-m", "model", "--port", "0"]);
        assert!(error.contains("give --pooling"), "{error}");
    }
}
