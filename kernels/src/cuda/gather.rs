use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape,
    Storage, Tensor, bail,
};

use super::{Binary, LOAD, unwritten};
use crate::Ids;

const THREADS: u32 = 256;
const WARP: u32 = 32;
/// Units that a lane copies, of a chunk of a row; see index_select.cu.
const LANE_UNITS: u32 = 4;
/// Chunks of a row that are copied together, 8 KiB: of some thousand rows they fit into a GPU's cache.
const SLICE: u32 = 4;

/// See [`crate::gather`], whose arguments have been checked.
pub fn gather<const N: usize>(tensors: [&Tensor; N], ids: &Ids) -> Result<[Tensor; N]> {
    let op = Gather {
        ids: ids.tensor().clone(),
    };
    let count = ids.tensor().elem_count();
    let mut rows = tensors.map(Tensor::clone);
    for x in &mut rows {
        *x = x.contiguous()?;
    }
    let widths = tensors.map(|x| x.elem_count() / ids.rows().max(1));
    if count * widths.iter().sum::<usize>() == 0 {
        for x in &mut rows {
            *x = Tensor::zeros(shape(x, count), x.dtype(), x.device())?;
        }
        return Ok(rows);
    }
    let flat = match &rows[..] {
        [x] => x.apply_op1(op)?,
        [x, y] => x.apply_op2(y, op)?,
        [x, y, z] => x.apply_op3(y, z, op)?,
        others => bail!("gather takes one to three tensors, got {}", others.len()),
    };
    let mut start = 0;
    for (x, width) in rows.iter_mut().zip(widths) {
        *x = flat
            .narrow(0, start, count * width)?
            .reshape(shape(x, count))?;
        start += count * width;
    }
    Ok(rows)
}

/// That of `count` rows of `x`.
fn shape(x: &Tensor, count: usize) -> Shape {
    let mut dims = x.dims().to_vec();
    dims[0] = count;
    Shape::from(dims)
}

/// Rows of `row` bytes from address to address.
struct Copy {
    source: u64,
    target: u64,
    row: usize,
}

/// The kernel over all of `copies`, of `count` rows that the ids at `ids`, of type `kind`, name.
fn launch(device: &CudaDevice, copies: &[Copy], ids: u64, kind: &str, count: usize) -> Result<()> {
    // The most that divides all rows and addresses.
    let unaligned = copies.iter().fold(LOAD, |all, copy| {
        all | copy.row | copy.source as usize | copy.target as usize
    });
    let unit = 1 << unaligned.trailing_zeros();
    // Blocks of copies that are not there are not launched.
    let (mut sources, mut targets, mut units) = ([0_u64; 3], [0_u64; 3], [0_u32; 3]);
    for (at, copy) in copies.iter().enumerate() {
        (sources[at], targets[at]) = (copy.source, copy.target);
        units[at] = match u32::try_from(copy.row / unit) {
            Ok(units) => units,
            Err(_) => bail!("a row of {} bytes is too wide", copy.row),
        };
    }
    let widest = units.iter().copied().fold(1, u32::max);
    let lanes = widest.min(WARP).next_power_of_two();
    let all_chunks = widest.div_ceil(LANE_UNITS * lanes);
    let slices = all_chunks.div_ceil(SLICE);
    let chunks = all_chunks.div_ceil(slices);
    let row_blocks = count.div_ceil((THREADS / lanes) as usize);
    let Ok(blocks) = i32::try_from(row_blocks.saturating_mul((slices * chunks) as usize)) else {
        bail!("{count} rows are too many for one launch");
    };
    let count = count as u64;
    let function = Binary::IndexSelect.function(device, &format!("index_select_{unit}_{kind}"))?;
    let stream = device.cuda_stream();
    let mut launch = stream.launch_builder(&function);
    for address in &sources {
        launch.arg(address);
    }
    launch.arg(&ids);
    for address in &targets {
        launch.arg(address);
    }
    launch.arg(&count);
    for units in &units {
        launch.arg(units);
    }
    // No more than blocks.
    let row_blocks = row_blocks as u32;
    launch.arg(&lanes).arg(&chunks).arg(&row_blocks);
    let config = LaunchConfig {
        grid_dim: (blocks.unsigned_abs(), copies.len() as u32, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the arguments are those of the kernel, `unit` divides all rows and addresses, and the caller holds the slices.
    unsafe { launch.launch(config) }.w()?;
    Ok(())
}

/// Rows of contiguous tensors of one dtype: all rows of the first, then all of the next, \[elements\].
struct Gather {
    ids: Tensor,
}

impl Gather {
    fn run(&self, inputs: &[(&CudaStorage, &Layout)]) -> Result<(CudaStorage, Shape)> {
        match inputs[0].0.dtype() {
            DType::U8 => self.typed::<u8>(inputs),
            DType::U32 => self.typed::<u32>(inputs),
            DType::I16 => self.typed::<i16>(inputs),
            DType::I32 => self.typed::<i32>(inputs),
            DType::I64 => self.typed::<i64>(inputs),
            DType::BF16 => self.typed::<half::bf16>(inputs),
            DType::F16 => self.typed::<half::f16>(inputs),
            DType::F32 => self.typed::<f32>(inputs),
            DType::F64 => self.typed::<f64>(inputs),
            dtype => bail!("gather does not take {dtype:?}"),
        }
    }

    fn typed<T: CudaDType + DeviceRepr>(
        &self,
        inputs: &[(&CudaStorage, &Layout)],
    ) -> Result<(CudaStorage, Shape)> {
        let device = inputs[0].0.device().clone();
        let stream = device.cuda_stream();
        let count = self.ids.elem_count();
        let widths: Vec<usize> = inputs
            .iter()
            .map(|(_, layout)| layout.dims()[1..].iter().product())
            .collect();
        let elements = count * widths.iter().sum::<usize>();
        let mut out = unwritten::<T>(&device, elements)?;

        let size = size_of::<T>();
        let (mut copies, mut guards) = (Vec::new(), Vec::new());
        let (mut target, written) = out.device_ptr_mut(&stream);
        for ((storage, layout), width) in inputs.iter().zip(&widths) {
            let (source, read) = storage.as_cuda_slice::<T>()?.device_ptr(&stream);
            guards.push(read);
            copies.push(Copy {
                source: source + (layout.start_offset() * size) as u64,
                target,
                row: width * size,
            });
            target += (count * width * size) as u64;
        }
        let (ids, layout) = self.ids.storage_and_layout();
        let Storage::Cuda(ids) = &*ids else {
            bail!("ids are not on CUDA")
        };
        let (address, kind, read) = match ids.dtype() {
            DType::I64 => {
                let (address, read) = ids.as_cuda_slice::<i64>()?.device_ptr(&stream);
                (address + (layout.start_offset() * 8) as u64, "i64", read)
            }
            _ => {
                let (address, read) = ids.as_cuda_slice::<u32>()?.device_ptr(&stream);
                (address + (layout.start_offset() * 4) as u64, "u32", read)
            }
        };
        launch(&device, &copies, address, kind, count)?;
        drop((read, guards, written));
        Ok((
            CudaStorage::wrap_cuda_slice(out, device),
            Shape::from(elements),
        ))
    }

    /// What the rows' gradient is to each of `inputs`.
    fn backward<const N: usize>(
        &self,
        inputs: [&Tensor; N],
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        let count = self.ids.elem_count();
        let mut start = 0;
        let mut gradients = [const { None }; N];
        for (x, own) in inputs.into_iter().zip(&mut gradients) {
            let dims = shape(x, count);
            let rows = gradient
                .narrow(0, start, dims.elem_count())?
                .reshape(&dims)?;
            start += dims.elem_count();
            *own = Some(x.zeros_like()?.index_add(&self.ids, &rows, 0)?);
        }
        Ok(gradients)
    }
}

const NAME: &str = "radix_mlp gather";

impl CustomOp1 for Gather {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{NAME} is for CUDA alone")
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.run(&[(storage, layout)])
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let [x] = self.backward([x], gradient)?;
        Ok(x)
    }
}

impl CustomOp2 for Gather {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("{NAME} is for CUDA alone")
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.run(&[(s1, l1), (s2, l2)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok(self.backward([x, y], gradient)?.into())
    }
}

impl CustomOp3 for Gather {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("{NAME} is for CUDA alone")
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.run(&[(s1, l1), (s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok(self.backward([x, y, z], gradient)?.into())
    }
}
