//! Elementwise loops over f32 rows, compiled for the widest vectors of the machine.

use rayon::prelude::*;

/// Accumulators of a reduction: one AVX-512 register, and a fixed order of summation everywhere.
const LANES: usize = 16;

/// What is done to each row. Its methods are `inline(always)`, as are the functions of this module:
/// what is not inlined is not compiled for the machine's vectors.
pub(super) trait RowKernel: Sync {
    fn run(&self, index: usize, row: &mut [f32]);
}

/// Runs the kernel on every row of `width` elements, in parallel.
pub(super) fn for_each_row(rows: &mut [f32], width: usize, kernel: &impl RowKernel) {
    // Enough work for a thread to be worth waking.
    const ELEMENTS: usize = 1 << 14;
    let block = ELEMENTS.div_ceil(width);
    rows.par_chunks_mut(block * width)
        .enumerate()
        .for_each(|(index, rows)| {
            pulp::Arch::new().dispatch(Block {
                first: index * block,
                rows,
                width,
                kernel,
            });
        });
}

struct Block<'a, K> {
    first: usize,
    rows: &'a mut [f32],
    width: usize,
    kernel: &'a K,
}

impl<K: RowKernel> pulp::NullaryFnOnce for Block<'_, K> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (offset, row) in self.rows.chunks_exact_mut(self.width).enumerate() {
            self.kernel.run(self.first + offset, row);
        }
    }
}

/// e^x to 2 ulp for -87 ≤ x ≤ 88, and e^-87 or e^88 beyond.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // x = n ln 2 + r with |r| ≤ ln 2 / 2; ln 2 in two parts, so that n ln 2 is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding it leaves the rounded integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = (-n).mul_add(LN_2_LOW, (-n).mul_add(LN_2_HIGH, x));
    // The Taylor series; its next term is below 6e-9.
    let mut sum = 1.0 / 5040.0;
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        sum = r.mul_add(sum, coefficient);
    }
    let exponent = rounded.to_bits().wrapping_add(127) << 23;
    sum * f32::from_bits(exponent)
}

#[inline(always)]
pub(super) fn max(row: &[f32]) -> f32 {
    let (blocks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    let all = lanes.iter().chain(rest);
    all.fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
}

/// Replaces each x of the row by e^(x - max), and returns their sum.
#[inline(always)]
pub(super) fn exp_and_sum(row: &mut [f32], max: f32) -> f32 {
    let (blocks, rest) = row.as_chunks_mut::<LANES>();
    let mut lanes = [0.0; LANES];
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *x = exp(*x - max);
            *lane += *x;
        }
    }
    let mut sum = lanes.iter().sum();
    for x in rest {
        *x = exp(*x - max);
        sum += *x;
    }
    sum
}

/// 1 / sqrt(mean of squares + eps)
#[inline(always)]
pub(super) fn inverse_rms(row: &[f32], eps: f32) -> f32 {
    let (blocks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = x.mul_add(x, *lane);
        }
    }
    let sum = lanes.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
    (sum / row.len() as f32 + eps).sqrt().recip()
}

#[cfg(test)]
mod tests {
    use super::{exp, max};

    #[test]
    fn exp_is_within_two_ulp() {
        for step in 0..2_000_000 {
            let x = -87.0 + step as f32 * (175.0 / 2_000_000.0);
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}): {error:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn max_sees_every_element() {
        for len in 1..40 {
            for at in 0..len {
                let mut row = vec![-3.0; len];
                row[at] = -1.0;
                assert_eq!(max(&row), -1.0);
            }
        }
    }
}
