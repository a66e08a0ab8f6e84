//! Both forms of tree attention against the oracle.

use super::{DTYPES, bits, of_bits, written_before};
use crate::common::{Case, SCALE, batches, blocks, cases, differences, fold, inputs};
use candle_core::{DType, Device, Tensor};
use libloading::{Library, Symbol};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use radix_mlp_kernels::query_block;

/// As in tree_attention.cu.
#[repr(C)]
struct Sizes {
    strides: [i64; 6],
    rows: u32,
    heads: u32,
    group: u32,
    window: u32,
    scale: f32,
    softcap: f32,
}

type Attention = unsafe extern "C" fn(
    u32,
    u32,
    u32,
    u32,
    u32,
    *const u16,
    *const u16,
    *const u16,
    *mut u16,
    *mut f32,
    *const *const u32,
    *const Sizes,
    *mut u32,
);

/// Largest differences of output and denominators from the oracle, of Hopper's form on so many multiprocessors or, where
/// there are none, of that for all GPUs.
fn attention(
    library: &Library,
    sequences: &[Vec<u32>],
    case: Case,
    dtype: DType,
    processors: u32,
) -> (f64, f64) {
    let fold = fold(sequences);
    let given = inputs(&fold, case, dtype);
    let (rows, dim) = (fold.num_rows(), case.head_dim);
    let heads = case.kv_heads * case.group;
    let blocks = blocks(&fold, case.group);
    let offsets = [blocks.full(), blocks.partial()]
        .map(|lists| -> Vec<u32> { lists.offsets.iter().map(|&at| at as u32).collect() });
    let numbers = [
        fold.subtree_end().unwrap(),
        fold.position_ids(),
        &offsets[0],
        &blocks.full().indices,
        &offsets[1],
        &blocks.partial().indices,
    ]
    .map(<[u32]>::as_ptr);
    let [mut q, mut k, mut v] = given.each_ref().map(bits);
    for array in [&mut q, &mut k, &mut v] {
        written_before(library, array);
    }
    let row = |heads: usize| (heads * dim) as i64;
    let (q_row, k_row, head) = (row(heads), row(case.kv_heads), dim as i64);
    let sizes = Sizes {
        strides: [q_row, head, k_row, head, k_row, head],
        rows: rows as u32,
        heads: heads as u32,
        group: case.group as u32,
        window: case.window.unwrap_or(0),
        scale: SCALE,
        softcap: case.softcap.unwrap_or(0.0),
    };
    // NaN, which must be gone.
    let (mut out, mut lse) = (
        vec![u16::MAX; rows * heads * dim],
        vec![f32::NAN; heads * rows],
    );
    let tiles = rows.div_ceil(query_block(case.group)) as u32;
    let mut next = 0;
    // SAFETY: the symbol has this type, and the arrays the sizes that the kernel is told.
    unsafe {
        let run: Symbol<'_, Attention> = library.get(b"emulate_tree_attention").unwrap();
        run(
            (dtype == DType::BF16).into(),
            dim as u32,
            processors,
            tiles,
            case.kv_heads as u32,
            q.as_ptr(),
            k.as_ptr(),
            v.as_ptr(),
            out.as_mut_ptr(),
            lse.as_mut_ptr(),
            numbers.as_ptr(),
            &sizes,
            &mut next,
        );
    }
    // Blocks ask once for each item behind their first, and once more.
    if processors > 0 {
        assert_eq!(next, tiles * case.kv_heads as u32);
    }
    let out = of_bits(out, &[rows, heads, dim], dtype);
    let lse = Tensor::from_vec(lse, (heads, rows), &Device::Cpu).unwrap();
    differences(&fold, given.each_ref(), case, &out, &lse)
}

pub fn attends(library: &Library) {
    // The same batches each time: an emulated tile takes milliseconds, so that few are drawn.
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::with_cases(24), rng);
    let drawn = (
        batches(120),
        cases(&[64, 128]),
        prop::sample::select(&DTYPES[..]),
        prop_oneof![Just(0), 1_u32..4],
    );
    let checked = runner.run(&drawn, |(sequences, case, dtype, processors)| {
        let (out, lse) = attention(library, &sequences, case, dtype, processors);
        // Weights and outputs are rounded to 8 and 11 bits; values are of -1 to 1.
        let bound = if dtype == DType::BF16 { 8e-3 } else { 1e-3 };
        prop_assert!(out < bound && lse < 1e-4, "{} {}", out, lse);
        Ok(())
    });
    checked.unwrap();
    beyond_a_window(library);
}

/// A sequence with key blocks that all of a tile's queries come after, and that lie beyond the window of some.
fn beyond_a_window(library: &Library) {
    let case = Case {
        kv_heads: 1,
        group: 2,
        head_dim: 64,
        window: Some(40),
        softcap: None,
    };
    for processors in [0, 2] {
        let (out, lse) = attention(library, &[vec![1; 300]], case, DType::F16, processors);
        assert!(out < 1e-3 && lse < 1e-4, "{out} {lse}");
    }
}
