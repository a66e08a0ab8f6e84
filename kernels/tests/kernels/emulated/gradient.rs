//! Gradients of tree attention against those of each row's path.

use super::{DTYPES, bits, of_bits};
use crate::common::{Case, SCALE, batches, difference, drawn, fold, inputs, values};
use candle_core::{DType, Device, Tensor};
use libloading::{Library, Symbol};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use radix_mlp::Fold;

/// As in tree_gradient_memory.cuh.
const PAIRS: usize = 64;
const OWN_KEYS: usize = 128;
const DIM: usize = 128;

#[repr(C)]
struct Sizes {
    strides: [i64; 4],
    rows: u32,
    kv_heads: u32,
    group: u32,
    scale: f32,
}

type Gradient = unsafe extern "C" fn(
    u32,
    u32,
    u32,
    *const *const u16,
    *const f32,
    *const *const u32,
    *mut f32,
    *mut f32,
    *mut f32,
    *const *mut u16,
    *const Sizes,
);

/// In the order of the kernel's arguments.
#[derive(Default)]
struct Walks {
    key_block: Vec<u32>,
    first_step: Vec<u32>,
    end: Vec<u32>,
    part: Vec<u32>,
    split_block: Vec<u32>,
    first_part: Vec<u32>,
}

/// Of no more than `longest` steps each.
fn walks(fold: &Fold, group: usize, longest: usize) -> Walks {
    let step = PAIRS / group;
    let mut walks = Walks::default();
    let mut parts = 0;
    walks.first_part.push(0);
    for (block, ends) in fold.subtree_end().unwrap().chunks(OWN_KEYS).enumerate() {
        let start = block * OWN_KEYS / step * step;
        let end = *ends.iter().max().unwrap() as usize;
        let starts: Vec<usize> = (start..end).step_by(longest * step).collect();
        for (index, &own) in starts.iter().enumerate() {
            parts += u32::from(starts.len() > 1);
            walks.key_block.push(block as u32);
            walks.first_step.push((index * longest) as u32);
            walks.end.push(end.min(own + longest * step) as u32);
            walks.part.push(if starts.len() > 1 { parts } else { 0 });
        }
        if starts.len() > 1 {
            walks.split_block.push(block as u32);
            walks.first_part.push(parts);
        }
    }
    walks
}

/// Output and denominators \[heads, rows\], and gradients of q, k and v by the output's gradient, of each row by the rows
/// of its own path.
struct Oracle {
    out: Vec<f64>,
    lse: Vec<f32>,
    gradients: [Vec<f64>; 3],
}

fn oracle(fold: &Fold, case: Case, [q, k, v, dout]: [&Tensor; 4]) -> Oracle {
    let [q, k, v, dout] = [q, k, v, dout].map(values);
    let (rows, kv_heads, group) = (fold.num_rows(), case.kv_heads, case.group);
    let heads = kv_heads * group;
    let product = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let mut oracle = Oracle {
        out: vec![0.0; q.len()],
        lse: vec![0.0; heads * rows],
        gradients: [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]],
    };
    let mut seen = vec![false; rows];
    for ends in fold.cu_seq_lengths().windows(2) {
        let path = &fold.scatter_indices()[ends[0] as usize..ends[1] as usize];
        for (last, &row) in path.iter().enumerate() {
            let row = row as usize;
            if std::mem::replace(&mut seen[row], true) {
                continue;
            }
            for head in 0..heads {
                let own = (row * heads + head) * DIM..(row * heads + head + 1) * DIM;
                let key = |key: u32| {
                    let at = (key as usize * kv_heads + head / group) * DIM;
                    at..at + DIM
                };
                let keys = || path[..=last].iter().map(|&row| key(row));
                let weights: Vec<f64> = keys()
                    .map(|at| (product(&q[own.clone()], &k[at]) * f64::from(SCALE)).exp())
                    .collect();
                let total: f64 = weights.iter().sum();
                oracle.lse[head * rows + row] = total.ln() as f32;
                let slopes: Vec<f64> = keys()
                    .map(|at| product(&dout[own.clone()], &v[at]))
                    .collect();
                let mean = product(&weights, &slopes) / total;
                let [dq, dk, dv] = &mut oracle.gradients;
                for ((at, weight), slope) in keys().zip(&weights).zip(&slopes) {
                    let weight = weight / total;
                    let score = weight * (slope - mean) * f64::from(SCALE);
                    for (own, at) in own.clone().zip(at) {
                        oracle.out[own] += weight * v[at];
                        dq[own] += score * k[at];
                        dk[at] += score * q[own];
                        dv[at] += weight * dout[own];
                    }
                }
            }
        }
    }
    oracle
}

/// The largest differences of the gradients from the oracle's, as parts of the largest gradient.
fn gradient(
    library: &Library,
    sequences: &[Vec<u32>],
    case: Case,
    dtype: DType,
    longest: usize,
) -> [f64; 3] {
    let fold = fold(sequences);
    let [q, k, v] = inputs(&fold, case, dtype);
    let (rows, heads) = (fold.num_rows(), case.kv_heads * case.group);
    let dout = drawn(&[rows, heads, DIM], 4, dtype);
    let oracle = oracle(&fold, case, [&q, &k, &v, &dout]);
    let out = Tensor::from_slice(&oracle.out, q.dims(), &Device::Cpu).unwrap();
    let out = out.to_dtype(dtype).unwrap();
    let walks = walks(&fold, case.group, longest);
    let numbers = [
        fold.subtree_end().unwrap(),
        &walks.key_block,
        &walks.first_step,
        &walks.end,
        &walks.part,
        &walks.split_block,
        &walks.first_part,
    ]
    .map(<[u32]>::as_ptr);
    let strides = [(heads * DIM) as i64, DIM as i64];
    let sizes = Sizes {
        strides: [strides, strides].concat().try_into().unwrap(),
        rows: rows as u32,
        kv_heads: case.kv_heads as u32,
        group: case.group as u32,
        scale: SCALE,
    };
    let x = [&q, &k, &v, &out, &dout].map(bits);
    let steps = rows.div_ceil(PAIRS / case.group) * case.kv_heads;
    let parts = *walks.first_part.last().unwrap() as usize * case.kv_heads;
    // NaN, which must be gone.
    let nan = |count: usize| vec![f32::NAN; count];
    let mut pair_numbers = nan(steps * 2 * PAIRS);
    let mut pair_sums = nan(steps * PAIRS * DIM);
    let mut part_sums = nan(parts * 2 * OWN_KEYS * DIM);
    let mut gradients = [&q, &k, &v].map(|x| vec![u16::MAX; x.elem_count()]);
    // SAFETY: the symbol has this type, and the arrays the sizes that the kernels are told.
    unsafe {
        let run: Symbol<'_, Gradient> = library.get(b"emulate_tree_gradient").unwrap();
        run(
            (dtype == DType::BF16).into(),
            walks.key_block.len() as u32,
            walks.split_block.len() as u32,
            x.each_ref().map(Vec::as_ptr).as_ptr(),
            oracle.lse.as_ptr(),
            numbers.as_ptr(),
            pair_numbers.as_mut_ptr(),
            pair_sums.as_mut_ptr(),
            part_sums.as_mut_ptr(),
            gradients.each_mut().map(Vec::as_mut_ptr).as_ptr(),
            &sizes,
        );
    }
    let found = gradients.map(|own| {
        let count = own.len();
        values(&of_bits(own, &[count], dtype))
    });
    std::array::from_fn(|at| {
        let expected = &oracle.gradients[at];
        let largest = expected.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        difference(&found[at], expected) / largest.max(1.0)
    })
}

fn heads() -> impl Strategy<Value = Case> {
    let groups = prop::sample::select(&[1_usize, 2, 3, 4][..]);
    (1_usize..3, groups).prop_map(|(kv_heads, group)| Case {
        kv_heads,
        group,
        head_dim: DIM,
        window: None,
        softcap: None,
    })
}

pub fn differentiates(library: &Library) {
    // The same batches each time, and few: an emulated step takes a tenth of a second.
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::with_cases(12), rng);
    let drawn = (
        batches(80),
        heads(),
        prop::sample::select(&DTYPES[..]),
        1_usize..6,
    );
    let checked = runner.run(&drawn, |(sequences, case, dtype, longest)| {
        let differences = gradient(library, &sequences, case, dtype, longest);
        // Weights, their slopes and the gradients are rounded to 8 and 11 bits.
        let bound = if dtype == DType::BF16 { 8e-3 } else { 1e-3 };
        for (name, found) in ["q", "k", "v"].iter().zip(differences) {
            prop_assert!(found < bound, "{} of {}", found, name);
        }
        Ok(())
    });
    checked.unwrap();
    beside_a_warps_keys(library);
}

/// A step that begins with the last but one of a warp's keys, which does not see the last.
fn beside_a_warps_keys(library: &Library) {
    let case = Case {
        kv_heads: 1,
        group: 9,
        head_dim: DIM,
        window: None,
        softcap: None,
    };
    let step = PAIRS / case.group;
    assert!((0..48).step_by(step).any(|row| row % 16 == 14));
    let differences = gradient(library, &[vec![1; 48]], case, DType::F16, 9);
    assert!(
        differences.iter().all(|&found| found < 1e-3),
        "{differences:?}"
    );
}
