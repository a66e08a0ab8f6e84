use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, DevicePtrMut, DeviceRepr, LaunchConfig,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::{DType, Layout, Result, Tensor};

use super::launch::{argument, launch};
use super::tensor_map::TensorMap;
use super::{Binary, LOAD, addresses, tensor, unwritten, views};
use crate::tree_attention::{KEY_BLOCK, TILE, query_block};
use crate::{KernelError, TreeMask};

/// A kernel by its file, its functions' prefix, the threads of a block, and the rows of queries, keys, values and outputs that
/// are in shared memory at once, with so many bytes besides.
#[derive(Clone, Copy)]
struct Kernel {
    binary: Binary,
    prefix: &'static str,
    threads: u32,
    shared_rows: usize,
    shared_bytes: usize,
    /// Whether it is Hopper's: it takes maps of its inputs, and its blocks stay on their multiprocessors and take tiles from a
    /// counter. Else each block has one.
    is_for_hopper: bool,
}

const FOR_ALL: Kernel = Kernel {
    binary: Binary::TreeAttention,
    prefix: "tree_attention",
    threads: 192,
    shared_rows: TILE + 2 * KEY_BLOCK,
    shared_bytes: 0,
    is_for_hopper: false,
};
const FOR_HOPPER: Kernel = Kernel {
    binary: Binary::TreeAttentionHopper,
    prefix: "tree_attention_hopper",
    threads: 512,
    shared_rows: 2 * TILE + 8 * KEY_BLOCK,
    shared_bytes: 256,
    is_for_hopper: true,
};

impl Kernel {
    fn of(device: &CudaDevice) -> Result<Self> {
        let (major, _) = device.cuda_stream().context().compute_capability().w()?;
        Ok(if major == 9 { FOR_HOPPER } else { FOR_ALL })
    }

    /// Bytes of shared memory for elements of `size` bytes.
    fn shared(self, head_dim: usize, size: usize) -> usize {
        self.shared_rows * head_dim * size + self.shared_bytes
    }
}

/// The output and, where `lse`, the denominators; see [`crate::tree_attention_with_lse`], whose arguments have been checked
/// but for dtype and head_dim.
pub fn tree_attention(
    [q, k, v]: [&Tensor; 3],
    mask: &TreeMask,
    scale: f32,
    softcap: Option<f32>,
    lse: bool,
) -> std::result::Result<(Tensor, Tensor), KernelError> {
    let (rows, heads, head_dim) = q.dims3()?;
    if !matches!(q.dtype(), DType::F16 | DType::BF16) {
        return Err(KernelError::DType {
            name: "q",
            expected: "f16 or bf16 on CUDA",
            found: q.dtype(),
        });
    }
    if !matches!(head_dim, 64 | 128) {
        let expected = "[rows, heads, 64 or 128] on CUDA".to_owned();
        return Err(KernelError::Shape {
            name: "q",
            expected,
            found: q.shape().clone(),
        });
    }
    if q.elem_count() == 0 {
        let nothing = Tensor::zeros((heads, rows), DType::F32, q.device())?;
        return Ok((q.clone(), nothing));
    }
    let inputs = [loadable(q)?, loadable(k)?, loadable(v)?];
    let attention = Attention {
        kernel: Kernel::of(q.device().as_cuda_device()?)?,
        mask,
        scale,
        softcap,
        lse,
    };
    Ok(match q.dtype() {
        DType::F16 => attention.of::<half::f16>("f16", &inputs)?,
        _ => attention.of::<half::bf16>("bf16", &inputs)?,
    })
}

/// `x` with rows and heads at whole loads; a copy where it is not so.
fn loadable(x: &Tensor) -> Result<Tensor> {
    let layout = x.layout();
    let size = x.dtype().size_in_bytes();
    let steps = [
        layout.start_offset(),
        layout.stride()[0],
        layout.stride()[1],
    ];
    let whole = steps.iter().all(|step| (step * size).is_multiple_of(LOAD));
    // Steps of 0 are none that the driver's manual promises to take for the copy engine.
    if layout.stride()[2] == 1 && whole && !steps[1..].contains(&0) {
        return Ok(x.clone());
    }
    x.force_contiguous()
}

fn multiprocessors(device: &CudaDevice) -> Result<u32> {
    let stream = device.cuda_stream();
    let count = stream
        .context()
        .attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    Ok(u32::try_from(count.w()?)?)
}

/// The kernel's argument of the same name: where the arrays of [`TreeMask::lists`] are, in their order.
#[derive(Clone, Copy)]
#[repr(C)]
struct Lists([CUdeviceptr; 6]);

// SAFETY: six addresses, laid out as in tree_attention.cuh.
unsafe impl DeviceRepr for Lists {}

/// The kernel's argument of the same name.
#[derive(Clone, Copy)]
#[repr(C)]
struct Sizes {
    q_row: i64,
    q_head: i64,
    k_row: i64,
    k_head: i64,
    v_row: i64,
    v_head: i64,
    rows: u32,
    heads: u32,
    group: u32,
    window: u32,
    scale: f32,
    softcap: f32,
}

// SAFETY: plain numbers, laid out as in tree_attention.cuh.
unsafe impl DeviceRepr for Sizes {}

struct Attention<'a> {
    kernel: Kernel,
    mask: &'a TreeMask,
    scale: f32,
    softcap: Option<f32>,
    lse: bool,
}

impl Attention<'_> {
    fn of<T: CudaDType + DeviceRepr>(
        &self,
        dtype: &str,
        [q, k, v]: &[Tensor; 3],
    ) -> Result<(Tensor, Tensor)> {
        let device = q.device().as_cuda_device()?;
        let stream = device.cuda_stream();
        let (rows, heads, head_dim) = q.dims3()?;
        let sizes = self.sizes([q.layout(), k.layout(), v.layout()])?;
        let kernel = self.kernel;
        let shared = kernel.shared(head_dim, size_of::<T>());
        let name = format!("{}_{dtype}_{head_dim}", kernel.prefix);
        let function = kernel.binary.function_with_shared(device, &name, shared)?;
        let mut out = unwritten::<T>(device, rows * heads * head_dim)?;
        // CUDA has no allocations of nothing.
        let asked_for = if self.lse { heads * rows } else { 1 };
        let mut denominators = unwritten::<f32>(device, asked_for)?;
        let (to, written) = out.device_ptr_mut(&stream);
        let (lse, lse_written) = denominators.device_ptr_mut(&stream);
        let outputs = [to, if self.lse { lse } else { 0 }];
        self.enqueue::<T>(&function, [q, k, v], outputs, sizes, u32::try_from(shared)?)?;
        drop((written, lse_written));
        let lse = match self.lse {
            true => tensor(denominators, device, (heads, rows)),
            false => tensor(denominators, device, 1),
        };
        Ok((tensor(out, device, q.shape()), lse))
    }

    /// `function` from q, k and v to the memory of the output and of the denominators, 0 where nobody wants these.
    fn enqueue<T: CudaDType + DeviceRepr>(
        &self,
        function: &CudaFunction,
        qkv: [&Tensor; 3],
        [out, lse]: [CUdeviceptr; 2],
        sizes: Sizes,
        shared_mem_bytes: u32,
    ) -> Result<()> {
        let (device, kernel) = (qkv[0].device().as_cuda_device()?, self.kernel);
        let stream = device.cuda_stream();
        // A launch's own: threads may launch with one mask at once, and candle's default stream is another in each.
        let counter = kernel.is_for_hopper.then(|| self.mask.counter());
        let counter = counter.transpose()?;
        let numbers = [&self.mask.depth].into_iter().chain(&self.mask.lists);
        let numbers = numbers.chain(&counter);
        let numbers: Vec<_> = numbers.map(Tensor::storage_and_layout).collect();
        let numbers = views::<u32>(&numbers)?;
        let numbers = addresses(&numbers, &stream);
        let (depth, _) = numbers[0];
        let lists = Lists(std::array::from_fn(|at| numbers[1 + at].0));
        let counter = numbers.get(1 + lists.0.len());
        let inputs = qkv.map(Tensor::storage_and_layout);
        let inputs = views::<T>(&inputs)?;
        let inputs = addresses(&inputs, &stream);
        let maps = match kernel.is_for_hopper {
            true => self.maps(std::array::from_fn(|at| (qkv[at], inputs[at].0)))?,
            false => Vec::new(),
        };
        let mut arguments: Vec<_> = match kernel.is_for_hopper {
            true => maps.iter().map(argument).collect(),
            false => inputs
                .iter()
                .map(|(address, _)| argument(address))
                .collect(),
        };
        arguments.extend([argument(&out), argument(&lse), argument(&depth)]);
        arguments.extend([argument(&lists), argument(&sizes)]);

        let tiles = sizes
            .rows
            .div_ceil(u32::try_from(query_block(self.mask.group))?);
        let kv_heads = sizes.heads / sizes.group;
        let items = u32::try_from(u64::from(tiles) * u64::from(kv_heads))?;
        let grid_dim = match counter {
            Some((counter, _)) => {
                arguments.extend([argument(&tiles), argument(&items), argument(counter)]);
                (items.min(multiprocessors(device)?), 1, 1)
            }
            None => (tiles, kv_heads, 1),
        };
        let config = LaunchConfig {
            grid_dim,
            block_dim: (kernel.threads, 1, 1),
            shared_mem_bytes,
        };
        // SAFETY: the arguments are those of the kernel, which awaits the previous one; shapes, strides, alignment and the
        // lists' blocks were checked. What it writes is this launch's alone.
        unsafe { launch(function, &stream, config, &mut arguments) }
    }

    /// What Hopper's kernel loads at once: a tile of queries, a block of keys or of values, one key or value.
    fn maps(&self, [q, k, v]: [(&Tensor, CUdeviceptr); 3]) -> Result<Vec<TensorMap>> {
        let group = self.mask.group;
        let (tile, block, one) = ([query_block(group), group], [KEY_BLOCK, 1], [1, 1]);
        let boxes = [(q, tile), (k, block), (v, block), (k, one), (v, one)];
        boxes
            .into_iter()
            .map(|((x, address), corner)| TensorMap::new(address, x.layout(), x.dtype(), corner))
            .collect()
    }

    fn sizes(&self, [q, k, v]: [&Layout; 3]) -> Result<Sizes> {
        let (rows, heads, _) = q.shape().dims3()?;
        let stride = |layout: &Layout, dim: usize| i64::try_from(layout.stride()[dim]);
        Ok(Sizes {
            q_row: stride(q, 0)?,
            q_head: stride(q, 1)?,
            k_row: stride(k, 0)?,
            k_head: stride(k, 1)?,
            v_row: stride(v, 0)?,
            v_head: stride(v, 1)?,
            rows: u32::try_from(rows)?,
            heads: u32::try_from(heads)?,
            group: u32::try_from(self.mask.group)?,
            window: self.mask.window.unwrap_or(0),
            scale: self.scale,
            softcap: self.softcap.unwrap_or(0.0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use radix_mlp::{Fold, Layout};

    use crate::{PathLists, cuda_device};

    /// Forty completions of a prompt, in depth-first order.
    fn fold() -> Fold {
        let sequences = (0..40_u32).map(|own| (0..300).map(move |at| at + own * (at / 200)));
        let ids: Vec<u32> = sequences.flatten().collect();
        let offsets: Vec<u32> = (0..=40).map(|sequence| 300 * sequence).collect();
        let builder = Fold::counted(&ids, &offsets).layout(Layout::DepthFirst);
        builder.build().unwrap()
    }

    fn mask(fold: &Fold, device: &Device) -> TreeMask {
        let mask = fold.path_mask(query_block(2), KEY_BLOCK, None).unwrap();
        let [partial, full] = [mask.partial(), mask.full()].map(|lists| crate::Lists {
            offsets: &lists.offsets,
            blocks: &lists.indices,
        });
        let paths = PathLists {
            depth: mask.depth(),
            blocks: mask.blocks(),
            above: mask.above(),
            partial,
            full,
        };
        TreeMask::new(paths, 2, None, device).unwrap()
    }

    /// So many heads that each block of Hopper's kernel has several tiles.
    fn inputs(rows: usize, head_dim: usize, device: &Device) -> [Tensor; 3] {
        [16, 8, 8].map(|heads| {
            let x = Tensor::randn(0_f32, 1_f32, (rows, heads, head_dim), device);
            x.unwrap().to_dtype(DType::BF16).unwrap()
        })
    }

    fn run(kernel: Kernel, mask: &TreeMask, inputs: &[Tensor; 3]) -> [Tensor; 2] {
        let attention = Attention {
            kernel,
            mask,
            scale: 0.1,
            softcap: None,
            lse: true,
        };
        let (out, lse) = attention.of::<half::bf16>("bf16", inputs).unwrap();
        [out.to_dtype(DType::F32).unwrap(), lse]
    }

    /// The largest; NaN where there is one, which candle's `max` forgets.
    fn difference(a: &Tensor, b: &Tensor) -> f32 {
        let differences = (a - b).unwrap().flatten_all().unwrap();
        let differences = differences.to_vec1::<f32>().unwrap();
        differences
            .into_iter()
            .map(f32::abs)
            .max_by(f32::total_cmp)
            .unwrap_or(0.0)
    }

    /// To the bit: sums are in one order.
    #[test]
    #[ignore = "needs a Hopper GPU"]
    fn kernels_agree() {
        let (device, fold) = (cuda_device(0).unwrap(), fold());
        let mask = mask(&fold, &device);
        for head_dim in [64, 128] {
            let inputs = inputs(fold.num_rows(), head_dim, &device);
            let [(all, all_lse), (hopper, hopper_lse)] =
                [FOR_ALL, FOR_HOPPER].map(|kernel| run(kernel, &mask, &inputs).into());
            assert_eq!(difference(&all, &hopper), 0.0);
            assert_eq!(difference(&all_lse, &hopper_lse), 0.0);
        }
    }

    /// More launches than a mask has counters.
    #[test]
    #[ignore = "needs a Hopper GPU"]
    fn a_mask_serves_any_number_of_launches() {
        let (device, fold) = (cuda_device(0).unwrap(), fold());
        let mask = mask(&fold, &device);
        let inputs = inputs(fold.num_rows(), 128, &device);
        let [first, _] = run(FOR_HOPPER, &mask, &inputs);
        for _ in 0..150 {
            let [next, _] = run(FOR_HOPPER, &mask, &inputs);
            assert_eq!(difference(&first, &next), 0.0);
        }
    }

    /// Heads that are further apart than rows, and one that stands for all.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn strides_do_not_matter() {
        let (device, fold) = (cuda_device(0).unwrap(), fold());
        let mask = mask(&fold, &device);
        let [q, k, v] = inputs(fold.num_rows(), 128, &device);
        let by_head = |x: &Tensor| {
            let by_head = x.transpose(0, 1).unwrap().contiguous().unwrap();
            by_head.transpose(0, 1).unwrap()
        };
        let one_for_all = |x: &Tensor| x.narrow(1, 0, 1).unwrap().expand(x.shape()).unwrap();
        let output = |q: &Tensor, k: &Tensor, v: &Tensor| {
            let (out, _) = tree_attention([q, k, v], &mask, 0.1, None, false).unwrap();
            out.to_dtype(DType::F32).unwrap()
        };
        let expected = output(&q, &k, &v);
        let found = output(&by_head(&q), &by_head(&k), &by_head(&v));
        assert_eq!(difference(&expected, &found), 0.0);
        let expected = output(&q, &k, &one_for_all(&v).contiguous().unwrap());
        assert_eq!(
            difference(&expected, &output(&q, &k, &one_for_all(&v))),
            0.0
        );
    }
}
