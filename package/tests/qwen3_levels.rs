//! The fold levels agree with each other, on random tries and on models of random weights.
#![cfg(feature = "candle")]

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use radix_mlp::qwen3::{FoldLevel, ModelError, Pooling, Qwen3Config, Qwen3Model};
use radix_mlp::{Fold, Layout};
use serde_json::Value;
use tokenizers::Tokenizer;

/// Of states of magnitude 1 to 10: the products of other row counts sum in another order.
const TOLERANCE: f32 = 2e-5;

fn config() -> Qwen3Config {
    Qwen3Config {
        vocab_size: 64,
        hidden_size: 32,
        intermediate_size: 80,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 128,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_factor: 1.0,
        attention_bias: true,
        tie_word_embeddings: false,
    }
}

fn model() -> Qwen3Model {
    Qwen3Model::random(&config(), 1, DType::F32, &Device::Cpu).unwrap()
}

#[derive(Clone, Debug)]
struct Batch {
    input_ids: Vec<u32>,
    position_ids: Vec<u32>,
    cu_seq_lengths: Vec<u32>,
    salts: Vec<u64>,
}

impl Batch {
    fn new(sequences: Vec<(Vec<u32>, u32, u64)>) -> Self {
        let mut batch = Self {
            input_ids: Vec::new(),
            position_ids: Vec::new(),
            cu_seq_lengths: vec![0],
            salts: Vec::new(),
        };
        for (tokens, first_position, salt) in sequences {
            let positions = first_position..first_position + tokens.len() as u32;
            batch.position_ids.extend(positions);
            batch.input_ids.extend(tokens);
            batch.cu_seq_lengths.push(batch.input_ids.len() as u32);
            batch.salts.push(salt);
        }
        batch
    }

    fn fold(&self, layout: Layout, pad: usize) -> Fold {
        Fold::builder(&self.input_ids, &self.position_ids, &self.cu_seq_lengths)
            .layout(layout)
            .pad_multiple_of(pad)
            .salts(&self.salts)
            .build()
            .unwrap()
    }
}

/// Up to 10 sequences over 3 token ids, with two first positions and two salts; some are empty.
fn batches() -> impl Strategy<Value = Batch> {
    let tokens = prop::collection::vec(0..3u32, 0..30);
    let sequence = (tokens, prop::sample::select(vec![0, 5]), 0..2u64);
    prop::collection::vec(sequence, 0..10).prop_map(Batch::new)
}

/// The largest; NaN where there is one, which candle's `max` forgets.
fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.shape(), b.shape());
    let differences = (a - b).unwrap().flatten_all().unwrap();
    let differences = differences.to_vec1::<f32>().unwrap();
    differences
        .into_iter()
        .map(f32::abs)
        .max_by(f32::total_cmp)
        .unwrap_or(0.0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn levels_and_layouts_agree(batch in batches(), pad in 1..9usize) {
        let model = model();
        let reference = batch.fold(Layout::FirstOccurrence, 1);
        let reference = model.forward(&reference, FoldLevel::None).unwrap().unfold().unwrap();
        for layout in [Layout::FirstOccurrence, Layout::DepthFirst] {
            let fold = batch.fold(layout, pad);
            for level in [FoldLevel::None, FoldLevel::Mlp, FoldLevel::Full] {
                let states = model.forward(&fold, level).unwrap().unfold().unwrap();
                let difference = difference(&states, &reference);
                prop_assert!(difference <= TOLERANCE, "{layout:?} {level:?}: {difference:e}");
            }
        }
    }

    #[test]
    fn a_sequence_alone_is_what_it_is_in_a_batch(batch in batches()) {
        let model = model();
        let fold = batch.fold(Layout::FirstOccurrence, 1);
        let states = model.forward(&fold, FoldLevel::Full).unwrap().unfold().unwrap();
        for ends in batch.cu_seq_lengths.windows(2) {
            let (start, end) = (ends[0] as usize, ends[1] as usize);
            let (input_ids, position_ids) = (&batch.input_ids[start..end], &batch.position_ids[start..end]);
            let offsets = [0, ends[1] - ends[0]];
            let alone = Fold::builder(input_ids, position_ids, &offsets).build().unwrap();
            let alone = model.forward(&alone, FoldLevel::None).unwrap().unfold().unwrap();
            let together = states.narrow(0, start, end - start).unwrap();
            prop_assert!(difference(&alone, &together) <= TOLERANCE);
        }
    }
}

/// One group of each file as `../shared/data/render.py` reads it, the first 24 sequences cut to 200
/// tokens.
#[test]
fn levels_agree_on_real_batches() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let Ok(tokenizer) = Tokenizer::from_file(data.join("qwen3-tokenizer/tokenizer.json")) else {
        return println!("skipped: no real batches in {}", data.display());
    };
    let config = Qwen3Config {
        vocab_size: 151_936,
        max_position_embeddings: 200,
        ..config()
    };
    let model = Qwen3Model::random(&config, 1, DType::F32, &Device::Cpu).unwrap();
    for file in ["fewshot_bbh_cot", "rerank_noveleval"] {
        let lines = std::fs::read_to_string(data.join(format!("{file}.dev.jsonl"))).unwrap();
        let group: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let texts: Vec<String> = match &group["inputs"] {
            Value::Array(inputs) => inputs
                .iter()
                .map(|x| text(&group["prefix"]) + &text(x))
                .collect(),
            _ => {
                let passages = group["passages"].as_array().unwrap().iter();
                passages
                    .map(|x| text(&group["query"]) + "\n" + &text(&x["text"]))
                    .collect()
            }
        };
        let sequence = |text: &String| {
            let mut ids = tokenizer
                .encode(text.as_str(), false)
                .unwrap()
                .get_ids()
                .to_vec();
            ids.truncate(200);
            (ids, 0, 0)
        };
        let batch = Batch::new(texts.iter().take(24).map(sequence).collect());
        let fold = batch.fold(Layout::FirstOccurrence, 1);
        assert!(fold.compression() > 1.0);
        let reference = model
            .forward(&fold, FoldLevel::None)
            .unwrap()
            .unfold()
            .unwrap();
        for layout in [Layout::FirstOccurrence, Layout::DepthFirst] {
            let fold = batch.fold(layout, 64);
            for level in [FoldLevel::Mlp, FoldLevel::Full] {
                let states = model.forward(&fold, level).unwrap().unfold().unwrap();
                let difference = difference(&states, &reference);
                assert!(
                    difference <= TOLERANCE,
                    "{file} {layout:?} {level:?}: {difference:e}"
                );
            }
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    let batch = Batch::new(vec![(vec![1, 2, 3], 0, 0)]);
    let fold = batch.fold(Layout::FirstOccurrence, 1);
    let states = |seed| {
        let model = Qwen3Model::random(&config(), seed, DType::F32, &Device::Cpu).unwrap();
        let states = model
            .forward(&fold, FoldLevel::Full)
            .unwrap()
            .unfold()
            .unwrap();
        states.to_vec2::<f32>().unwrap()
    };
    assert_eq!(states(4), states(4));
    assert_ne!(states(4), states(5));
}

#[test]
fn a_shared_batch_is_folded_and_an_unshared_one_is_not() {
    let model = model();
    let choose = |sequences: Vec<Vec<u32>>| {
        let sequences = sequences.into_iter().map(|tokens| (tokens, 0, 0)).collect();
        model.choose_level(&Batch::new(sequences).fold(Layout::FirstOccurrence, 1))
    };
    assert_eq!(choose(vec![vec![1; 50]; 4]), FoldLevel::Full);
    assert_eq!(
        choose((0..4).map(|i| vec![i; 50]).collect()),
        FoldLevel::None
    );
    assert_eq!(choose(Vec::new()), FoldLevel::None);
}

#[test]
fn what_the_model_has_not_is_an_error() {
    let model = model();
    let forward = |tokens: Vec<u32>, position| {
        let fold = Batch::new(vec![(tokens, position, 0)]).fold(Layout::FirstOccurrence, 1);
        model
            .forward(&fold, FoldLevel::Full)
            .map(|states| states.unfold().unwrap())
    };
    assert!(matches!(
        forward(vec![1, 64], 0),
        Err(ModelError::TokenId {
            id: 64,
            vocab_size: 64
        })
    ));
    assert!(matches!(
        forward(vec![1, 2], 127),
        Err(ModelError::Position {
            position: 128,
            max_position_embeddings: 128
        })
    ));

    let batch = Batch::new(vec![(vec![1], 0, 0), (vec![], 0, 0)]);
    let fold = batch.fold(Layout::FirstOccurrence, 1);
    let states = model.forward(&fold, FoldLevel::Full).unwrap();
    for pooling in [Pooling::LastToken, Pooling::Mean, Pooling::Cls] {
        assert!(matches!(
            states.pool(pooling),
            Err(ModelError::EmptySequence { sequence: 1 })
        ));
    }
    assert!(matches!(
        model.yes_probabilities(&states, 1, 64),
        Err(ModelError::TokenId { id: 64, .. })
    ));
}
