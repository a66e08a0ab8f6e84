//! Tree attention of folded batches against plain causal attention of each sequence by itself, in float64.

use crate::common::{
    Case, SCALE, batches, cases, differences, fold, inputs, mask, path_lists, path_mask, values,
};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use radix_mlp_kernels::{Lists, PathLists, TreeMask, tree_attention, tree_attention_with_lse};

/// The largest differences from the oracle, of outputs whose values are of -1 to 1 and of denominators.
fn errors(sequences: &[Vec<u32>], case: Case, dtype: DType, device: &Device) -> (f64, f64) {
    let fold = fold(sequences);
    let given = inputs(&fold, case, dtype);
    let [q, k, v] = given.clone().map(|x| x.to_device(device).unwrap());
    let mask = mask(&fold, case, device).unwrap();
    let (out, lse) = tree_attention_with_lse(&q, &k, &v, &mask, SCALE, case.softcap).unwrap();
    assert_eq!((out.dims(), out.dtype()), (q.dims(), dtype));
    let alone = tree_attention(&q, &k, &v, &mask, SCALE, case.softcap).unwrap();
    assert_eq!(values(&alone), values(&out));
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
fn a_window_of_all_rows_is_none() {
    let fold = fold(&[vec![1; 200]]);
    let [q, k, v] = inputs(&fold, CASE, DType::F32);
    let attended = |window| {
        let mask = mask(&fold, Case { window, ..CASE }, &Device::Cpu).unwrap();
        values(&tree_attention(&q, &k, &v, &mask, SCALE, None).unwrap())
    };
    let expected = attended(None);
    assert!(attended(Some(199)) != expected);
    for window in [200, u32::MAX] {
        assert_eq!(attended(Some(window)), expected);
    }
}

/// Of the sequences 1, 2 and 1, 3.
const LISTS: PathLists<'_> = PathLists {
    depth: &[0, 1, 1],
    blocks: &[[0, 2, 0, 0], [2, 3, 1, 0]],
    above: &[0],
    partial: Lists {
        offsets: &[0, 2],
        blocks: &[0, 1],
    },
    full: Lists {
        offsets: &[0, 0],
        blocks: &[],
    },
};

#[test]
fn lists_that_name_what_is_not_there_are_refused() {
    let fold = fold(&[vec![1, 2], vec![1, 3]]);
    let new = |lists, group, window| TreeMask::new(lists, group, window, &Device::Cpu);
    assert_eq!(
        format!("{:?}", path_lists(&path_mask(&fold, CASE))),
        format!("{LISTS:?}")
    );
    assert!(new(LISTS, 3, Some(1)).is_ok());
    let refused = |lists, group, window| new(lists, group, window).unwrap_err().to_string();
    assert_eq!(refused(LISTS, 0, None), "group must be in 1..=192, got 0");
    assert_eq!(
        refused(LISTS, 193, None),
        "group must be in 1..=192, got 193"
    );
    assert_eq!(refused(LISTS, 3, Some(0)), "a window must have rows, got 0");
    // Query blocks of one row.
    let message = "partial must be 3 lists of 2 blocks, got 1 with ends (Some(0), Some(2))";
    assert_eq!(refused(LISTS, 192, None), message);
    let partial = |offsets, blocks| PathLists {
        partial: Lists { offsets, blocks },
        ..LISTS
    };
    let message = "partial's offsets go from 2 to 1";
    assert_eq!(refused(partial(&[0, 2, 1], &[0]), 96, None), message);
    let full = |offsets, blocks| PathLists {
        full: Lists { offsets, blocks },
        ..LISTS
    };
    let above = |above| PathLists { above, ..LISTS };
    let block = |blocks| PathLists { blocks, ..LISTS };
    for (lists, message) in [
        (
            full(&[], &[]),
            "full must be 1 lists of 0 blocks, got 0 with ends (None, None)",
        ),
        (
            full(&[1, 1], &[0]),
            "full must be 1 lists of 1 blocks, got 1 with ends (Some(1), Some(1))",
        ),
        (
            full(&[0, 1], &[]),
            "full must be 1 lists of 0 blocks, got 1 with ends (Some(0), Some(1))",
        ),
        (full(&[0, 1], &[2]), "full[0] is block 2, of 2"),
        (partial(&[0, 0], &[]), "query block 0 lists no key block"),
        (above(&[3]), "above[0] is row 3, of 3"),
        (above(&[]), "blocks[1] has above[0..1], of 0"),
        (block(&[[2, 2, 0, 0]]), "blocks[0] is of rows 2..2, of 3"),
        (block(&[[2, 4, 0, 0]]), "blocks[0] is of rows 2..4, of 3"),
        (block(&[[0, 1, 3, 0]]), "blocks[0] is below 3 rows, of 3"),
        (block(&[[0, 1, 1, 1]]), "blocks[0] has above[1..2], of 1"),
    ] {
        assert_eq!(refused(lists, 3, None), message);
    }
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
