//! Times forward passes for `benchmark/cpu_forward/run.py` and `benchmark/gpu_kernels/measure.py`.
//!
//! `forward MODEL BATCHES [cuda]`: loads a model's directory, or makes a model of random weights where it has a `config.json`
//! alone, and a JSON object of batches (name to sequences of token ids). On the CPU in f32, on CUDA in bf16. For each line of
//! a name, a tab and a level (`none`, `mlp`, `full`) on standard input it folds the batch, runs it and pools the last tokens,
//! and answers with one JSON line.

use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device};
use radix_mlp::qwen3::{FoldLevel, ModelError, Pooling, Qwen3Config, Qwen3Model};
use radix_mlp::{Fold, Layout};
use serde_json::json;

type Batch = Vec<Vec<u32>>;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let (model, batches, device, dtype) = match &arguments[..] {
        [model, batches] => (model, batches, Device::Cpu, DType::F32),
        #[cfg(feature = "cuda")]
        [model, batches, device] if device == "cuda" => {
            let device = radix_mlp_kernels::cuda_device(0)?;
            (model, batches, device, DType::BF16)
        }
        _ => return Err("usage: forward MODEL BATCHES [cuda]".into()),
    };
    let model = load(Path::new(model), dtype, &device)?;
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

fn load(directory: &Path, dtype: DType, device: &Device) -> Result<Qwen3Model, ModelError> {
    match Qwen3Model::load(directory, Some(dtype), device) {
        Err(ModelError::NoWeights { .. }) => {
            let config = Qwen3Config::from_file(&directory.join("config.json"))?;
            Qwen3Model::random(&config, 0, dtype, device)
        }
        loaded => loaded,
    }
}

fn run(model: &Qwen3Model, batch: &Batch, level: FoldLevel) -> Result<String, Box<dyn Error>> {
    let start = Instant::now();
    let input_ids = batch.concat();
    let mut cu_seq_lengths = vec![0];
    for sequence in batch {
        cu_seq_lengths.push(cu_seq_lengths[cu_seq_lengths.len() - 1] + sequence.len() as u32);
    }
    let builder = Fold::counted(&input_ids, &cu_seq_lengths);
    let fold = builder.layout(Layout::DepthFirst).build()?;
    let folded = start.elapsed().as_secs_f64();
    let states = model.forward(&fold, level)?;
    // On CUDA everything is enqueued by now, and little of it done.
    let enqueued = start.elapsed().as_secs_f64();
    let embeddings = states.pool(Pooling::LastToken)?.to_vec2::<f32>()?;
    let seconds = start.elapsed().as_secs_f64();
    let answer = json!({
        "seconds": seconds,
        "fold_seconds": folded,
        "enqueued_seconds": enqueued,
        "tokens": fold.num_tokens(),
        "nodes": fold.num_nodes(),
        "chosen": format!("{:?}", model.choose_level(&fold)).to_lowercase(),
        "embeddings": embeddings,
    });
    Ok(answer.to_string())
}
