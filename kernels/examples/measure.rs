//! Times operations on a CUDA device for `benchmark/gpu_kernels/measure.py`.
//!
//! `measure BATCHES`: reads a JSON object of batches (name to sequences of token ids), then a JSON request a line on standard
//! input, and answers each with `{"ms": …}` a line: what one call takes of several enqueued at once.
//!
//! - `{"op": "rows", "way": "ours" | "candle", "shape": […], "ids": n, "dtype": "f32"}`: rows by random index;
//! - `{"op": "attention", "batch": name, "level": "none" | "full", "heads": n, "kv_heads": n, "head_dim": n}`: of the
//!   batch in bf16, folded or not.

use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use radix_mlp::{Fold, Layout};
use radix_mlp_kernels::{
    Ids, KEY_BLOCK, Lists, PathLists, TreeMask, cuda_device, index_select, query_block,
    tree_attention,
};
use serde::Deserialize;
use serde_json::json;

/// For which calls are repeated, and how often at most.
const LONG_ENOUGH: Duration = Duration::from_millis(20);
const MOST_CALLS: u32 = 200;

type Batch = Vec<Vec<u32>>;
type Outcome<T> = Result<T, Box<dyn Error>>;

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Request {
    Rows {
        way: String,
        shape: Vec<usize>,
        ids: usize,
        dtype: String,
    },
    Attention {
        batch: String,
        level: String,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
    },
}

fn main() -> Outcome<()> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [batches] = &arguments[..] else {
        return Err("usage: measure BATCHES".into());
    };
    let batches: HashMap<String, Batch> = serde_json::from_slice(&std::fs::read(batches)?)?;
    let device = cuda_device(0)?;
    for line in std::io::stdin().lock().lines() {
        let milliseconds = answer(serde_json::from_str(&line?)?, &batches, &device)?;
        println!("{}", json!({ "ms": milliseconds }));
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn answer(request: Request, batches: &HashMap<String, Batch>, device: &Device) -> Outcome<f64> {
    match request {
        Request::Rows {
            way,
            shape,
            ids,
            dtype,
        } => {
            let dtype = dtype.parse::<DType>()?;
            let x = Tensor::ones(shape.as_slice(), DType::U8, device)?.to_dtype(dtype)?;
            let ids = Ids::new(&random_ids(ids, shape[0]), shape[0], device)?;
            match way.as_str() {
                "ours" => time(device, || Ok(index_select(&x, &ids)?)),
                "candle" => time(device, || Ok(x.index_select(ids.tensor(), 0)?)),
                _ => Err(format!("unknown way {way}").into()),
            }
        }
        Request::Attention {
            batch,
            level,
            heads,
            kv_heads,
            head_dim,
        } => {
            let batch = batches.get(&batch).ok_or("unknown batch")?;
            let fold = fold(batch, level == "none")?;
            let group = heads / kv_heads;
            let mask = mask(&fold, group, device)?;
            let random = |heads| {
                let shape = (fold.num_rows(), heads, head_dim);
                Tensor::randn(0_f32, 1_f32, shape, device)?.to_dtype(DType::BF16)
            };
            let (q, k, v) = (random(heads)?, random(kv_heads)?, random(kv_heads)?);
            let scale = (head_dim as f32).sqrt().recip();
            time(device, || {
                Ok(tree_attention(&q, &k, &v, &mask, scale, None)?)
            })
        }
    }
}

fn mask(fold: &Fold, group: usize, device: &Device) -> Outcome<TreeMask> {
    let mask = fold.path_mask(query_block(group), KEY_BLOCK, None)?;
    let [partial, full] = [mask.partial(), mask.full()].map(|lists| Lists {
        offsets: &lists.offsets,
        blocks: &lists.indices,
    });
    let paths = PathLists {
        depth: mask.depth(),
        blocks: mask.blocks(),
        above: mask.above(),
        partial,
        full,
    };
    Ok(TreeMask::new(paths, group, None, device)?)
}

/// Milliseconds of a call: of the second and as many after it as take long enough.
fn time(device: &Device, call: impl Fn() -> Outcome<Tensor>) -> Outcome<f64> {
    let together = |calls: u32| -> Outcome<Duration> {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        device.synchronize()?;
        Ok(start.elapsed())
    };
    together(1)?;
    let one = together(1)?.as_secs_f64();
    let calls = (LONG_ENOUGH.as_secs_f64() / one) as u32;
    let calls = calls.clamp(1, MOST_CALLS);
    Ok(1e3 * together(calls)?.as_secs_f64() / f64::from(calls))
}

/// By a multiplicative congruential generator: the same each time.
fn random_ids(count: usize, rows: usize) -> Vec<u32> {
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        ((state >> 33) as usize % rows) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// In depth-first layout; `alone`, each sequence shares nothing.
fn fold(batch: &Batch, alone: bool) -> Outcome<Fold> {
    let ids = batch.concat();
    let positions: Vec<u32> = batch.iter().flat_map(|own| 0..own.len() as u32).collect();
    let mut offsets = vec![0];
    for own in batch {
        offsets.push(offsets[offsets.len() - 1] + own.len() as u32);
    }
    let salts: Vec<u64> = (0..batch.len() as u64)
        .map(|at| if alone { at } else { 0 })
        .collect();
    let builder = Fold::builder(&ids, &positions, &offsets).layout(Layout::DepthFirst);
    Ok(builder.salts(&salts).build()?)
}
