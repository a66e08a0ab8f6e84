use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{
    DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig,
};
use candle_core::{DType, Device, Result, Tensor, bail};

use super::launch::{argument, launch};
use super::{Binary, addresses, contiguous, tensor, unwritten, views};

const WARP: u32 = 32;
const MOST_THREADS: u32 = 1024;
/// Of the kernels that need none to work together.
const THREADS: u32 = 256;
/// Of those for each row of heads: few, so that many rows are under way on a multiprocessor.
const ROW_THREADS: u32 = 128;
/// As in layer.cu.
const MOST_PAIRS: usize = 128;
/// Elements of one load, or of two of half of them.
const UNIT: usize = 8;

/// See [`crate::add_rms_norm`], whose arguments have been checked.
pub fn add_rms_norm(
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    epsilon: f32,
) -> Result<(Tensor, Tensor)> {
    match x.dtype() {
        DType::F16 => add_rms_norm_of::<half::f16>("add_rms_norm_f16", x, delta, weight, epsilon),
        DType::BF16 => {
            add_rms_norm_of::<half::bf16>("add_rms_norm_bf16", x, delta, weight, epsilon)
        }
        dtype => bail!("add_rms_norm does not take {dtype:?} on CUDA"),
    }
}

fn add_rms_norm_of<T: CudaDType + DeviceRepr>(
    kernel: &str,
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    epsilon: f32,
) -> Result<(Tensor, Tensor)> {
    let device = x.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let (x, weight) = (contiguous(x)?, contiguous(weight)?);
    let delta = delta.map(contiguous).transpose()?;
    let elements = x.elem_count();
    let units = u32::try_from(weight.elem_count() / UNIT)?;
    let rows = u32::try_from(elements / weight.elem_count())?;
    let function = Binary::Layer.function(device, kernel)?;
    let mut normed = unwritten::<T>(device, elements)?;
    // CUDA has no allocations of nothing.
    let summed = if delta.is_some() { elements } else { 1 };
    let mut sum = unwritten::<T>(device, summed)?;

    let inputs = [&x, &weight].into_iter().chain(&delta);
    let inputs: Vec<_> = inputs.map(Tensor::storage_and_layout).collect();
    let inputs = views::<T>(&inputs)?;
    let inputs = addresses(&inputs, &stream);
    let (sum_address, sum_written) = sum.device_ptr_mut(&stream);
    let (normed_address, normed_written) = normed.device_ptr_mut(&stream);
    let nothing = 0_u64;
    let (delta_address, sum_address) = match inputs.get(2) {
        Some((address, _)) => (address, &sum_address),
        None => (&nothing, &nothing),
    };
    let mut arguments = [
        argument(&inputs[0].0),
        argument(delta_address),
        argument(&inputs[1].0),
        argument(sum_address),
        argument(&normed_address),
        argument(&units),
        argument(&epsilon),
    ];
    let config = LaunchConfig {
        grid_dim: (rows, 1, 1),
        block_dim: (units.next_multiple_of(WARP).min(MOST_THREADS), 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the arguments are those of the kernel, which awaits the previous one; widths are whole units and all tensors
    // contiguous.
    unsafe { launch(&function, &stream, config, &mut arguments)? };
    drop((inputs, sum_written, normed_written));
    let normed = tensor(normed, device, x.shape());
    let sum = match delta {
        Some(_) => tensor(sum, device, x.shape()),
        None => x.clone(),
    };
    Ok((sum, normed))
}

/// The kernel's argument of the same name.
#[repr(C)]
struct Frequencies([f32; MOST_PAIRS]);

// SAFETY: plain numbers, laid out as in layer.cu.
unsafe impl DeviceRepr for Frequencies {}

/// See [`crate::rotary_angles`]: of some positions, and up to [`MOST_PAIRS`] frequencies.
pub fn rotary_angles(
    positions: &[u32],
    inverse_frequencies: &[f32],
    device: &Device,
) -> Result<[Tensor; 2]> {
    let device = device.as_cuda_device()?;
    let stream = device.cuda_stream();
    let (rows, pairs) = (positions.len(), inverse_frequencies.len());
    let function = Binary::Layer.function(device, "rotary_angles")?;
    let positions = device.clone_htod(positions)?;
    let mut cos = unwritten::<f32>(device, rows * pairs)?;
    let mut sin = unwritten::<f32>(device, rows * pairs)?;
    let mut frequencies = Frequencies([0.0; MOST_PAIRS]);
    frequencies.0[..pairs].copy_from_slice(inverse_frequencies);
    let count = (rows * pairs) as u64;
    let pairs_of_row = u32::try_from(pairs)?;
    let (positions_address, read) = positions.device_ptr(&stream);
    let (cos_address, cos_written) = cos.device_ptr_mut(&stream);
    let (sin_address, sin_written) = sin.device_ptr_mut(&stream);
    let mut arguments = [
        argument(&positions_address),
        argument(&frequencies),
        argument(&cos_address),
        argument(&sin_address),
        argument(&count),
        argument(&pairs_of_row),
    ];
    let config = LaunchConfig {
        grid_dim: (u32::try_from(count.div_ceil(THREADS.into()))?, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the arguments are those of the kernel, which awaits the previous one; there are as many frequencies as it
    // reads.
    unsafe { launch(&function, &stream, config, &mut arguments)? };
    drop((read, cos_written, sin_written));
    Ok([cos, sin].map(|table| tensor(table, device, (rows, pairs))))
}

/// See [`crate::norm_rope`], whose arguments have been checked.
pub fn norm_rope(
    heads: &Tensor,
    weights: [&Tensor; 2],
    angles: [&Tensor; 2],
    counts: [usize; 2],
    epsilon: f32,
) -> Result<Tensor> {
    match heads.dtype() {
        DType::F16 => {
            norm_rope_of::<half::f16>("norm_rope_f16", heads, weights, angles, counts, epsilon)
        }
        DType::BF16 => {
            norm_rope_of::<half::bf16>("norm_rope_bf16", heads, weights, angles, counts, epsilon)
        }
        dtype => bail!("norm_rope does not take {dtype:?} on CUDA"),
    }
}

fn norm_rope_of<T: CudaDType + DeviceRepr>(
    kernel: &str,
    heads: &Tensor,
    weights: [&Tensor; 2],
    angles: [&Tensor; 2],
    counts: [usize; 2],
    epsilon: f32,
) -> Result<Tensor> {
    let device = heads.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let (rows, all_heads, head_dim) = heads.dims3()?;
    let heads = contiguous(heads)?;
    let [q_weight, k_weight] = [contiguous(weights[0])?, contiguous(weights[1])?];
    let [cos, sin] = [contiguous(angles[0])?, contiguous(angles[1])?];
    let shape = (rows, counts[0] + counts[1], head_dim);
    let function = Binary::Layer.function(device, kernel)?;
    let mut out = unwritten::<T>(device, rows * shape.1 * head_dim)?;

    let inputs = [&heads, &q_weight, &k_weight].map(Tensor::storage_and_layout);
    let inputs = views::<T>(&inputs)?;
    let inputs = addresses(&inputs, &stream);
    let angles = [&cos, &sin].map(Tensor::storage_and_layout);
    let angles = views::<f32>(&angles)?;
    let angles = addresses(&angles, &stream);
    let (out_address, written) = out.device_ptr_mut(&stream);
    // Of a head a lane has a piece of both halves, of a power of two lanes that a warp is a multiple of.
    let pieces = head_dim / UNIT;
    let lanes = pieces.next_power_of_two();
    let numbers = [all_heads, counts[0], counts[1], pieces, lanes];
    let mut sizes = [0_u32; 5];
    for (size, number) in sizes.iter_mut().zip(numbers) {
        *size = u32::try_from(number)?;
    }
    let read = inputs.iter().chain(&angles);
    let mut arguments: Vec<_> = read.map(|(address, _)| argument(address)).collect();
    arguments.push(argument(&out_address));
    arguments.extend(sizes.iter().map(argument));
    arguments.push(argument(&epsilon));
    let config = LaunchConfig {
        grid_dim: (u32::try_from(rows)?, 1, 1),
        block_dim: (ROW_THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the arguments are those of the kernel, which awaits the previous one; head_dim is whole pieces, up to a
    // warp's; all tensors are contiguous.
    unsafe { launch(&function, &stream, config, &mut arguments)? };
    drop((inputs, angles, written));
    Ok(tensor(out, device, shape))
}

/// See [`crate::swiglu`], whose arguments have been checked.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    match gate_up.dtype() {
        DType::F16 => swiglu_of::<half::f16>("swiglu_f16", gate_up),
        DType::BF16 => swiglu_of::<half::bf16>("swiglu_bf16", gate_up),
        dtype => bail!("swiglu does not take {dtype:?} on CUDA"),
    }
}

fn swiglu_of<T: CudaDType + DeviceRepr>(kernel: &str, gate_up: &Tensor) -> Result<Tensor> {
    let device = gate_up.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let (rows, width) = gate_up.dims2()?;
    let gate_up = contiguous(gate_up)?;
    let function = Binary::Layer.function(device, kernel)?;
    let mut out = unwritten::<T>(device, rows * width / 2)?;
    let units = u32::try_from(width / 2 / UNIT)?;
    let count = rows as u64 * u64::from(units);
    let gates = [gate_up.storage_and_layout()];
    let gates = views::<T>(&gates)?;
    let gates = addresses(&gates, &stream);
    let (out_address, written) = out.device_ptr_mut(&stream);
    let mut arguments = [
        argument(&gates[0].0),
        argument(&out_address),
        argument(&count),
        argument(&units),
    ];
    let config = LaunchConfig {
        grid_dim: (u32::try_from(count.div_ceil(THREADS.into()))?, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the arguments are those of the kernel, which awaits the previous one; widths are whole units.
    unsafe { launch(&function, &stream, config, &mut arguments)? };
    drop((gates, written));
    Ok(tensor(out, device, (rows, width / 2)))
}
