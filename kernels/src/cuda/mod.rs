//! The kernels, loaded once for each device and launched on the stream of the tensors' device.

mod attention;
mod gather;
mod launch;
mod layer;
mod tensor_map;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Deref;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, CudaView, DevicePtr, DeviceRepr,
    SyncOnDrop, result,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Device, Layout, Result, Shape, Storage, Tensor, bail};

pub use attention::tree_attention;
pub use gather::gather;
pub use layer::{add_rms_norm, norm_rope, rotary_angles, swiglu};

/// Bytes that the kernels load at once.
const LOAD: usize = 16;

/// A fat binary that build.rs made.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Binary {
    IndexSelect,
    Layer,
    TreeAttention,
    TreeAttentionHopper,
}

impl Binary {
    fn bytes(self) -> &'static [u8] {
        match self {
            Self::IndexSelect => include_bytes!(concat!(env!("OUT_DIR"), "/index_select.fatbin")),
            Self::Layer => include_bytes!(concat!(env!("OUT_DIR"), "/layer.fatbin")),
            Self::TreeAttention => {
                include_bytes!(concat!(env!("OUT_DIR"), "/tree_attention.fatbin"))
            }
            Self::TreeAttentionHopper => {
                include_bytes!(concat!(env!("OUT_DIR"), "/tree_attention_hopper.fatbin"))
            }
        }
    }

    /// Its kernel `name`, for the device that `device` is a handle of.
    fn function(self, device: &CudaDevice, name: &str) -> Result<CudaFunction> {
        self.function_with_shared(device, name, 0)
    }

    /// The same, allowed `bytes` of dynamic shared memory or more.
    fn function_with_shared(
        self,
        device: &CudaDevice,
        name: &str,
        bytes: usize,
    ) -> Result<CudaFunction> {
        static LOADED: LazyLock<Mutex<HashMap<(usize, Binary), Loaded>>> =
            LazyLock::new(Mutex::default);
        let stream = device.cuda_stream();
        let context = stream.context();
        // A thread that panicked left the maps whole.
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let Loaded { module, functions } = match loaded.entry((context.ordinal(), self)) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(place) => {
                let binary = Ptx::from_binary(self.bytes().to_vec());
                place.insert(Loaded {
                    module: context.load_module(binary).w()?,
                    functions: HashMap::new(),
                })
            }
        };
        if let Some((function, allowed)) = functions.get(name)
            && bytes <= *allowed
        {
            return Ok(function.clone());
        }
        context.bind_to_thread().w()?;
        let function = module.load_function(name).w()?;
        if bytes > 0 {
            let limit = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(limit, i32::try_from(bytes)?).w()?;
        }
        functions.insert(name.to_owned(), (function.clone(), bytes));
        Ok(function)
    }
}

/// A binary on a device, and those of its functions that were asked for, with the bytes of dynamic shared memory that each is
/// allowed: a launch needs no call of the driver to find them.
struct Loaded {
    module: Arc<CudaModule>,
    functions: HashMap<String, (CudaFunction, usize)>,
}

/// The GPU of number `ordinal`, with one stream for all that is done on it. What is launched then has nothing to wait for,
/// and the events by which streams would wait for each other, several a launch, are not recorded.
///
/// Memory that tensors free is kept for those to come, until the process ends: CUDA's default, to return it whenever the
/// stream is waited for, makes the next batch pay for mapping it again, which takes longer than filling it.
///
/// # Errors
///
/// candle's, where there is no such GPU or no driver.
pub fn cuda_device(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: candle puts everything on the stream of the device, and this one has its own.
    unsafe { cuda.disable_event_tracking() };
    keep_freed_memory(cuda.cuda_stream().context())?;
    Ok(device)
}

/// Has the pool that tensors are allocated from return no memory by itself.
fn keep_freed_memory(context: &CudaContext) -> Result<()> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut all = u64::MAX;
    // SAFETY: the device is that of a context, its default pool lasts as long as it does, and the threshold is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device()).w()?;
        let all = (&raw mut all).cast();
        result::mem_pool::set_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, all).w()
    }
}

/// The elements of a tensor, from its first on.
fn view<'a, T: CudaDType>(storage: &'a Storage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let Storage::Cuda(storage) = storage else {
        bail!("a tensor is on {:?}, not on CUDA", storage.device())
    };
    Ok(storage.as_cuda_slice::<T>()?.slice(layout.start_offset()..))
}

/// The elements of each.
fn views<'a, T: CudaDType>(
    tensors: &'a [(impl Deref<Target = Storage>, &Layout)],
) -> Result<Vec<CudaView<'a, T>>> {
    let views = tensors
        .iter()
        .map(|(storage, layout)| view(storage, layout));
    views.collect()
}

/// Where each is, with a guard by which `stream` learns that it is no longer read.
fn addresses<'a, T>(
    views: &'a [CudaView<'a, T>],
    stream: &'a CudaStream,
) -> Vec<(CUdeviceptr, SyncOnDrop<'a>)> {
    views.iter().map(|view| view.device_ptr(stream)).collect()
}

/// Room for what a kernel is to write, all of it.
fn unwritten<T: DeviceRepr>(device: &CudaDevice, elements: usize) -> Result<CudaSlice<T>> {
    // SAFETY: plain numbers, of which any bits are one.
    unsafe { device.alloc(elements) }
}

/// A contiguous tensor of what a kernel wrote.
fn tensor<T: CudaDType>(
    written: CudaSlice<T>,
    device: &CudaDevice,
    shape: impl Into<Shape>,
) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(written, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// `x` contiguous and at whole loads; a copy where it is not so.
fn contiguous(x: &Tensor) -> Result<Tensor> {
    let start = x.layout().start_offset() * x.dtype().size_in_bytes();
    match x.is_contiguous() && start.is_multiple_of(LOAD) {
        true => Ok(x.clone()),
        false => x.force_contiguous(),
    }
}
