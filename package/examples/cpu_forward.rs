//! Times forward passes for `benchmark/cpu_forward/run.py`.
//!
//! `cpu_forward MODEL BATCHES`: loads a model's directory and a JSON object of batches (name to
//! sequences of token ids). For each line of a name, a tab and a level (`none`, `mlp`, `full`) on
//! standard input it folds the batch, runs it and pools the last tokens, and answers with one JSON
//! line.

use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use candle_core::Device;
use radix_mlp::Fold;
use radix_mlp::qwen3::{FoldLevel, Pooling, Qwen3Model};
use serde_json::json;

type Batch = Vec<Vec<u32>>;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [model, batches] = &arguments[..] else {
        return Err("usage: cpu_forward MODEL BATCHES".into());
    };
    let model = Qwen3Model::load(Path::new(model), None, &Device::Cpu)?;
    let batches: HashMap<String, Batch> = serde_json::from_slice(&std::fs::read(batches)?)?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (name, level) = line.split_once('\t').ok_or("expected NAME, a tab, LEVEL")?;
        let level = match level {
            "none" => FoldLevel::None,
            "mlp" => FoldLevel::Mlp,
            "full" => FoldLevel::Full,
            _ => return Err(format!("unknown level {level}").into()),
        };
        let batch = batches.get(name).ok_or("unknown batch")?;
        println!("{}", run(&model, batch, level)?);
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn run(model: &Qwen3Model, batch: &Batch, level: FoldLevel) -> Result<String, Box<dyn Error>> {
    let start = Instant::now();
    let input_ids = batch.concat();
    let position_ids: Vec<u32> = batch.iter().flat_map(|seq| 0..seq.len() as u32).collect();
    let mut cu_seq_lengths = vec![0];
    for sequence in batch {
        cu_seq_lengths.push(cu_seq_lengths[cu_seq_lengths.len() - 1] + sequence.len() as u32);
    }
    let fold = Fold::builder(&input_ids, &position_ids, &cu_seq_lengths).build()?;
    let embeddings = model.forward(&fold, level)?.pool(Pooling::LastToken)?;
    let seconds = start.elapsed().as_secs_f64();
    let answer = json!({
        "seconds": seconds,
        "tokens": fold.num_tokens(),
        "nodes": fold.num_nodes(),
        "chosen": format!("{:?}", model.choose_level(&fold)).to_lowercase(),
        "embeddings": embeddings.to_vec2::<f32>()?,
    });
    Ok(answer.to_string())
}
