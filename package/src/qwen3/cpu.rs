//! The forward pass in f32 on the CPU: candle holds the weights, the products are `gemm`'s, and the
//! buffers between them are allocated once for all layers.

use candle_core::{Device, Result, Tensor};
use gemm::Parallelism;
use rayon::prelude::*;

use super::attention::{AttentionPlan, Heads, Inputs, attend};
use super::config::Qwen3Config;
use super::gemm::{Matrix, Store, elements, matmul};
use super::rope::RopeTable;
use super::simd::{RowKernel, exp, for_each_row, inverse_rms};
use super::weights::{LayerWeights, Linear, Weights};
use super::{Expansion, Rows};

/// Rows that the position-wise operations of a layer take together, so that what passes between
/// them stays in the cache.
const CHUNK_ROWS: usize = 512;

/// Hidden states after the last norm, \[rows, hidden\].
pub(super) fn forward(
    config: &Qwen3Config,
    weights: &Weights,
    rows: Rows<'_>,
    plan: &AttentionPlan,
    expansion: Option<Expansion<'_>>,
) -> Result<Tensor> {
    let hidden = config.hidden_size;
    let mut states = vec![0.0; rows.input_ids.len() * hidden];
    let embedding = elements(&weights.embedding)?;
    gather_rows(&mut states, embedding.slice()?, hidden, rows.input_ids);

    let mut buffers = Buffers::new(config, rows.input_ids.len(), expansion);
    let rope = RopeTable::new(config, rows.position_ids);
    for layer in &weights.layers {
        buffers.project(config, layer, &states, &rope)?;
        buffers.attend(config, plan, expansion);
        buffers.finish(config, layer, &mut states)?;
    }
    let mut normed = vec![0.0; states.len()];
    let eps = config.rms_norm_eps as f32;
    norm_rows(&mut normed, &states, &weights.norm, eps)?;
    Tensor::from_vec(normed, (rows.input_ids.len(), hidden), &Device::Cpu)
}

/// What passes between the operations of a layer.
struct Buffers {
    /// \[rows, (heads + 2 kv_heads) × head_dim\]
    qkv: Vec<f32>,
    /// \[rows, heads × head_dim\]
    attended: Vec<f32>,
    /// `qkv` and `attended` in original space; empty without an expansion.
    expanded: (Vec<f32>, Vec<f32>),
    /// \[chunk, hidden\]
    normed: Vec<f32>,
    /// \[chunk, 2 intermediate\]
    gate_up: Vec<f32>,
    /// \[chunk, intermediate\]
    activated: Vec<f32>,
}

impl Buffers {
    fn new(config: &Qwen3Config, rows: usize, expansion: Option<Expansion<'_>>) -> Self {
        let chunk = rows.min(CHUNK_ROWS);
        let (qkv, attended) = (config.qkv_width(), config.attention_width());
        let tokens = expansion.map_or(0, |expansion| expansion.scatter_indices.len());
        Self {
            qkv: vec![0.0; rows * qkv],
            attended: vec![0.0; rows * attended],
            expanded: (vec![0.0; tokens * qkv], vec![0.0; tokens * attended]),
            normed: vec![0.0; chunk * config.hidden_size],
            gate_up: vec![0.0; chunk * 2 * config.intermediate_size],
            activated: vec![0.0; chunk * config.intermediate_size],
        }
    }

    /// Norm, q, k and v, their norms and RoPE.
    fn project(
        &mut self,
        config: &Qwen3Config,
        layer: &LayerWeights,
        states: &[f32],
        rope: &RopeTable,
    ) -> Result<()> {
        let (hidden, width) = (config.hidden_size, config.qkv_width());
        let eps = config.rms_norm_eps as f32;
        let (q_norm, k_norm) = (elements(&layer.q_norm)?, elements(&layer.k_norm)?);
        let (q_norm, k_norm) = (q_norm.slice()?, k_norm.slice()?);
        let chunks = states.chunks(CHUNK_ROWS * hidden);
        for (index, (states, qkv)) in chunks
            .zip(self.qkv.chunks_mut(CHUNK_ROWS * width))
            .enumerate()
        {
            let normed = &mut self.normed[..states.len()];
            norm_rows(normed, states, &layer.input_norm, eps)?;
            linear(qkv, Store::Replace, normed, &layer.qkv)?;
            let norm_and_rotate = NormAndRotate {
                head_dim: config.head_dim,
                q_heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                q_norm,
                k_norm,
                eps,
                rope,
                first_row: index * CHUNK_ROWS,
            };
            for_each_row(qkv, width, &norm_and_rotate);
        }
        Ok(())
    }

    fn attend(
        &mut self,
        config: &Qwen3Config,
        plan: &AttentionPlan,
        expansion: Option<Expansion<'_>>,
    ) {
        let (qkv_width, width) = (config.qkv_width(), config.attention_width());
        match expansion {
            None => attend_qkv(config, &self.qkv, &mut self.attended, plan),
            Some(expansion) => {
                let (qkv, attended) = &mut self.expanded;
                gather_rows(qkv, &self.qkv, qkv_width, expansion.scatter_indices);
                attend_qkv(config, qkv, attended, plan);
                gather_rows(&mut self.attended, attended, width, expansion.fold_gather);
            }
        }
    }

    /// Output projection and MLP, both added to the states.
    fn finish(
        &mut self,
        config: &Qwen3Config,
        layer: &LayerWeights,
        states: &mut [f32],
    ) -> Result<()> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let eps = config.rms_norm_eps as f32;
        let chunks = states.chunks_mut(CHUNK_ROWS * hidden);
        for (states, attended) in
            chunks.zip(self.attended.chunks(CHUNK_ROWS * config.attention_width()))
        {
            let rows = states.len() / hidden;
            linear(states, Store::Add, attended, &layer.output)?;
            let normed = &mut self.normed[..states.len()];
            norm_rows(normed, states, &layer.mlp_norm, eps)?;
            let gate_up = &mut self.gate_up[..rows * 2 * intermediate];
            linear(gate_up, Store::Replace, normed, &layer.gate_up)?;
            let activated = &mut self.activated[..rows * intermediate];
            for_each_row(activated, intermediate, &Swiglu { gate_up });
            linear(states, Store::Add, activated, &layer.down)?;
        }
        Ok(())
    }
}

fn attend_qkv(config: &Qwen3Config, qkv: &[f32], output: &mut [f32], plan: &AttentionPlan) {
    let head_dim = config.head_dim;
    let (q_heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let part = |first_head, heads| Heads {
        // Without rows there is no part to skip to.
        data: qkv.get(first_head * head_dim..).unwrap_or_default(),
        heads,
        head_dim,
        row_stride: config.qkv_width(),
    };
    let inputs = Inputs {
        q: part(0, q_heads),
        k: part(q_heads, kv_heads),
        v: part(q_heads + kv_heads, kv_heads),
        scale: (head_dim as f32).sqrt().recip(),
    };
    attend(output, inputs, plan);
}

/// `output` (+)= `x` · weight + bias
fn linear(output: &mut [f32], store: Store, x: &[f32], layer: &Linear) -> Result<()> {
    let (width, columns) = layer.weight.dims2()?;
    let rows = x.len() / width;
    let weight = elements(&layer.weight)?;
    let weight = Matrix::new(weight.slice()?, width, columns, columns);
    let x = Matrix::new(x, rows, width, width);
    // 0: as many threads as the pool has.
    matmul(output, columns, store, x, weight, Parallelism::Rayon(0));
    if let Some(bias) = &layer.bias {
        let bias = elements(bias)?;
        for_each_row(
            output,
            columns,
            &AddRow {
                bias: bias.slice()?,
            },
        );
    }
    Ok(())
}

/// `to` = RMS norm of the rows of `from`, as wide as the weight.
fn norm_rows(to: &mut [f32], from: &[f32], weight: &Tensor, eps: f32) -> Result<()> {
    let weight = elements(weight)?;
    let weight = weight.slice()?;
    for_each_row(to, weight.len(), &Norm { from, weight, eps });
    Ok(())
}

/// RMS norm of the rows of `from`.
struct Norm<'a> {
    from: &'a [f32],
    weight: &'a [f32],
    eps: f32,
}

impl RowKernel for Norm<'_> {
    #[inline(always)]
    fn run(&self, index: usize, row: &mut [f32]) {
        let from = &self.from[index * row.len()..][..row.len()];
        let scale = inverse_rms(from, self.eps);
        for ((to, x), weight) in row.iter_mut().zip(from).zip(self.weight) {
            *to = x * scale * weight;
        }
    }
}

/// The norms of q and k and RoPE, in rows of q, k and v.
struct NormAndRotate<'a> {
    head_dim: usize,
    q_heads: usize,
    kv_heads: usize,
    q_norm: &'a [f32],
    k_norm: &'a [f32],
    eps: f32,
    rope: &'a RopeTable,
    /// Row of the table for the kernel's row 0.
    first_row: usize,
}

impl RowKernel for NormAndRotate<'_> {
    #[inline(always)]
    fn run(&self, index: usize, row: &mut [f32]) {
        let (cos, sin) = self.rope.row(self.first_row + index);
        let (q, kv) = row.split_at_mut(self.q_heads * self.head_dim);
        let k = &mut kv[..self.kv_heads * self.head_dim];
        for (heads, weight) in [(q, self.q_norm), (k, self.k_norm)] {
            for head in heads.chunks_exact_mut(self.head_dim) {
                let scale = inverse_rms(head, self.eps);
                // The first half of a head is the real parts, the second the imaginary ones.
                let (real, imaginary) = head.split_at_mut(cos.len());
                let (real_weight, imaginary_weight) = weight.split_at(cos.len());
                let weights = real_weight.iter().zip(imaginary_weight);
                let pairs = real.iter_mut().zip(imaginary).zip(weights);
                for (((re, im), (re_weight, im_weight)), (cos, sin)) in
                    pairs.zip(cos.iter().zip(sin))
                {
                    let (x, y) = (*re * scale * re_weight, *im * scale * im_weight);
                    *re = x * cos - y * sin;
                    *im = y * cos + x * sin;
                }
            }
        }
    }
}

/// silu(gate) · up of rows that hold the gates, then the ups.
struct Swiglu<'a> {
    gate_up: &'a [f32],
}

impl RowKernel for Swiglu<'_> {
    #[inline(always)]
    fn run(&self, index: usize, row: &mut [f32]) {
        let width = row.len();
        let (gate, up) = self.gate_up[2 * index * width..][..2 * width].split_at(width);
        for ((to, &gate), &up) in row.iter_mut().zip(gate).zip(up) {
            *to = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

struct AddRow<'a> {
    bias: &'a [f32],
}

impl RowKernel for AddRow<'_> {
    #[inline(always)]
    fn run(&self, _: usize, row: &mut [f32]) {
        for (x, bias) in row.iter_mut().zip(self.bias) {
            *x += bias;
        }
    }
}

/// `to[i] = from[indices[i]]` for rows of `width` elements.
fn gather_rows(to: &mut [f32], from: &[f32], width: usize, indices: &[u32]) {
    to.par_chunks_exact_mut(width)
        .zip(indices)
        .with_min_len(16)
        .for_each(|(to, &index)| {
            to.copy_from_slice(&from[index as usize * width..][..width]);
        });
}
