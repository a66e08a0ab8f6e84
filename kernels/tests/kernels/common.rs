//! Folded batches, what attention is asked for, and plain causal attention of each sequence by itself in float64.

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use radix_mlp::{Fold, Layout, PathMask};
use radix_mlp_kernels::{KEY_BLOCK, KernelError, Lists, PathLists, TreeMask, query_block};

/// What attention is asked for besides the batch.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub window: Option<u32>,
    pub softcap: Option<f32>,
}

pub const SCALE: f32 = 0.3;

/// In depth-first layout; positions count from 0.
pub fn fold(sequences: &[Vec<u32>]) -> Fold {
    let ids: Vec<u32> = sequences.concat();
    let positions: Vec<u32> = sequences
        .iter()
        .flat_map(|own| 0..own.len() as u32)
        .collect();
    let mut offsets = vec![0];
    for own in sequences {
        offsets.push(offsets.last().unwrap() + own.len() as u32);
    }
    Fold::builder(&ids, &positions, &offsets)
        .layout(Layout::DepthFirst)
        .build()
        .unwrap()
}

pub fn path_mask(fold: &Fold, case: Case) -> PathMask {
    let query_block = query_block(case.group);
    fold.path_mask(query_block, KEY_BLOCK, case.window).unwrap()
}

pub fn path_lists(mask: &PathMask) -> PathLists<'_> {
    let [partial, full] = [mask.partial(), mask.full()].map(|lists| Lists {
        offsets: &lists.offsets,
        blocks: &lists.indices,
    });
    PathLists {
        depth: mask.depth(),
        blocks: mask.blocks(),
        above: mask.above(),
        partial,
        full,
    }
}

pub fn mask(fold: &Fold, case: Case, device: &Device) -> Result<TreeMask, KernelError> {
    let mask = path_mask(fold, case);
    TreeMask::new(path_lists(&mask), case.group, case.window, device)
}

/// Numbers of -1 to 1 that look random, in `dtype`.
pub fn drawn(shape: &[usize], seed: usize, dtype: DType) -> Tensor {
    let at = |at: usize| (at * 2_654_435_761 + seed * 40_503) % 65_537;
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|index| at(index) as f64 / 32_768.0 - 1.0)
        .collect();
    let values = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    values.to_dtype(dtype).unwrap()
}

/// The numbers that a tensor has, exactly.
pub fn values(x: &Tensor) -> Vec<f64> {
    let x = x.to_device(&Device::Cpu).unwrap();
    let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    x.to_vec1().unwrap()
}

pub fn difference(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // NaN is the largest, as it is not for f64::max.
    differences.max_by(f64::total_cmp).unwrap_or(0.0)
}

/// Of each token of each sequence, from its own sequence alone: \[tokens, heads × head_dim\], and the logarithms of the
/// softmaxes' denominators \[tokens, heads\].
pub fn oracle(fold: &Fold, [q, k, v]: [&Tensor; 3], case: Case) -> (Vec<f64>, Vec<f64>) {
    let (dim, group) = (case.head_dim, case.group);
    let heads = case.kv_heads * group;
    let (q, k, v) = (values(q), values(k), values(v));
    let head_of = |x: &[f64], row: usize, head: usize, heads: usize| {
        x[(row * heads + head) * dim..][..dim].to_vec()
    };
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for ends in fold.cu_seq_lengths().windows(2) {
        let rows: Vec<usize> = fold.scatter_indices()[ends[0] as usize..ends[1] as usize]
            .iter()
            .map(|&row| row as usize)
            .collect();
        for (last, &row) in rows.iter().enumerate() {
            let first = case
                .window
                .map_or(0, |size| (last + 1).saturating_sub(size as usize));
            let keys = &rows[first..=last];
            for head in 0..heads {
                let query = head_of(&q, row, head, heads);
                let weight = |&key: &usize| {
                    let key = head_of(&k, key, head / group, case.kv_heads);
                    let product: f64 = query.iter().zip(key).map(|(a, b)| a * b).sum();
                    let score = product * f64::from(SCALE);
                    let capped = |cap: f64| cap * (score / cap).tanh();
                    case.softcap.map_or(score, |cap| capped(cap.into())).exp()
                };
                let weights: Vec<f64> = keys.iter().map(weight).collect();
                let total: f64 = weights.iter().sum();
                lse.push(total.ln());
                for at in 0..dim {
                    let mixed = keys
                        .iter()
                        .zip(&weights)
                        .map(|(&key, w)| w * head_of(&v, key, head / group, case.kv_heads)[at]);
                    out.push(mixed.sum::<f64>() / total);
                }
            }
        }
    }
    (out, lse)
}

/// The largest differences from the oracle of an output \[rows, heads, head_dim\], and of denominators \[heads, rows\].
pub fn differences(
    fold: &Fold,
    inputs: [&Tensor; 3],
    case: Case,
    out: &Tensor,
    lse: &Tensor,
) -> (f64, f64) {
    let heads = case.kv_heads * case.group;
    let (expected, expected_lse) = oracle(fold, inputs, case);
    let out = fold.unfold(&values(out), heads * case.head_dim).unwrap();
    let lse = fold.unfold(&values(&lse.t().unwrap()), heads).unwrap();
    (difference(&out, &expected), difference(&lse, &expected_lse))
}

/// Up to five sequences over two token ids behind one prefix, of up to `longest` tokens each; not all empty.
pub fn batches(longest: usize) -> impl Strategy<Value = Vec<Vec<u32>>> {
    let tokens = move || prop::collection::vec(0_u32..2, 0..longest);
    let shared = (tokens(), prop::collection::vec(tokens(), 1..6));
    let join = |(prefix, tails): (Vec<u32>, Vec<Vec<u32>>)| -> Vec<Vec<u32>> {
        tails
            .into_iter()
            .map(|tail| [prefix.clone(), tail].concat())
            .collect()
    };
    shared
        .prop_map(join)
        .prop_filter("no tokens", |batch| batch.iter().any(|own| !own.is_empty()))
}

/// So many, or as many as PROPTEST_CASES says.
pub fn cases_of(usual: u32) -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(usual),
    }
}

pub fn cases(head_dims: &'static [usize]) -> impl Strategy<Value = Case> {
    let heads = (
        1_usize..3,
        prop::sample::select(&[1_usize, 2, 3, 5][..]),
        prop::sample::select(head_dims),
    );
    let limits = (prop::option::of(1_u32..40), prop::option::of(1_f32..20.0));
    (heads, limits).prop_map(|((kv_heads, group, head_dim), (window, softcap))| Case {
        kv_heads,
        group,
        head_dim,
        window,
        softcap,
    })
}

/// q, k and v of a batch for `case`.
pub fn inputs(fold: &Fold, case: Case, dtype: DType) -> [Tensor; 3] {
    let heads = [case.kv_heads * case.group, case.kv_heads, case.kv_heads];
    let shapes = heads.map(|heads| [fold.num_rows(), heads, case.head_dim]);
    std::array::from_fn(|index| drawn(&shapes[index], index + 1, dtype))
}

#[test]
fn no_difference_is_forgotten() {
    for at in 0..3 {
        let mut found = [1.0; 3];
        found[at] = f64::NAN;
        assert!(difference(&found, &[1.0; 3]).is_nan());
    }
    assert_eq!(difference(&[1.0, 5.0, 2.0], &[1.0; 3]), 4.0);
}
