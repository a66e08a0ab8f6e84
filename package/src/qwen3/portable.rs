//! The forward pass in candle's operations, for every dtype: slower than [`super::cpu`], and what
//! that is tested against.

use candle_core::{Result, Tensor};
use candle_nn::ops::{rms_norm, swiglu};

use super::attention::{AttentionPlan, attend_tensors};
use super::config::Qwen3Config;
use super::rope::RopeTable;
use super::weights::{LayerWeights, Linear, Weights};
use super::{Expansion, Rows};

/// Hidden states after the last norm, \[rows, hidden\], in the dtype of the weights.
pub(super) fn forward(
    config: &Qwen3Config,
    weights: &Weights,
    rows: Rows<'_>,
    plan: &AttentionPlan,
    expansion: Option<Expansion<'_>>,
) -> Result<Tensor> {
    let (device, dtype) = (weights.embedding.device(), weights.embedding.dtype());
    let (cos, sin) = RopeTable::new(config, rows.position_ids).into_parts();
    let table = |values: Vec<f32>| {
        let shape = (rows.position_ids.len(), config.head_dim / 2);
        Tensor::from_vec(values, shape, device)?.to_dtype(dtype)
    };
    let rope = (table(cos)?, table(sin)?);
    let gather = |indices: &[u32]| Tensor::new(indices, device);
    let expansion = match expansion {
        Some(maps) => Some((gather(maps.scatter_indices)?, gather(maps.fold_gather)?)),
        None => None,
    };
    let mut states = weights
        .embedding
        .index_select(&gather(rows.input_ids)?, 0)?;
    for layer in &weights.layers {
        let attended = attention(config, layer, &states, &rope, plan, expansion.as_ref())?;
        states = (states + linear(&attended, &layer.output)?)?;
        let normed = norm(config, &states, &layer.mlp_norm)?;
        let activated = swiglu(&linear(&normed, &layer.gate_up)?)?;
        states = (states + linear(&activated, &layer.down)?)?;
    }
    norm(config, &states, &weights.norm)
}

/// \[rows, heads × head_dim\]
fn attention(
    config: &Qwen3Config,
    layer: &LayerWeights,
    states: &Tensor,
    rope: &(Tensor, Tensor),
    plan: &AttentionPlan,
    expansion: Option<&(Tensor, Tensor)>,
) -> Result<Tensor> {
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let qkv = linear(&norm(config, states, &layer.input_norm)?, &layer.qkv)?;
    let qkv = qkv.reshape(((), heads + 2 * kv_heads, config.head_dim))?;
    let part = |start, len| qkv.narrow(1, start, len)?.contiguous();
    let q = rotate(&norm(config, &part(0, heads)?, &layer.q_norm)?, rope)?;
    let k = rotate(&norm(config, &part(heads, kv_heads)?, &layer.k_norm)?, rope)?;
    let v = part(heads + kv_heads, kv_heads)?;
    let scale = (config.head_dim as f32).sqrt().recip();
    let attended = match expansion {
        None => attend_tensors([&q, &k, &v], plan, scale)?,
        Some((scatter, gather)) => {
            let expand = |rows: &Tensor| rows.index_select(scatter, 0);
            let (q, k, v) = (expand(&q)?, expand(&k)?, expand(&v)?);
            attend_tensors([&q, &k, &v], plan, scale)?.index_select(gather, 0)?
        }
    };
    attended.flatten_from(1)
}

fn norm(config: &Qwen3Config, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    rms_norm(x, weight, config.rms_norm_eps as f32)
}

fn linear(x: &Tensor, layer: &Linear) -> Result<Tensor> {
    let product = x.matmul(&layer.weight)?;
    match &layer.bias {
        Some(bias) => product.broadcast_add(bias),
        None => Ok(product),
    }
}

/// RoPE of \[rows, heads, head_dim\] by tables \[rows, head_dim / 2\].
fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let x = x.transpose(0, 1)?.unsqueeze(0)?.contiguous()?;
    let rotated = candle_nn::rotary_emb::rope(&x, cos, sin)?;
    rotated.squeeze(0)?.transpose(0, 1)?.contiguous()
}
