//! The public Python clients of text-embeddings-inference and OpenAI.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::fixtures::Fixture;
use super::Server;

#[test]
fn public_clients_get_what_they_expect() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let default = package.join("../.venv/bin/python");
    let python = std::env::var_os("RADIX_MLP_PYTHON").map_or(default, PathBuf::from);
    if !python.exists() {
        println!("skipped: no {} (set RADIX_MLP_PYTHON)", python.display());
        return;
    }
    let fixture = Fixture::new();
    let prompts = r#"{"prompts": {"query": "find: "}}"#;
    fixture.write("model/config_sentence_transformers.json", prompts);
    let server = Server::start(&fixture, &["--api-key", "secret"]);
    let script = package.join("tests/cli/serve/clients.py");
    let output = Command::new(python)
        .arg(script)
        .args([&server.url, "secret"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
}
