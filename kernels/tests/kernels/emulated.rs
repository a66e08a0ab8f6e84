//! The CUDA kernels themselves, run by a CPU: `emulator/` runs their sources, compiled as C++, thread by thread. It finds
//! wrong indices, fragments, masks, and missing barriers and waits; what it cannot tell is how fast they are.

use std::ffi::c_void;
use std::path::Path;
use std::process::Command;

use crate::common::{
    Case, SCALE, batches, blocks, cases, difference, differences, drawn, fold, inputs, values,
};
use candle_core::{DType, Device, Tensor};
use libloading::{Library, Symbol};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use radix_mlp_kernels::{Ids, add_rms_norm, gather, norm_rope, query_block, rotary_angles, swiglu};

const DTYPES: [DType; 2] = [DType::BF16, DType::F16];

/// The kernels as a library, or `None` (with the reason printed) without a compiler.
fn library() -> Option<Library> {
    let compiler = std::env::var("CXX").unwrap_or("c++".to_owned());
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libemulated.so");
    let mut command = Command::new(&compiler);
    // As CUDA, which lets a pair of halves be read as 32 bits.
    command.args([
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        "-fno-strict-aliasing",
    ]);
    command.arg("-I").arg(here.join("tests/kernels/emulator"));
    command.arg("-I").arg(here.join("cuda"));
    command.args(["-x", "c++", "-o"]).arg(&library);
    command.arg(here.join("tests/kernels/emulator/library.cpp"));
    let Ok(output) = command.output() else {
        println!("skipped: no C++ compiler {compiler} (set CXX)");
        return None;
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    // SAFETY: a library without initialisers that do anything.
    Some(unsafe { Library::new(library) }.unwrap())
}

/// 16-bit elements, as they are in memory.
fn bits(x: &Tensor) -> Vec<u16> {
    let x = x.flatten_all().unwrap();
    match x.dtype() {
        DType::BF16 => x
            .to_vec1::<half::bf16>()
            .unwrap()
            .into_iter()
            .map(half::bf16::to_bits)
            .collect(),
        _ => x
            .to_vec1::<half::f16>()
            .unwrap()
            .into_iter()
            .map(half::f16::to_bits)
            .collect(),
    }
}

fn of_bits(bits: Vec<u16>, shape: &[usize], dtype: DType) -> Tensor {
    match dtype {
        DType::BF16 => {
            let values: Vec<_> = bits.into_iter().map(half::bf16::from_bits).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        }
        _ => {
            let values: Vec<_> = bits.into_iter().map(half::f16::from_bits).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        }
    }
}

/// Has the kernel before the next one write what `array` has: the next one finds it when it has awaited that, no sooner.
fn written_before<T>(library: &Library, array: &mut [T]) {
    type Previous = unsafe extern "C" fn(*mut c_void, u64);
    // SAFETY: the symbol has this type. The array is plain numbers, and outlives the next kernel, which gives it back.
    unsafe {
        let previous: Symbol<'_, Previous> = library.get(b"emulate_previous").unwrap();
        previous(array.as_mut_ptr().cast(), size_of_val(array) as u64);
    }
}

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

fn attends(library: &Library) {
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

type AddRmsNorm = unsafe extern "C" fn(
    u32,
    u32,
    u32,
    *const u16,
    *const u16,
    *const u16,
    *mut u16,
    *mut u16,
    u32,
    f32,
);

fn norms(library: &Library, dtype: DType) {
    const EPSILON: f32 = 1e-5;
    for (rows, width, threads) in [
        (3, 8, 32),
        (2, 1024, 128),
        (2, 2560, 320),
        (1, 12_288, 1024),
    ] {
        let [x, delta] = [1, 2].map(|seed| drawn(&[rows, width], seed, dtype));
        let weight = drawn(&[width], 3, dtype);
        let [mut x_bits, mut delta_bits, weight_bits] = [&x, &delta, &weight].map(bits);
        for with_delta in [true, false] {
            written_before(library, &mut x_bits);
            written_before(library, &mut delta_bits);
            let mut sum = vec![u16::MAX; rows * width];
            let mut normed = sum.clone();
            let pointers = match with_delta {
                true => (delta_bits.as_ptr(), sum.as_mut_ptr()),
                false => (std::ptr::null(), std::ptr::null_mut()),
            };
            // SAFETY: the symbol has this type, and the arrays the sizes that the kernel is told.
            unsafe {
                let run: Symbol<'_, AddRmsNorm> = library.get(b"emulate_add_rms_norm").unwrap();
                run(
                    (dtype == DType::BF16).into(),
                    rows as u32,
                    threads,
                    x_bits.as_ptr(),
                    pointers.0,
                    weight_bits.as_ptr(),
                    pointers.1,
                    normed.as_mut_ptr(),
                    (width / 8) as u32,
                    EPSILON,
                );
            }
            let delta = with_delta.then_some(&delta);
            let (expected_sum, expected) = add_rms_norm(&x, delta, &weight, EPSILON).unwrap();
            if with_delta {
                assert_eq!(sum, bits(&expected_sum));
            }
            close(&of_bits(normed, &[rows, width], dtype), &expected);
        }
    }
}

/// Equal but for the last bit of values of up to 4, where candle rounds in between.
fn close(found: &Tensor, expected: &Tensor) {
    let bound = if found.dtype() == DType::BF16 {
        6e-2
    } else {
        8e-3
    };
    let difference = difference(&values(found), &values(expected));
    assert!(difference < bound, "{:?}: {difference:e}", found.dtype());
}

type NormRope = unsafe extern "C" fn(
    u32,
    u32,
    u32,
    *const u16,
    *const u16,
    *const u16,
    *const f32,
    *const f32,
    *mut u16,
    *const u32,
    f32,
);

fn rotations(library: &Library, dtype: DType) {
    const EPSILON: f32 = 1e-5;
    for ([q, k], dim, threads) in [
        ([1, 1], 8, 64),
        ([4, 2], 64, 192),
        ([3, 2], 96, 64),
        ([16, 8], 128, 128),
    ] {
        let (rows, all) = (3, q + 2 * k);
        let heads = drawn(&[rows, all, dim], 1, dtype);
        let weights = [2, 3].map(|seed| drawn(&[dim], seed, dtype));
        let angles = drawn(&[rows, dim / 2], 4, DType::F32);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let expected = norm_rope(&heads, weights.each_ref(), [&cos, &sin], [q, k], EPSILON);
        let [cos, sin] = [cos, sin].map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let [mut heads, q_weight, k_weight] = [&heads, &weights[0], &weights[1]].map(bits);
        written_before(library, &mut heads);
        let mut out = vec![u16::MAX; rows * (q + k) * dim];
        let pieces = dim / 8;
        let sizes = [all, q, k, pieces, pieces.next_power_of_two()].map(|size| size as u32);
        // SAFETY: the symbol has this type, and the arrays the sizes that the kernel is told.
        unsafe {
            let run: Symbol<'_, NormRope> = library.get(b"emulate_norm_rope").unwrap();
            run(
                (dtype == DType::BF16).into(),
                rows as u32,
                threads,
                heads.as_ptr(),
                q_weight.as_ptr(),
                k_weight.as_ptr(),
                cos.as_ptr(),
                sin.as_ptr(),
                out.as_mut_ptr(),
                sizes.as_ptr(),
                EPSILON,
            );
        }
        close(
            &of_bits(out, &[rows, q + k, dim], dtype),
            &expected.unwrap(),
        );
    }
}

fn angles(library: &Library) {
    type Angles = unsafe extern "C" fn(u32, *const u32, *const f32, *mut f32, *mut f32, u64, u32);
    for (rows, pairs) in [(1, 4), (9, 64), (5, 128)] {
        let mut positions: Vec<u32> = (0..rows as u32).map(|row| row * row * 1600).collect();
        written_before(library, &mut positions);
        // More follow that are not read.
        let frequencies: Vec<f32> = (0..128).map(|at| 1.0 / (1 + at) as f32).collect();
        let mut found = [vec![f32::NAN; rows * pairs], vec![f32::NAN; rows * pairs]];
        let count = (rows * pairs) as u64;
        let [cos, sin] = found.each_mut().map(|table| table.as_mut_ptr());
        // SAFETY: the symbol has this type, and the arrays the sizes that the kernel is told.
        unsafe {
            let run: Symbol<'_, Angles> = library.get(b"emulate_rotary_angles").unwrap();
            let (positions, frequencies) = (positions.as_ptr(), frequencies.as_ptr());
            let blocks = count.div_ceil(256) as u32;
            run(
                blocks,
                positions,
                frequencies,
                cos,
                sin,
                count,
                pairs as u32,
            );
        }
        let expected = rotary_angles(&positions, &frequencies[..pairs], &Device::Cpu).unwrap();
        for (found, expected) in found.iter().zip(&expected) {
            let found: Vec<f64> = found.iter().copied().map(f64::from).collect();
            // Of two libraries.
            assert!(difference(&found, &values(expected)) < 2e-7);
        }
    }
}

fn activations(library: &Library, dtype: DType) {
    type Swiglu = unsafe extern "C" fn(u32, u32, u32, *const u16, *mut u16, u64, u32);
    for (rows, width) in [(1, 8), (3, 64), (2, 2560)] {
        let gate_up = drawn(&[rows, 2 * width], 1, dtype);
        let mut given = bits(&gate_up);
        written_before(library, &mut given);
        let mut out = vec![u16::MAX; rows * width];
        let count = (rows * width / 8) as u64;
        // SAFETY: the symbol has this type, and the arrays the sizes that the kernel is told.
        unsafe {
            let run: Symbol<'_, Swiglu> = library.get(b"emulate_swiglu").unwrap();
            let blocks = count.div_ceil(256) as u32;
            let units = (width / 8) as u32;
            run(
                (dtype == DType::BF16).into(),
                blocks,
                256,
                given.as_ptr(),
                out.as_mut_ptr(),
                count,
                units,
            );
        }
        close(
            &of_bits(out, &[rows, width], dtype),
            &swiglu(&gate_up).unwrap(),
        );
    }
}

type IndexSelect = unsafe extern "C" fn(
    u32,
    u32,
    u32,
    u32,
    u32,
    *const *const c_void,
    *const c_void,
    *const *mut c_void,
    u64,
    *const u32,
    u32,
    u32,
    u32,
);

/// Three tensors of bytes, in units of every size.
fn selections(library: &Library) {
    let ids: Vec<u32> = (0..37).map(|at| at * 7 % 11).collect();
    let wide_ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
    let checked = Ids::new(&ids, 11, &Device::Cpu).unwrap();
    for (unit, wide) in [1, 2, 4, 8, 16]
        .into_iter()
        .flat_map(|unit| [(unit, false), (unit, true)])
    {
        // Within a chunk; chunks that a row fills, begins, or leaves to some lanes; rows that end before the widest's last chunk.
        for (widths, lanes, slices, chunks) in [
            ([1, 2, 3], 4, 1, 1),
            ([33, 200, 1], 32, 1, 2),
            ([128, 129, 256], 32, 1, 2),
            ([610, 40, 257], 32, 2, 3),
        ] {
            let x = widths.map(|width| {
                let count = 11 * width * unit;
                let bytes: Vec<u8> = (0..count).map(|at| (at * 31 % 251) as u8).collect();
                Tensor::from_vec(bytes, (11, width * unit), &Device::Cpu).unwrap()
            });
            let expected = gather(x.each_ref(), &checked).unwrap();
            let bytes = x.map(|x| x.flatten_all().unwrap().to_vec1::<u8>().unwrap());
            // With a row behind the last, which stays as it is.
            let mut out = widths.map(|width| vec![255_u8; (ids.len() + 1) * width * unit]);
            let sources = bytes.each_ref().map(|bytes| bytes.as_ptr().cast());
            let targets = out.each_mut().map(|bytes| bytes.as_mut_ptr().cast());
            let id_pointer = if wide {
                wide_ids.as_ptr().cast()
            } else {
                ids.as_ptr().cast()
            };
            let units = widths.map(|width| width as u32);
            let row_blocks = ids.len().div_ceil(256 / lanes as usize) as u32;
            // SAFETY: the symbol has this type, and the arrays the sizes that the kernel is told.
            unsafe {
                let run: Symbol<'_, IndexSelect> = library.get(b"emulate_index_select").unwrap();
                run(
                    unit as u32,
                    wide.into(),
                    3,
                    row_blocks * slices * chunks,
                    256,
                    sources.as_ptr(),
                    id_pointer,
                    targets.as_ptr(),
                    ids.len() as u64,
                    units.as_ptr(),
                    lanes,
                    chunks,
                    row_blocks,
                );
            }
            for (found, expected) in out.iter().zip(&expected) {
                let mut expected = expected.flatten_all().unwrap().to_vec1::<u8>().unwrap();
                expected.resize(found.len(), 255);
                assert_eq!(found, &expected, "units of {unit}, {widths:?}");
            }
        }
    }
}

#[test]
fn kernels_compute_what_their_oracles_do() {
    let Some(library) = library() else {
        return;
    };
    selections(&library);
    angles(&library);
    for dtype in DTYPES {
        norms(&library, dtype);
        rotations(&library, dtype);
        activations(&library, dtype);
    }
    attends(&library);
}
