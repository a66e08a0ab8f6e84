//! Tree attention of folded batches against plain causal attention of each sequence by itself, in float64.

use crate::common::{Case, SCALE, batches, cases, differences, fold, inputs, mask};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use radix_mlp_kernels::{Lists, TreeMask, query_block, tree_attention, tree_attention_with_lse};

/// The largest differences from the oracle, of outputs whose values are of -1 to 1 and of denominators.
fn errors(sequences: &[Vec<u32>], case: Case, dtype: DType, device: &Device) -> (f64, f64) {
    let fold = fold(sequences);
    let given = inputs(&fold, case, dtype);
    let [q, k, v] = given.clone().map(|x| x.to_device(device).unwrap());
    let mask = mask(&fold, case, device).unwrap();
    let (out, lse) = tree_attention_with_lse(&q, &k, &v, &mask, SCALE, case.softcap).unwrap();
    assert_eq!((out.dims(), out.dtype()), (q.dims(), dtype));
    let alone = tree_attention(&q, &k, &v, &mask, SCALE, case.softcap).unwrap();
    assert_eq!(crate::common::values(&alone), crate::common::values(&out));
    differences(&fold, given.each_ref(), case, &out, &lse)
}

#[test]
fn on_the_cpu() {
    // float32 sums of some hundred terms.
    proptest!(crate::common::cases_of(60), |(sequences in batches(60), case in cases(&[4, 7]))| {
        let (out, lse) = errors(&sequences, case, DType::F32, &Device::Cpu);
        prop_assert!(out < 1e-5 && lse < 1e-5, "{} {}", out, lse);
    });
}

#[cfg(feature = "cuda")]
#[test]
#[ignore = "needs a CUDA device"]
fn on_cuda() {
    let device = radix_mlp_kernels::cuda_device(0).unwrap();
    // Weights and outputs are rounded to 8 and 11 bits; values are of -1 to 1.
    for (dtype, bound) in [(DType::BF16, 8e-3), (DType::F16, 1e-3)] {
        proptest!(crate::common::cases_of(60), |(sequences in batches(150), case in cases(&[64, 128]))| {
            let (out, lse) = errors(&sequences, case, dtype, &device);
            prop_assert!(out < bound && lse < 1e-4, "{} {}", out, lse);
        });
    }
}

const CASE: Case = Case {
    kv_heads: 2,
    group: 3,
    head_dim: 4,
    window: None,
    softcap: None,
};

#[test]
fn a_mask_of_other_rows_or_blocks_is_refused() {
    let fold = fold(&[vec![1; 200]]);
    let tiles = 200_usize.div_ceil(query_block(3));
    let (none, one) = (vec![0; tiles + 1], [vec![0; tiles], vec![1]].concat());
    let refused = |offsets: &[usize], block: u32, group, window| {
        let full = Lists {
            offsets: &none,
            blocks: &[],
        };
        let partial = Lists {
            offsets,
            blocks: &[block],
        };
        let subtree_end = fold.subtree_end().unwrap();
        TreeMask::new(subtree_end, [full, partial], group, window, &Device::Cpu)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(refused(&one, 4, 3, None), "partial[0] is block 4, of 4");
    assert_eq!(
        refused(&[0], 3, 3, None),
        "partial must be 5 lists of 1 blocks, got 0 with ends (Some(0), Some(0))"
    );
    assert_eq!(refused(&one, 3, 0, None), "group must be in 1..=128, got 0");
    let message = "a window needs a size and 200 depths, got 0 and 1";
    assert_eq!(refused(&one, 3, 3, Some((0, &[7]))), message);
}

#[test]
fn tensors_that_do_not_go_together_are_refused() {
    let fold = fold(&[vec![1, 2], vec![1, 3]]);
    let mask = mask(&fold, CASE, &Device::Cpu).unwrap();
    let zeros = |dims: [usize; 3], dtype| Tensor::zeros(&dims, dtype, &Device::Cpu).unwrap();
    let (q, k) = (zeros([3, 6, 4], DType::F32), zeros([3, 2, 4], DType::F32));
    let refused = |q: &Tensor, k: &Tensor, v: &Tensor| {
        tree_attention(q, k, v, &mask, 1.0, None)
            .unwrap_err()
            .to_string()
    };
    assert!(tree_attention(&q, &k, &k, &mask, 1.0, None).is_ok());
    assert_eq!(
        refused(&k, &k, &k),
        "q must be [3, a multiple of 3, head_dim], got shape [3, 2, 4]"
    );
    assert_eq!(
        refused(&q, &q, &k),
        "k must be [3, 2, 4], got shape [3, 6, 4]"
    );
    let with = |scale, softcap| tree_attention(&q, &k, &k, &mask, scale, softcap).unwrap_err();
    assert_eq!(
        with(-0.5, None).to_string(),
        "scale must be positive and finite, got -0.5"
    );
    assert_eq!(
        with(1.0, Some(0.0)).to_string(),
        "softcap must be positive and finite, got 0"
    );
    let half = zeros([3, 2, 4], DType::F16);
    assert_eq!(
        refused(&q, &k, &half),
        "v must be of the dtype of q, got F16"
    );
    let bytes = [zeros([3, 6, 4], DType::U8), zeros([3, 2, 4], DType::U8)];
    assert_eq!(
        refused(&bytes[0], &bytes[1], &bytes[1]),
        "q must be a float, got U8"
    );
}
