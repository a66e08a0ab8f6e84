//! What cannot be loaded says why.
#![cfg(feature = "candle")]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use radix_mlp::qwen3::{ModelError, Qwen3Config, Qwen3Model, truncate_dimensions};
use serde_json::{Value, json};

fn config() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
        "vocab_size": 5, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": true,
        "use_sliding_window": false, "sliding_window": null,
    })
}

fn tensors() -> HashMap<String, Tensor> {
    let layer = "model.layers.0";
    let shapes = [
        ("model.embed_tokens.weight".to_owned(), vec![5, 4]),
        ("model.norm.weight".to_owned(), vec![4]),
        (format!("{layer}.input_layernorm.weight"), vec![4]),
        (format!("{layer}.post_attention_layernorm.weight"), vec![4]),
        (format!("{layer}.self_attn.q_proj.weight"), vec![4, 4]),
        (format!("{layer}.self_attn.k_proj.weight"), vec![2, 4]),
        (format!("{layer}.self_attn.v_proj.weight"), vec![2, 4]),
        (format!("{layer}.self_attn.o_proj.weight"), vec![4, 4]),
        (format!("{layer}.self_attn.q_norm.weight"), vec![2]),
        (format!("{layer}.self_attn.k_norm.weight"), vec![2]),
        (format!("{layer}.mlp.gate_proj.weight"), vec![6, 4]),
        (format!("{layer}.mlp.up_proj.weight"), vec![6, 4]),
        (format!("{layer}.mlp.down_proj.weight"), vec![4, 6]),
    ];
    let tensor = |shape| Tensor::ones::<Vec<usize>>(shape, DType::F32, &Device::Cpu).unwrap();
    shapes
        .into_iter()
        .map(|(name, shape)| (name, tensor(shape)))
        .collect()
}

fn directory(test: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("qwen3_errors")
        .join(test);
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).unwrap();
    directory
}

fn parse(test: &str, changes: Value) -> Result<Qwen3Config, ModelError> {
    let mut config = config();
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    let path = directory(test).join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    Qwen3Config::from_file(&path)
}

fn load(test: &str, tensors: &HashMap<String, Tensor>) -> Result<Qwen3Model, ModelError> {
    let directory = directory(test);
    fs::write(directory.join("config.json"), config().to_string()).unwrap();
    candle_core::safetensors::save(tensors, directory.join("model.safetensors")).unwrap();
    Qwen3Model::load(&directory, None, &Device::Cpu)
}

/// The message of what has to fail.
fn message<T>(result: Result<T, ModelError>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn configurations_that_are_not_covered() {
    for (changes, expected) in [
        (
            json!({"architectures": ["Qwen2ForCausalLM"]}),
            "unsupported architecture \"Qwen2ForCausalLM\"",
        ),
        (
            json!({"architectures": null, "model_type": "llama"}),
            "unsupported architecture \"llama\"",
        ),
        (
            json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 0}),
            "sliding-window attention is not supported (sliding_window Some(8))",
        ),
        (
            json!({"layer_types": ["sliding_attention"]}),
            "sliding-window attention is not supported",
        ),
        (
            json!({"is_causal": false}),
            "bidirectional attention cannot be folded (is_causal)",
        ),
        (
            json!({"use_bidirectional_attention": true}),
            "bidirectional attention cannot be folded",
        ),
        (
            json!({"hidden_act": "gelu"}),
            "unsupported activation \"gelu\"",
        ),
        (
            json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}),
            "unsupported RoPE type \"yarn\"",
        ),
        (
            json!({"rope_parameters": {"rope_type": "llama3"}}),
            "unsupported RoPE type \"llama3\"",
        ),
        (
            json!({"rope_parameters": {"rope_type": "linear"}}),
            "rope_parameters.factor is absent",
        ),
        (
            json!({"num_key_value_heads": 3}),
            "num_key_value_heads is 3",
        ),
        (json!({"head_dim": 3}), "head_dim is 3, expected even"),
        (json!({"hidden_size": 0}), "hidden_size is 0"),
        (
            json!({"num_attention_heads": 0}),
            "num_attention_heads is 0",
        ),
        (
            json!({"vocab_size": 1u64 << 33}),
            "vocab_size is 8589934592",
        ),
        (
            json!({"head_dim": 4294967294u64, "num_attention_heads": 4294967295u64}),
            "the weights overflow",
        ),
        (json!({"rms_norm_eps": -1.0}), "rms_norm_eps is -1"),
        (json!({"hidden_size": "wide"}), "cannot parse"),
    ] {
        let message = message(parse("configurations", changes.clone()));
        assert!(message.contains(expected), "{changes}: {message}");
    }
}

#[test]
fn configurations_that_are() {
    let base = parse("accepted", json!({})).unwrap();
    assert_eq!(
        (base.head_dim, base.rope_theta, base.rope_factor),
        (2, 1e4, 1.0)
    );
    let new_rope = json!({"rope_theta": null, "rope_parameters": {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0}});
    let config = parse("accepted", new_rope).unwrap();
    assert_eq!((config.rope_theta, config.rope_factor), (5.0, 2.0));
    assert_eq!(
        parse("accepted", json!({"architectures": null})).unwrap(),
        base
    );
    assert_eq!(
        parse("accepted", json!({"architectures": ["Qwen3Model"]})).unwrap(),
        base
    );
    // No layer is far enough up to slide.
    let window = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1});
    assert_eq!(parse("accepted", window).unwrap(), base);
}

#[test]
fn files_that_are_missing_or_damaged() {
    let directory = directory("files");
    let load = || message(Qwen3Model::load(&directory, None, &Device::Cpu));
    assert!(load().contains("cannot read") && load().contains("config.json"));
    fs::write(directory.join("config.json"), config().to_string()).unwrap();
    assert!(load().contains("no model.safetensors and no model.safetensors.index.json"));
    let index = directory.join("model.safetensors.index.json");
    fs::write(&index, "{}").unwrap();
    assert!(load().contains("cannot parse"));
    fs::write(
        &index,
        json!({"weight_map": {"a": "shard.safetensors"}}).to_string(),
    )
    .unwrap();
    assert!(load().contains("cannot read") && load().contains("shard.safetensors"));
    fs::write(directory.join("model.safetensors"), "damaged").unwrap();
    assert!(load().contains("cannot parse"));
}

#[test]
fn tensors_that_do_not_fit() {
    assert!(load("complete", &tensors()).is_ok());

    let mut changed = tensors();
    changed.remove("model.layers.0.self_attn.k_norm.weight");
    assert_eq!(
        message(load("missing", &changed)),
        "the weights have no tensor \"model.layers.0.self_attn.k_norm.weight\""
    );

    let mut changed = tensors();
    let transposed = changed["model.layers.0.mlp.up_proj.weight"]
        .t()
        .unwrap()
        .contiguous();
    changed.insert(
        "model.layers.0.mlp.up_proj.weight".to_owned(),
        transposed.unwrap(),
    );
    assert_eq!(
        message(load("shape", &changed)),
        "tensor \"model.layers.0.mlp.up_proj.weight\" has shape [4, 6], expected [6, 4]"
    );

    let mut changed = tensors();
    let integers = changed["model.norm.weight"].to_dtype(DType::U32).unwrap();
    changed.insert("model.norm.weight".to_owned(), integers);
    let message = message(load("dtype", &changed));
    assert!(
        message.contains("model.norm.weight has dtype U32"),
        "{message}"
    );

    let integers = Qwen3Model::load(&directory("no"), Some(DType::U8), &Device::Cpu);
    assert!(matches!(
        integers,
        Err(ModelError::Dtype {
            dtype: DType::U8,
            ..
        })
    ));
}

#[test]
fn dimensions_that_an_embedding_has_not() {
    let embeddings = Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap();
    for dimensions in [0, 5] {
        let error = truncate_dimensions(&embeddings, dimensions);
        assert!(matches!(
            error,
            Err(ModelError::Dimensions { hidden_size: 4, .. })
        ));
    }
    assert_eq!(truncate_dimensions(&embeddings, 3).unwrap().dims(), [2, 3]);
}
