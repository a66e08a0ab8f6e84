use candle_core::{DType, Device, Tensor};
use candle_nn::ops;
use candle_nn::rotary_emb::rope;

use crate::KernelError;
use crate::rows::same_device;

/// Widths on CUDA are multiples of it: what a kernel loads at once.
#[cfg(feature = "cuda")]
const UNIT: usize = 8;
/// What the lanes of a warp hold of a head at once.
#[cfg(feature = "cuda")]
const MOST_HEAD_DIM: usize = 256;

/// The residual sum and its norm: `sum = x + delta` \[rows, width\], or `x` itself without a delta, and
/// `sum / sqrt(mean(sum²) + epsilon) * weight` with a weight \[width\]. All of one dtype; the norm is computed in f32.
/// On CUDA f16 and bf16, in widths of whole multiples of 8, and in one pass (RMSNorm, arXiv 1910.07467).
///
/// # Errors
///
/// [`KernelError::Shape`], [`KernelError::DType`] and [`KernelError::Device`] for tensors that do not go together.
pub fn add_rms_norm(
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    epsilon: f32,
) -> Result<(Tensor, Tensor), KernelError> {
    let (_, width) = matrix("x", x)?;
    goes_with("weight", weight, x, &[width])?;
    if let Some(delta) = delta {
        goes_with("delta", delta, x, x.dims())?;
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        for_kernels("x", x, width)?;
        if x.elem_count() == 0 {
            return Ok((x.clone(), x.clone()));
        }
        return Ok(crate::cuda::add_rms_norm(x, delta, weight, epsilon)?);
    }
    let sum = match delta {
        Some(delta) => (x + delta)?,
        None => x.clone(),
    };
    let normed = ops::rms_norm(&sum.contiguous()?, weight, epsilon)?;
    Ok((sum, normed))
}

/// Cosines and sines of the angles by which rows are rotated, two tensors f32 \[rows, pairs\] on `device`: of
/// `positions[row] * inverse_frequencies[pair]`, in f32 as transformers multiplies them (RoPE, arXiv 2104.09864). On CUDA
/// of up to 128 pairs.
///
/// # Errors
///
/// [`KernelError::Shape`] for more pairs than that, and candle's.
pub fn rotary_angles(
    positions: &[u32],
    inverse_frequencies: &[f32],
    device: &Device,
) -> Result<[Tensor; 2], KernelError> {
    let (rows, pairs) = (positions.len(), inverse_frequencies.len());
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        if pairs > MOST_HEAD_DIM / 2 {
            return Err(KernelError::Shape {
                name: "inverse_frequencies",
                expected: format!("[up to {}] on CUDA", MOST_HEAD_DIM / 2),
                found: pairs.into(),
            });
        }
        if rows * pairs == 0 {
            let nothing = Tensor::zeros((rows, pairs), DType::F32, &Device::Cpu)?;
            return Ok([nothing.clone(), nothing]);
        }
        return Ok(crate::cuda::rotary_angles(
            positions,
            inverse_frequencies,
            device,
        )?);
    }
    let positions: Vec<f32> = positions.iter().map(|&position| position as f32).collect();
    let positions = Tensor::from_vec(positions, (rows, 1), device)?;
    let frequencies = Tensor::from_slice(inverse_frequencies, (1, pairs), device)?;
    let angles = positions.broadcast_mul(&frequencies)?;
    Ok([angles.cos()?, angles.sin()?])
}

/// Queries and keys as Qwen3 attends to them. Of `heads` \[rows, all heads, head_dim\], the first `counts[0]` are normed
/// with `weights[0]` \[head_dim\], the `counts[1]` after them with `weights[1]`, as by [`add_rms_norm`], and both are
/// rotated: element i with element i + head_dim / 2, by angles whose cosines and sines are `angles`, f32
/// \[rows, head_dim / 2\], as [`rotary_angles`] gives them (RoPE, arXiv 2104.09864, in the order of transformers' `rotate_half`). Returns both in one
/// tensor, \[rows, counts\[0\] + counts\[1\], head_dim\]. On CUDA f16 and bf16, and head_dim a multiple of 8 up to 256.
///
/// # Errors
///
/// [`KernelError::Shape`], [`KernelError::DType`] and [`KernelError::Device`] for tensors that do not go together.
pub fn norm_rope(
    heads: &Tensor,
    weights: [&Tensor; 2],
    angles: [&Tensor; 2],
    counts: [usize; 2],
    epsilon: f32,
) -> Result<Tensor, KernelError> {
    let (rows, head_dim) = match *heads.dims() {
        [rows, all, head_dim] if counts[0] + counts[1] <= all && head_dim % 2 == 0 => {
            (rows, head_dim)
        }
        _ => {
            let least = counts[0] + counts[1];
            return Err(KernelError::Shape {
                name: "heads",
                expected: format!("[rows, at least {least}, an even head_dim]"),
                found: heads.shape().clone(),
            });
        }
    };
    for (name, weight) in [("weights[0]", weights[0]), ("weights[1]", weights[1])] {
        goes_with(name, weight, heads, &[head_dim])?;
    }
    for (name, table) in [("angles[0]", angles[0]), ("angles[1]", angles[1])] {
        if table.dtype() != DType::F32 {
            return Err(KernelError::DType {
                name,
                expected: "f32",
                found: table.dtype(),
            });
        }
        has_shape(name, table, &[rows, head_dim / 2])?;
        same_device(name, table, heads)?;
    }
    #[cfg(feature = "cuda")]
    if heads.device().is_cuda() {
        for_kernels("heads", heads, head_dim)?;
        if head_dim > MOST_HEAD_DIM {
            return Err(KernelError::Shape {
                name: "heads",
                expected: format!("of heads of up to {MOST_HEAD_DIM} on CUDA"),
                found: heads.shape().clone(),
            });
        }
        if rows * (counts[0] + counts[1]) == 0 {
            return Ok(heads.narrow(1, 0, counts[0] + counts[1])?);
        }
        return Ok(crate::cuda::norm_rope(
            heads, weights, angles, counts, epsilon,
        )?);
    }
    let tables = [
        angles[0].to_dtype(heads.dtype())?,
        angles[1].to_dtype(heads.dtype())?,
    ];
    let part = |start, count, weight| {
        let part = heads.narrow(1, start, count)?.contiguous()?;
        // candle's rope takes [batch, heads, rows, head_dim].
        let normed = ops::rms_norm(&part, weight, epsilon)?
            .transpose(0, 1)?
            .unsqueeze(0)?;
        rope(&normed.contiguous()?, &tables[0], &tables[1])?
            .squeeze(0)?
            .transpose(0, 1)
    };
    let q = part(0, counts[0], weights[0])?;
    let k = part(counts[0], counts[1], weights[1])?;
    Ok(Tensor::cat(&[q, k], 1)?)
}

/// `silu(gate) * up` \[rows, width\] of rows that hold `width` gates, then `width` ups (SwiGLU, arXiv 2002.05202). On CUDA
/// f16 and bf16, in widths of whole multiples of 8, computed in f32.
///
/// # Errors
///
/// [`KernelError::Shape`] and [`KernelError::DType`].
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor, KernelError> {
    let (_, width) = matrix("gate_up", gate_up)?;
    if width % 2 != 0 {
        return Err(KernelError::Shape {
            name: "gate_up",
            expected: "[rows, 2 × width]".to_owned(),
            found: gate_up.shape().clone(),
        });
    }
    #[cfg(feature = "cuda")]
    if gate_up.device().is_cuda() {
        for_kernels("gate_up", gate_up, width / 2)?;
        if gate_up.elem_count() == 0 {
            return Ok(gate_up.narrow(1, 0, width / 2)?);
        }
        return Ok(crate::cuda::swiglu(gate_up)?);
    }
    Ok(ops::swiglu(gate_up)?)
}

fn matrix(name: &'static str, x: &Tensor) -> Result<(usize, usize), KernelError> {
    match *x.dims() {
        [rows, width] => Ok((rows, width)),
        _ => Err(KernelError::Shape {
            name,
            expected: "[rows, width]".to_owned(),
            found: x.shape().clone(),
        }),
    }
}

fn has_shape(name: &'static str, x: &Tensor, dims: &[usize]) -> Result<(), KernelError> {
    match x.dims() == dims {
        true => Ok(()),
        false => Err(KernelError::Shape {
            name,
            expected: format!("{dims:?}"),
            found: x.shape().clone(),
        }),
    }
}

/// An error where `x` is not of these dims, and of the dtype and on the device of `first`.
fn goes_with(
    name: &'static str,
    x: &Tensor,
    first: &Tensor,
    dims: &[usize],
) -> Result<(), KernelError> {
    has_shape(name, x, dims)?;
    if x.dtype() != first.dtype() {
        return Err(KernelError::DType {
            name,
            expected: "of one dtype with the first",
            found: x.dtype(),
        });
    }
    same_device(name, x, first)
}

#[cfg(feature = "cuda")]
fn for_kernels(name: &'static str, x: &Tensor, width: usize) -> Result<(), KernelError> {
    if !matches!(x.dtype(), DType::F16 | DType::BF16) {
        return Err(KernelError::DType {
            name,
            expected: "f16 or bf16 on CUDA",
            found: x.dtype(),
        });
    }
    match width.is_multiple_of(UNIT) {
        true => Ok(()),
        false => Err(KernelError::Shape {
            name,
            expected: format!("of rows of a multiple of {UNIT} on CUDA"),
            found: x.shape().clone(),
        }),
    }
}
