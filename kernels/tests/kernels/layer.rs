//! Norms, rotary embedding and SwiGLU against their definitions in float64.

use crate::common::{difference, drawn, values};
use candle_core::{DType, Device, Tensor};
use radix_mlp_kernels::{KernelError, add_rms_norm, norm_rope, rotary_angles, swiglu};

const EPSILON: f32 = 1e-5;

/// Rounding of a result of up to about 4, and of what candle rounds between on the CPU.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 6e-2,
        DType::F16 => 8e-3,
        _ => 4e-6,
    }
}

/// x / rms(x) * weight of rows as wide as the weight.
fn normed(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let row = |row: &[f64]| -> Vec<f64> {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let scale = (mean + f64::from(EPSILON)).sqrt().recip();
        row.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
    };
    x.chunks(weight.len()).flat_map(row).collect()
}

fn norms(rows: usize, width: usize, dtype: DType, device: &Device) {
    let of = |shape: &[usize], seed| drawn(shape, seed, dtype).to_device(device).unwrap();
    let (x, delta) = (of(&[rows, width], 1), of(&[rows, width], 2));
    let weight = of(&[width], 3);
    let (sum, found) = add_rms_norm(&x, Some(&delta), &weight, EPSILON).unwrap();
    let pairs = values(&x).into_iter().zip(values(&delta));
    let expected: Vec<f64> = pairs.map(|(x, y)| x + y).collect();
    assert!(difference(&values(&sum), &expected) < bound(dtype) / 8.0);
    // Of the sum as it is stored.
    let expected = normed(&values(&sum), &values(&weight));
    let error = difference(&values(&found), &expected);
    assert!(error < bound(dtype), "{dtype:?} {rows}×{width}: {error:e}");

    let (same, found) = add_rms_norm(&x, None, &weight, EPSILON).unwrap();
    assert_eq!(values(&same), values(&x));
    let error = difference(&values(&found), &normed(&values(&x), &values(&weight)));
    assert!(error < bound(dtype), "{dtype:?} {rows}×{width}: {error:e}");
}

fn rotations(rows: usize, counts: [usize; 2], head_dim: usize, dtype: DType, device: &Device) {
    let to = |x: Tensor| x.to_device(device).unwrap();
    // Values follow the keys, and are left alone.
    let all = counts[0] + 2 * counts[1];
    let heads = to(drawn(&[rows, all, head_dim], 1, dtype));
    let weights = [
        to(drawn(&[head_dim], 2, dtype)),
        to(drawn(&[head_dim], 3, dtype)),
    ];
    let half = head_dim / 2;
    let table = |f: fn(f64) -> f64| {
        let value = |at: usize| f((at / half) as f64 / (1 + at % half) as f64) as f32;
        let table: Vec<f32> = (0..rows * half).map(value).collect();
        to(Tensor::from_vec(table, (rows, half), &Device::Cpu).unwrap())
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let found = norm_rope(&heads, weights.each_ref(), [&cos, &sin], counts, EPSILON).unwrap();
    assert_eq!(found.dims(), [rows, counts[0] + counts[1], head_dim]);

    let (values_of_heads, cos, sin) = (values(&heads), values(&cos), values(&sin));
    let weights = weights.map(|weight| values(&weight));
    let mut expected = Vec::new();
    for row in 0..rows {
        for head in 0..counts[0] + counts[1] {
            let x = &values_of_heads[(row * all + head) * head_dim..][..head_dim];
            let x = normed(x, &weights[usize::from(head >= counts[0])]);
            let angle = |at: usize| (cos[row * half + at], sin[row * half + at]);
            expected.extend((0..half).map(|at| x[at] * angle(at).0 - x[half + at] * angle(at).1));
            expected.extend((0..half).map(|at| x[half + at] * angle(at).0 + x[at] * angle(at).1));
        }
    }
    let error = difference(&values(&found), &expected);
    assert!(
        error < bound(dtype),
        "{dtype:?} {rows} {counts:?} {head_dim}: {error:e}"
    );
}

/// Where RoPE's angles are largest the product with the frequency is rounded by 4e-3: it is part of the definition.
fn angles(rows: usize, pairs: usize, device: &Device) {
    let positions: Vec<u32> = (0..rows as u32).map(|row| row * 131_071 / 7).collect();
    let exponents = (0..pairs).map(|pair| -(pair as f32) / pairs as f32);
    let frequencies: Vec<f32> = exponents.map(|x| 1e6_f32.powf(x)).collect();
    let tables = rotary_angles(&positions, &frequencies, device).unwrap();
    for (table, f) in tables.iter().zip([f64::cos, f64::sin]) {
        assert_eq!(table.dims(), [rows, pairs]);
        let of = |&position: &u32| {
            let angles = frequencies.iter().map(move |x| position as f32 * x);
            angles.map(|angle| f(f64::from(angle)))
        };
        let expected: Vec<f64> = positions.iter().flat_map(of).collect();
        let error = difference(&values(table), &expected);
        assert!(error < 2e-7, "{rows}×{pairs}: {error:e}");
    }
}

fn activations(rows: usize, width: usize, dtype: DType, device: &Device) {
    let gate_up = drawn(&[rows, 2 * width], 1, dtype);
    let gate_up = (gate_up * 4.0).unwrap().to_device(device).unwrap();
    let found = swiglu(&gate_up).unwrap();
    let row = |row: &[f64]| -> Vec<f64> {
        let (gates, ups) = row.split_at(width);
        let pairs = gates.iter().zip(ups);
        pairs.map(|(x, up)| x / (1.0 + (-x).exp()) * up).collect()
    };
    let expected: Vec<f64> = values(&gate_up).chunks(2 * width).flat_map(row).collect();
    let error = difference(&values(&found), &expected);
    // Up to 16 instead of up to 4.
    assert!(
        error < 4.0 * bound(dtype),
        "{dtype:?} {rows}×{width}: {error:e}"
    );
}

fn all(dtypes: &[DType], device: &Device) {
    for (rows, pairs) in [(1, 4), (7, 64), (8, 128)] {
        angles(rows, pairs, device);
    }
    for &dtype in dtypes {
        for (rows, width) in [(1, 8), (3, 64), (5, 1024), (2, 2560), (2, 12_288)] {
            norms(rows, width, dtype, device);
            activations(rows, width, dtype, device);
        }
        for (counts, head_dim) in [
            ([1, 1], 8),
            ([4, 2], 64),
            ([16, 8], 128),
            ([3, 3], 96),
            ([40, 8], 256),
        ] {
            rotations(5, counts, head_dim, dtype, device);
        }
    }
}

#[test]
fn on_the_cpu() {
    all(&[DType::F32, DType::BF16, DType::F16], &Device::Cpu);
}

#[cfg(feature = "cuda")]
#[test]
#[ignore = "needs a CUDA device"]
fn on_cuda() {
    all(
        &[DType::BF16, DType::F16],
        &radix_mlp_kernels::cuda_device(0).unwrap(),
    );
}

#[test]
fn tensors_that_do_not_go_together_are_refused() {
    let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu).unwrap();
    let x = zeros(&[3, 8], DType::F32);
    let weight = zeros(&[8], DType::F32);
    let refused = |x: &Tensor, delta: Option<&Tensor>, weight: &Tensor| {
        add_rms_norm(x, delta, weight, EPSILON)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refused(&weight, None, &weight),
        "x must be [rows, width], got shape [8]"
    );
    assert_eq!(
        refused(&x, None, &zeros(&[7], DType::F32)),
        "weight must be [8], got shape [7]"
    );
    let other = zeros(&[2, 8], DType::F32);
    assert_eq!(
        refused(&x, Some(&other), &weight),
        "delta must be [3, 8], got shape [2, 8]"
    );
    let half = zeros(&[8], DType::F16);
    assert_eq!(
        refused(&x, None, &half),
        "weight must be of one dtype with the first, got F16"
    );

    assert!(matches!(
        swiglu(&zeros(&[3, 7], DType::F32)),
        Err(KernelError::Shape { .. })
    ));

    let heads = zeros(&[3, 4, 8], DType::F32);
    let table = zeros(&[3, 4], DType::F32);
    let refused = |heads: &Tensor, table: &Tensor, counts| {
        let tables = [&table.clone(), table];
        norm_rope(heads, [&weight, &weight], tables, counts, EPSILON)
            .unwrap_err()
            .to_string()
    };
    let message = "heads must be [rows, at least 5, an even head_dim], got shape [3, 4, 8]";
    assert_eq!(refused(&heads, &table, [3, 2]), message);
    let short = zeros(&[2, 4], DType::F32);
    assert_eq!(
        refused(&heads, &short, [2, 2]),
        "angles[0] must be [3, 4], got shape [2, 4]"
    );
    let half = zeros(&[3, 4], DType::F16);
    assert_eq!(
        refused(&heads, &half, [2, 2]),
        "angles[0] must be f32, got F16"
    );
}
