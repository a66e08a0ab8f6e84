//! Norms, rotary angles and embedding, and SwiGLU against the same operations on the CPU.

use super::{bits, of_bits, written_before};
use crate::common::{difference, drawn, values};
use candle_core::{DType, Device, Tensor};
use libloading::{Library, Symbol};
use radix_mlp_kernels::{add_rms_norm, norm_rope, rotary_angles, swiglu};

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

pub fn norms(library: &Library, dtype: DType) {
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

pub fn rotations(library: &Library, dtype: DType) {
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

pub fn angles(library: &Library) {
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

pub fn activations(library: &Library, dtype: DType) {
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
