use rayon::prelude::*;

use super::config::Qwen3Config;

/// Rotary position embedding of the rows of one forward pass, in f32 as transformers computes it.
pub(super) struct RopeTable {
    /// head_dim / 2
    width: usize,
    /// \[rows, width\]
    cos: Vec<f32>,
    /// \[rows, width\]
    sin: Vec<f32>,
}

impl RopeTable {
    pub fn new(config: &Qwen3Config, position_ids: &[u32]) -> Self {
        let inverse_frequencies = inverse_frequencies(config);
        let width = inverse_frequencies.len();
        let mut table = Self {
            width,
            cos: vec![0.0; position_ids.len() * width],
            sin: vec![0.0; position_ids.len() * width],
        };
        let cos = table.cos.par_chunks_exact_mut(width);
        let sin = table.sin.par_chunks_exact_mut(width);
        cos.zip(sin)
            .zip(position_ids)
            .for_each(|((cos, sin), &position)| {
                for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&inverse_frequencies) {
                    (*sin, *cos) = (position as f32 * frequency).sin_cos();
                }
            });
        table
    }

    /// Cosines and sines of one row, \[head_dim / 2\] each.
    #[inline(always)]
    pub fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let row = row * self.width..(row + 1) * self.width;
        (&self.cos[row.clone()], &self.sin[row])
    }
}

/// Radians from one position to the next, \[head_dim / 2\].
pub(super) fn inverse_frequencies(config: &Qwen3Config) -> Vec<f32> {
    let of_pair = |i| {
        let exponent = i as f32 / config.head_dim as f32;
        (config.rope_theta as f32).powf(exponent).recip() / config.rope_factor as f32
    };
    (0..config.head_dim).step_by(2).map(of_pair).collect()
}
