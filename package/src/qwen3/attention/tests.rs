use candle_core::{Device, Tensor};
use candle_nn::attention::{flash_attn_varlen_cpu, flash_attn_varlen_unfused};
use proptest::prelude::*;

use super::*;
use crate::Layout;

const HEAD_DIM: usize = 6;
/// Weighted means of values in -1..1: a few roundings of 6e-8 in each of the scores, weights and
/// sums.
const TOLERANCE: f32 = 2e-6;

/// Values in -1..1, \[rows, heads, HEAD_DIM\].
fn values(rows: usize, heads: usize, seed: u32) -> Tensor {
    let value = |i: u32| {
        let hash =
            (i + 1).wrapping_mul(0x9E37_79B9).rotate_left(15) ^ seed.wrapping_mul(0x85EB_CA6B);
        (hash.wrapping_mul(0xC2B2_AE35) >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..(rows * heads * HEAD_DIM) as u32).map(value).collect();
    Tensor::from_vec(values, (rows, heads, HEAD_DIM), &Device::Cpu).unwrap()
}

/// Segments by the keys that each query sees, without chunks, tiles or a running maximum.
fn naive(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    plan: &AttentionPlan,
    scale: f32,
) -> Vec<Vec<Vec<f32>>> {
    let [q, k, v] = [q, k, v].map(|tensor| tensor.to_vec3::<f32>().unwrap());
    let mut output = q.clone();
    for segment in &plan.segments {
        for row in segment.queries.clone() {
            let own = segment.queries.start..row + 1;
            let keys: Vec<usize> = segment
                .prefix
                .iter()
                .cloned()
                .chain([own])
                .flatten()
                .collect();
            for (head, query) in q[row].iter().enumerate() {
                let kv_head = head * k[0].len() / q[0].len();
                let dot = |key: &usize| -> f32 {
                    k[*key][kv_head].iter().zip(query).map(|(a, b)| a * b).sum()
                };
                let weights: Vec<f32> = keys.iter().map(|key| (scale * dot(key)).exp()).collect();
                let sum: f32 = weights.iter().sum();
                for (i, to) in output[row][head].iter_mut().enumerate() {
                    let weighted = keys
                        .iter()
                        .zip(&weights)
                        .map(|(&key, w)| w * v[key][kv_head][i]);
                    *to = weighted.sum::<f32>() / sum;
                }
            }
        }
    }
    output
}

/// As [`attend`], of contiguous f32 tensors \[rows, heads, head_dim\].
fn attend_tensors(tensors: [&Tensor; 3], plan: &AttentionPlan, scale: f32) -> Tensor {
    let data = tensors.map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    let heads = |index: usize| {
        let (_, heads, head_dim) = tensors[index].dims3().unwrap();
        Heads {
            data: &data[index],
            heads,
            head_dim,
            row_stride: heads * head_dim,
        }
    };
    let [q, k, v] = [0, 1, 2].map(heads);
    let mut output = vec![0.0; q.data.len()];
    attend(&mut output, Inputs { q, k, v, scale }, plan);
    Tensor::from_vec(output, tensors[0].shape(), &Device::Cpu).unwrap()
}

/// NaN where there is one, which candle's `max` forgets.
fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    let differences = (a - b).unwrap().flatten_all().unwrap();
    let differences = differences.to_vec1::<f32>().unwrap();
    differences
        .into_iter()
        .map(f32::abs)
        .max_by(f32::total_cmp)
        .unwrap_or(0.0)
}

#[test]
fn one_kernel_serves_every_group_tile_and_chunk() {
    let segment = |queries, prefix: &[Range<usize>]| Segment {
        queries,
        prefix: prefix.to_vec(),
    };
    // Prefixes of several ranges, of more than a chunk, in any order; tiles of one row and of many.
    let plan = AttentionPlan {
        segments: vec![
            segment(0..700, &[]),
            segment(700..701, &[3..5, 690..700]),
            segment(701..1000, &[0..513, 700..701, 600..690]),
            segment(1000..1003, &[0..600, 600..1000]),
        ],
        rows: 1003,
    };
    for (heads, kv_heads) in [(1, 1), (4, 2), (8, 2), (3, 1)] {
        let (q, k) = (values(1003, heads, 1), values(1003, kv_heads, 2));
        let v = values(1003, kv_heads, 3);
        // Scores of up to 60, so that the running maximum matters.
        let output = attend_tensors([&q, &k, &v], &plan, 10.0);
        let expected = Tensor::new(naive(&q, &k, &v, &plan, 10.0), &Device::Cpu).unwrap();
        let difference = largest_difference(&output, &expected);
        assert!(
            difference < 10.0 * TOLERANCE,
            "{heads}/{kv_heads} heads: {difference:e}"
        );
    }
}

/// A batch of up to 8 sequences over 3 tokens, some of them cut from others.
fn batches() -> impl Strategy<Value = Vec<Vec<u32>>> {
    let sequence = prop::collection::vec(0..3u32, 0..40);
    prop::collection::vec(sequence, 0..8)
}

fn fold(batch: &[Vec<u32>], layout: Layout) -> Fold {
    let mut offsets = vec![0];
    offsets.extend(batch.iter().scan(0, |end, seq| {
        *end += seq.len() as u32;
        Some(*end)
    }));
    let builder = Fold::counted(&batch.concat(), &offsets)
        .layout(layout)
        .build();
    builder.unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Folded attention is candle's over the unfolded rows, and each row is a query once.
    #[test]
    fn folded_attention_is_that_of_candle(
        batch in batches(),
        depth_first: bool,
        (heads, kv_heads) in prop::sample::select(vec![(2, 2), (4, 2), (4, 1)]),
    ) {
        let fold = fold(&batch, if depth_first { Layout::DepthFirst } else { Layout::FirstOccurrence });
        let plan = AttentionPlan::new(&fold, FoldLevel::Full);
        let queries: Vec<usize> = plan.segments.iter().flat_map(|s| s.queries.clone()).collect();
        prop_assert_eq!(queries, (0..fold.num_nodes()).collect::<Vec<_>>());
        prop_assert!(plan.segments.len() <= fold.num_sequences());
        prop_assume!(fold.num_tokens() > 0);

        let rows = fold.num_nodes();
        let (q, k, v) = (values(rows, heads, 1), values(rows, kv_heads, 2), values(rows, kv_heads, 3));
        let scatter = Tensor::new(fold.scatter_indices(), &Device::Cpu).unwrap();
        let expand = |tensor: &Tensor| tensor.index_select(&scatter, 0).unwrap();
        let full = expand(&attend_tensors([&q, &k, &v], &plan, 2.0));
        let (q, k, v) = (expand(&q), expand(&k), expand(&v));
        let plan = AttentionPlan::new(&fold, FoldLevel::None);
        let none = attend_tensors([&q, &k, &v], &plan, 2.0);

        let lengths: Vec<u32> = batch.iter().map(|seq| seq.len() as u32).collect();
        let lengths = Tensor::new(lengths, &Device::Cpu).unwrap();
        for candle in [flash_attn_varlen_cpu, flash_attn_varlen_unfused] {
            let expected = candle(&q, &k, &v, None, &lengths, &lengths, 40, 40, 2.0, true, None, None);
            let expected = expected.unwrap();
            prop_assert!(largest_difference(&none, &expected) < TOLERANCE);
            prop_assert!(largest_difference(&full, &expected) < TOLERANCE);
        }
    }
}

#[test]
fn a_plan_counts_its_pairs() {
    let fold = fold(
        &[vec![1, 2, 3], vec![1, 2, 4, 5], vec![1, 2, 4]],
        Layout::FirstOccurrence,
    );
    let pairs = |level| AttentionPlan::new(&fold, level).pairs();
    assert_eq!(pairs(FoldLevel::None), 6 + 10 + 6);
    // Rows 0..3, then two new rows after a prefix of two.
    assert_eq!(pairs(FoldLevel::Full), 6 + 2 * 2 + 3);
}
