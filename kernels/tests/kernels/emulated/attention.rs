//! Both forms of tree attention against the oracle.

use std::ffi::c_void;

use super::{DTYPES, bits, of_bits, written_before};
use crate::common::{Case, SCALE, batches, cases, differences, fold, inputs, path_mask, values};
use candle_core::{DType, Device, Tensor};
use libloading::{Library, Symbol};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use radix_mlp::Fold;
use radix_mlp_kernels::query_block;

/// As in tree_attention.cuh.
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

/// As in tree_attention.cuh.
#[repr(C, align(16))]
struct KeyBlock([u32; 4]);

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
    *const *const c_void,
    *const Sizes,
    *mut u32,
);

/// Output and denominators of Hopper's form on so many multiprocessors or, where there are none, of that for all GPUs.
fn attention(
    library: &Library,
    fold: &Fold,
    given: &[Tensor; 3],
    case: Case,
    processors: u32,
) -> [Tensor; 2] {
    let dtype = given[0].dtype();
    let (rows, dim) = (fold.num_rows(), case.head_dim);
    let heads = case.kv_heads * case.group;
    let mask = path_mask(fold, case);
    let blocks: Vec<KeyBlock> = mask.blocks().iter().copied().map(KeyBlock).collect();
    let [partial, full] = [mask.partial(), mask.full()]
        .map(|lists| -> Vec<u32> { lists.offsets.iter().map(|&at| at as u32).collect() });
    let numbers: [*const c_void; 7] = [
        mask.depth().as_ptr().cast(),
        blocks.as_ptr().cast(),
        mask.above().as_ptr().cast(),
        partial.as_ptr().cast(),
        mask.partial().indices.as_ptr().cast(),
        full.as_ptr().cast(),
        mask.full().indices.as_ptr().cast(),
    ];
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
    let lse = Tensor::from_vec(lse, (heads, rows), &Device::Cpu).unwrap();
    [of_bits(out, &[rows, heads, dim], dtype), lse]
}

/// Largest differences of output and denominators from the oracle.
fn errors(
    library: &Library,
    sequences: &[Vec<u32>],
    case: Case,
    dtype: DType,
    processors: u32,
) -> (f64, f64) {
    let fold = fold(sequences);
    let given = inputs(&fold, case, dtype);
    let [out, lse] = attention(library, &fold, &given, case, processors);
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
        let (out, lse) = errors(library, &sequences, case, dtype, processors);
        // Weights and outputs are rounded to 8 and 11 bits; values are of -1 to 1.
        let bound = if dtype == DType::BF16 { 8e-3 } else { 1e-3 };
        prop_assert!(out < bound && lse < 1e-4, "{} {}", out, lse);
        Ok(())
    });
    checked.unwrap();
    beyond_a_window(library);
    branches(library);
}

/// A sequence with key blocks that all of a tile's queries come after, and that lie beyond the window of some; and one
/// beyond which nothing can lie.
fn beyond_a_window(library: &Library) {
    for (window, processors) in [(40, 0), (40, 2), (u32::MAX, 0)] {
        let case = Case {
            kv_heads: 1,
            group: 2,
            head_dim: 64,
            window: Some(window),
            softcap: None,
        };
        let (out, lse) = errors(library, &[vec![1; 300]], case, DType::F16, processors);
        assert!(out < 1e-3 && lse < 1e-4, "{out} {lse}");
    }
}

/// Branches that leave a prompt, and each other, within a key block, and go on in further ones: as the oracle has it, and
/// to the bit what each sequence gets alone.
fn branches(library: &Library) {
    let sequence = |branch: u32, twig: u32| -> Vec<u32> {
        let own = |at| 1000 * branch * u32::from(at >= 100) + 9000 * twig * u32::from(at >= 110);
        (0..170).map(|at| at + own(at)).collect()
    };
    let sequences = [(0, 0), (1, 0), (1, 1), (2, 0)].map(|(branch, twig)| sequence(branch, twig));
    let batch = fold(&sequences);
    for (head_dim, window, processors) in [
        (64, None, 0),
        (128, Some(70), 0),
        (64, Some(70), 3),
        (128, None, 3),
    ] {
        let case = Case {
            kv_heads: 1,
            group: 2,
            head_dim,
            window,
            softcap: None,
        };
        let given = inputs(&batch, case, DType::F16);
        let [out, lse] = attention(library, &batch, &given, case, processors);
        let (error, lse_error) = differences(&batch, given.each_ref(), case, &out, &lse);
        assert!(error < 1e-3 && lse_error < 1e-4, "{error} {lse_error}");
        for (sequence, ends) in sequences.iter().zip(batch.cu_seq_lengths().windows(2)) {
            let rows = &batch.scatter_indices()[ends[0] as usize..ends[1] as usize];
            let rows = Tensor::new(rows, &Device::Cpu).unwrap();
            let of_rows = |x: &Tensor, dim| x.index_select(&rows, dim).unwrap();
            let given = given.each_ref().map(|x| of_rows(x, 0));
            let fold = fold(std::slice::from_ref(sequence));
            let alone = attention(library, &fold, &given, case, processors);
            let found = [of_rows(&out, 0), of_rows(&lse, 1)];
            assert_eq!(found.map(|x| values(&x)), alone.map(|x| values(&x)));
        }
    }
}
