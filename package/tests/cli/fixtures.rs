//! A tiny model directory, and the command run on it.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use candle_core::{Device, Tensor};
use radix_mlp::Fold;
use radix_mlp::qwen3::{FoldLevel, Pooling, Qwen3Model, normalize};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

pub const HIDDEN: usize = 32;
const INTERMEDIATE: usize = 48;
const HEAD_DIM: usize = 8;
const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2;
const LAYERS: usize = 2;
/// The longest sequence, in tokens.
pub const CONTEXT: usize = 600;

/// A directory with a model in `model/` and whatever a test puts beside it.
pub struct Fixture {
    pub directory: TempDir,
}

impl Fixture {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let model = directory.path().join("model");
        std::fs::create_dir(&model).unwrap();
        let vocab_size = write_tokenizer(&model);
        write_config(&model, vocab_size);
        write_weights(&model, vocab_size);
        Self { directory }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// Names of what lies beside the model, sorted.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.unwrap().file_name().into_string().unwrap()
        };
        let mut names: Vec<String> = entries.map(name).filter(|name| name != "model").collect();
        names.sort();
        names
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_radix-mlp"));
        command.current_dir(self.directory.path()).args(arguments);
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs what must succeed, and returns its standard output.
    pub fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            stderr(&output)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs what must fail, and returns what it says.
    pub fn fail(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        stderr(&output)
    }

    pub fn pipe(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = self.command(arguments);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(input.as_bytes())
            .unwrap();
        child.wait_with_output().unwrap()
    }

    pub fn model(&self) -> Qwen3Model {
        Qwen3Model::load(&self.path("model"), None, &Device::Cpu).unwrap()
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Tokens as the fixture's tokenizer makes them: bytes, then the end token.
pub fn tokens(text: &str) -> Vec<u32> {
    let mut tokens: Vec<u32> = text
        .bytes()
        .map(|symbol| {
            // Printable ASCII stands for itself in the byte-level alphabet.
            byte(match symbol {
                b' ' => 'Ġ',
                b'\n' => 'Ċ',
                symbol => char::from(symbol),
            })
        })
        .collect();
    tokens.push(alphabet().len() as u32);
    tokens
}

/// The token of a byte, as the byte-level alphabet spells it.
pub fn byte(symbol: char) -> u32 {
    alphabet().iter().position(|&c| c == symbol).unwrap() as u32
}

/// The embedding of one text, computed alone and unfolded.
pub fn embed_alone(model: &Qwen3Model, tokens: &[u32], pooling: Pooling) -> Vec<f32> {
    let states = |fold| model.forward(fold, FoldLevel::None).unwrap();
    let fold = fold(tokens);
    let pooled = normalize(&states(&fold).pool(pooling).unwrap()).unwrap();
    pooled.to_vec2().unwrap().remove(0)
}

pub fn fold(tokens: &[u32]) -> Fold {
    let positions: Vec<u32> = (0..tokens.len() as u32).collect();
    let ends = [0, tokens.len() as u32];
    Fold::builder(tokens, &positions, &ends).build().unwrap()
}

/// Sums in another order: the same number to 1e-5 where vectors have length 1.
pub fn assert_close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 1e-5, "{a} is not {b}");
    }
}

fn alphabet() -> Vec<char> {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    alphabet
}

/// What Qwen's tokenizers split at: theirs alone tokenize once what texts share.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Bytes as tokens, then the end token, "yes" and "no". Returns the size of the vocabulary.
fn write_tokenizer(model: &Path) -> usize {
    let symbols = alphabet().into_iter().map(String::from);
    let end = "<|endoftext|>";
    let words = [end, "yes", "no"].map(str::to_owned);
    let vocabulary: HashMap<String, usize> = symbols.chain(words).zip(0..).collect();
    let (size, id) = (vocabulary.len(), vocabulary[end]);
    let split = json!({"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": false});
    let byte_level = |kind: &str| json!({"type": kind, "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{"id": id, "content": end, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level("ByteLevel")]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": end, "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {end: {"id": end, "ids": [id], "tokens": [end]}},
        },
        "decoder": byte_level("ByteLevel"),
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary, "merges": []},
    });
    write_json(&model.join("tokenizer.json"), &tokenizer);
    size
}

fn write_config(model: &Path, vocab_size: usize) {
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": Q_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "hidden_act": "silu",
    });
    write_json(&model.join("config.json"), &config);
}

fn write_json(path: &Path, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

fn write_weights(model: &Path, vocab_size: usize) {
    let mut tensors = HashMap::new();
    let mut state = 1u64;
    let mut add = |name: String, shape: &[usize], mean: f32| {
        let mut next = || {
            // The generator of Knuth's MMIX; its upper bits are good enough for weights.
            state = state.wrapping_mul(6_364_136_223_846_793_005);
            state = state.wrapping_add(1_442_695_040_888_963_407);
            mean + ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.6
        };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
        tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    };
    let (q, kv) = (Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    add(
        "model.embed_tokens.weight".into(),
        &[vocab_size, HIDDEN],
        0.0,
    );
    add("model.norm.weight".into(), &[HIDDEN], 1.0);
    for layer in 0..LAYERS {
        let mut matrix = |name: &str, rows, columns| {
            add(
                format!("model.layers.{layer}.{name}.weight"),
                &[rows, columns],
                0.0,
            );
        };
        matrix("self_attn.q_proj", q, HIDDEN);
        matrix("self_attn.k_proj", kv, HIDDEN);
        matrix("self_attn.v_proj", kv, HIDDEN);
        matrix("self_attn.o_proj", HIDDEN, q);
        matrix("mlp.gate_proj", INTERMEDIATE, HIDDEN);
        matrix("mlp.up_proj", INTERMEDIATE, HIDDEN);
        matrix("mlp.down_proj", HIDDEN, INTERMEDIATE);
        for (norm, width) in [
            ("input_layernorm", HIDDEN),
            ("post_attention_layernorm", HIDDEN),
            ("self_attn.q_norm", HEAD_DIM),
            ("self_attn.k_norm", HEAD_DIM),
        ] {
            add(format!("model.layers.{layer}.{norm}.weight"), &[width], 1.0);
        }
    }
    candle_core::safetensors::save(&tensors, model.join("model.safetensors")).unwrap();
}
