//! The forward pass, pooling and scores against transformers, on tiny random checkpoints that
//! `make_checkpoints.py` writes.
#![cfg(feature = "candle")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use radix_mlp::qwen3::{
    FoldLevel, ModelError, Pooling, Qwen3Model, normalize, truncate_dimensions,
};
use radix_mlp::{Fold, Layout};
use tempfile::TempDir;

const LEVELS: [FoldLevel; 3] = [FoldLevel::None, FoldLevel::Mlp, FoldLevel::Full];
const CASES: [&str; 5] = ["tied", "sharded_bias", "bare_odd", "bf16", "linear_rope"];
/// As in `make_checkpoints.py`.
const YES: u32 = 7;
const NO: u32 = 11;
/// Largest difference of a sequence's hidden states, over the largest magnitude among them. An f32
/// sum over the widest dimension here errs by about sqrt(600) × 6e-8 = 1.5e-6, a few times a layer.
const TOLERANCE: f32 = 2e-5;

/// The checkpoints, or `None` (with the reason printed) without a Python to make them.
fn checkpoints() -> Option<TempDir> {
    // Asked for when it runs: a bundle of tests runs on another machine than cargo.
    let package =
        std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo, or what runs this, sets it");
    let package = Path::new(&package);
    let default = package.join("../.venv/bin/python");
    let python = std::env::var_os("RADIX_MLP_PYTHON").map_or(default, PathBuf::from);
    if python.components().count() > 1 && !python.exists() {
        println!("skipped: no {} (set RADIX_MLP_PYTHON)", python.display());
        return None;
    }
    let directory = TempDir::new().unwrap();
    let mut script = Command::new(&python);
    script
        .arg(package.join("tests/make_checkpoints.py"))
        .arg(directory.path());
    let output = script.output().expect("python starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "make_checkpoints.py failed: {stderr}"
    );
    Some(directory)
}

/// What `make_checkpoints.py` computed.
struct Expected {
    tensors: HashMap<String, Tensor>,
    input_ids: Vec<u32>,
    position_ids: Vec<u32>,
    cu_seq_lengths: Vec<u32>,
}

impl Expected {
    fn read(directory: &Path) -> Self {
        let path = directory.join("expected.safetensors");
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let ids = |name: &str| {
            tensors[name]
                .to_dtype(DType::U32)
                .unwrap()
                .to_vec1()
                .unwrap()
        };
        Self {
            input_ids: ids("input_ids"),
            position_ids: ids("position_ids"),
            cu_seq_lengths: ids("cu_seq_lengths"),
            tensors,
        }
    }

    fn fold(&self, layout: Layout) -> Fold {
        Fold::builder(&self.input_ids, &self.position_ids, &self.cu_seq_lengths)
            .layout(layout)
            .pad_multiple_of(64)
            .build()
            .unwrap()
    }
}

/// NaN where there is one: candle's `max` forgets it.
fn largest(x: &Tensor) -> f32 {
    let values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values
        .into_iter()
        .map(f32::abs)
        .max_by(f32::total_cmp)
        .unwrap_or(0.0)
}

/// max |a - b| / max |b| of each sequence's rows, and of all sequences the largest.
fn relative_error(a: &Tensor, b: &Tensor, cu_seq_lengths: &[u32]) -> f32 {
    assert_eq!(a.shape(), b.shape());
    let a = a.to_dtype(DType::F32).unwrap();
    let error = |ends: &[u32]| {
        let rows = |t: &Tensor| {
            let (start, end) = (ends[0] as usize, ends[1] as usize);
            t.narrow(0, start, end - start).unwrap()
        };
        largest(&(rows(&a) - rows(b)).unwrap()) / largest(&rows(b))
    };
    let errors: Vec<f32> = cu_seq_lengths.windows(2).map(error).collect();
    assert!(errors.iter().all(|error| error.is_finite()));
    errors.into_iter().fold(0.0, f32::max)
}

#[test]
fn every_state_embedding_and_score_is_that_of_transformers() {
    let Some(directory) = checkpoints() else {
        return;
    };
    for case in CASES {
        let directory = directory.path().join(case);
        let expected = Expected::read(&directory);
        let model = Qwen3Model::load(&directory, None, &Device::Cpu).unwrap();
        for layout in [Layout::FirstOccurrence, Layout::DepthFirst] {
            let fold = expected.fold(layout);
            for level in LEVELS {
                check(
                    &model,
                    &fold,
                    level,
                    &expected,
                    &format!("{case} {layout:?} {level:?}"),
                );
            }
        }
    }
    let bf16 = directory.path().join("bf16");
    half_precision_is_no_worse_than_that_of_transformers(&bf16, &Device::Cpu);
}

fn check(model: &Qwen3Model, fold: &Fold, level: FoldLevel, expected: &Expected, what: &str) {
    let states = model.forward(fold, level).unwrap();
    let hidden = states.unfold().unwrap();
    let error = relative_error(
        &hidden,
        &expected.tensors["hidden"],
        &expected.cu_seq_lengths,
    );
    println!("{what}: hidden states differ by {error:.1e}");
    assert!(error <= TOLERANCE, "{what}: {error:e}");

    let each: Vec<u32> = (0..=fold.num_sequences() as u32).collect();
    let last_token = states.pool(Pooling::LastToken).unwrap();
    let half = truncate_dimensions(&last_token, last_token.dims()[1] / 2).unwrap();
    for (name, embeddings) in [
        ("last_token", last_token),
        ("mean", states.pool(Pooling::Mean).unwrap()),
        ("cls", states.pool(Pooling::Cls).unwrap()),
        ("normalized", normalize(&half).unwrap()),
    ] {
        let error = relative_error(&embeddings, &expected.tensors[name], &each);
        assert!(error <= TOLERANCE, "{what} {name}: {error:e}");
    }

    let probabilities = model.yes_probabilities(&states, YES, NO);
    let Some(reference) = expected.tensors.get("yes_probabilities") else {
        return assert!(matches!(probabilities, Err(ModelError::NoHead)), "{what}");
    };
    let reference: Vec<f32> = reference.to_vec1().unwrap();
    for (a, b) in probabilities.unwrap().iter().zip(reference) {
        // Logits of up to about 10 with the error above: 2e-4, of which a probability feels a quarter.
        assert!((a - b).abs() < 1e-4, "{what}: probabilities {a} and {b}");
    }
}

/// In half precision the states may be as far from f32 as transformers' own are in that dtype, and a quarter more: both
/// round at every operation of three layers, but not in the same places.
const ROUNDING: f32 = 1.25;

fn half_precision_is_no_worse_than_that_of_transformers(directory: &Path, device: &Device) {
    let expected = Expected::read(directory);
    let reference = &expected.tensors["hidden"];
    for (dtype, name) in [(DType::BF16, "hidden_bf16"), (DType::F16, "hidden_f16")] {
        let theirs = relative_error(&expected.tensors[name], reference, &expected.cu_seq_lengths);
        let model = Qwen3Model::load(directory, Some(dtype), device).unwrap();
        for (layout, levels) in [
            (Layout::FirstOccurrence, &LEVELS[..]),
            (Layout::DepthFirst, &LEVELS[2..]),
        ] {
            let fold = expected.fold(layout);
            for &level in levels {
                let hidden = model.forward(&fold, level).unwrap().unfold().unwrap();
                assert_eq!(hidden.dtype(), dtype);
                let hidden = hidden.to_device(&Device::Cpu).unwrap();
                let error = relative_error(&hidden, reference, &expected.cu_seq_lengths);
                let what = format!("{dtype:?} {layout:?} {level:?}");
                println!(
                    "{what}: hidden states differ by {error:.1e}, transformers' by {theirs:.1e}"
                );
                assert!(
                    error <= ROUNDING * theirs,
                    "{what}: {error:e}, transformers' {theirs:e}"
                );
            }
        }
    }
}

#[cfg(feature = "cuda")]
#[test]
#[ignore = "needs a CUDA device"]
fn half_precision_on_cuda() {
    let device = radix_mlp_kernels::cuda_device(0).unwrap();
    let directory = checkpoints().expect("a Python with transformers");
    half_precision_is_no_worse_than_that_of_transformers(&directory.path().join("bf16"), &device);
}
