//! Folds the batches of `shapes.json`, which `benchmark/fold_vs_published.py` folds too, and the
//! real ones that `benchmark/real_batches.py` writes; and copies as much, which no fold can beat.

use std::hint::black_box;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use radix_mlp::compute_fold_and_scatter;
use serde_json::Value;

struct Batch {
    name: String,
    /// \[N\]
    input_ids: Vec<u32>,
    /// \[N\]
    position_ids: Vec<u32>,
    /// \[sequences + 1\]
    cu_seq_lengths: Vec<u32>,
    pad_multiple_of: Option<usize>,
}

impl Batch {
    fn new(name: String, sequences: impl Iterator<Item = Vec<u32>>) -> Self {
        let mut batch = Self {
            name,
            input_ids: Vec::new(),
            position_ids: Vec::new(),
            cu_seq_lengths: vec![0],
            pad_multiple_of: None,
        };
        for ids in sequences {
            batch.position_ids.extend(0..ids.len() as u32);
            batch.input_ids.extend(ids);
            batch.cu_seq_lengths.push(batch.input_ids.len() as u32);
        }
        batch
    }

    /// A prefix of the share `shared` that all sequences have, then tokens of each one's own.
    fn from_shape(shape: &Value) -> Self {
        let number = |key: &str| shape[key].as_u64().unwrap() as u32;
        let (sequences, length) = (number("sequences"), number("length"));
        let shared = shape["shared"].as_f64().unwrap();
        let prefix = (f64::from(length) * shared) as u32;
        let name = format!(
            "{}/{sequences}x{length}, {shared} shared",
            shape["group"].as_str().unwrap()
        );
        let own = |sequence: u32, i: u32| 1_000_000 + sequence * 10_000 + i;
        let ids = |sequence: u32| {
            let prefix_ids = (0..prefix).map(|i| i % 1000 + 1);
            prefix_ids
                .chain((prefix..length).map(|i| own(sequence, i)))
                .collect()
        };
        let pad_multiple_of = shape["pad_multiple_of"].as_u64().map(|rows| rows as usize);
        Self {
            pad_multiple_of,
            ..Self::new(name, (0..sequences).map(ids))
        }
    }
}

fn batches() -> Vec<Batch> {
    let shapes: Vec<Value> = serde_json::from_str(include_str!("shapes.json")).unwrap();
    let mut batches: Vec<Batch> = shapes.iter().map(Batch::from_shape).collect();
    let real = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/real_batches.json");
    match std::fs::read(&real) {
        Ok(json) => {
            let real: serde_json::Map<String, Value> = serde_json::from_slice(&json).unwrap();
            batches.extend(real.into_iter().map(|(name, sequences)| {
                let sequences: Vec<Vec<u32>> = serde_json::from_value(sequences).unwrap();
                Batch::new(format!("real/{name}"), sequences.into_iter())
            }));
        }
        Err(error) => println!("no real batches, see benchmark/real_batches.py: {error}"),
    }
    batches
}

fn fold(c: &mut Criterion) {
    for batch in batches() {
        let mut group = c.benchmark_group(&batch.name);
        let ids = &batch.input_ids[..];
        group.throughput(Throughput::Elements(ids.len() as u64));
        group.bench_function(BenchmarkId::from_parameter("fold"), |b| {
            b.iter(|| {
                compute_fold_and_scatter(
                    black_box(ids),
                    black_box(&batch.position_ids),
                    black_box(&batch.cu_seq_lengths),
                    batch.pad_multiple_of,
                )
            });
        });
        group.bench_function(BenchmarkId::from_parameter("copy"), |b| {
            b.iter(|| [(); 4].map(|()| black_box(ids).to_vec()));
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = fold
}
criterion_main!(benches);
