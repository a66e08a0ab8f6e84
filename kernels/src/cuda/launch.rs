//! Launches of kernels whose blocks may begin while the kernel before them ends: CUDA's programmatic dependent launch. They
//! wait for its results by themselves, see `cuda/launch.cuh`, which hides what it takes to launch them.

use std::ffi::c_void;
use std::ptr;

use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
    cuLaunchKernelEx,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaStream, DeviceRepr, LaunchConfig,
};

/// The compute capability whose kernels wait: older ones cannot, and newer ones run what was compiled for older ones.
const WAITING: i32 = 9;

/// A number or an address as a kernel's argument.
pub fn argument<T: DeviceRepr>(value: &T) -> *mut c_void {
    ptr::from_ref(value).cast_mut().cast()
}

/// Launches `function`, on a GPU of [`WAITING`] beside the end of the kernel before it.
///
/// # Safety
///
/// As for any launch: `arguments` point to what the kernel takes, which is memory that it may use as it does. It must call
/// `await_previous` before it touches memory.
pub unsafe fn launch(
    function: &CudaFunction,
    stream: &CudaStream,
    config: LaunchConfig,
    arguments: &mut [*mut c_void],
) -> Result<()> {
    let context = stream.context();
    context.bind_to_thread().w()?;
    let (major, _) = context.compute_capability().w()?;
    let mut beside = CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: CUlaunchAttributeValue {
            programmaticStreamSerializationAllowed: 1,
        },
    };
    let config = CUlaunchConfig {
        gridDimX: config.grid_dim.0,
        gridDimY: config.grid_dim.1,
        gridDimZ: config.grid_dim.2,
        blockDimX: config.block_dim.0,
        blockDimY: config.block_dim.1,
        blockDimZ: config.block_dim.2,
        sharedMemBytes: config.shared_mem_bytes,
        hStream: stream.cu_stream(),
        attrs: &raw mut beside,
        numAttrs: u32::from(major == WAITING),
    };
    let (function, arguments) = (function.cu_function(), arguments.as_mut_ptr());
    // SAFETY: the caller's; the attribute outlives the call.
    unsafe { cuLaunchKernelEx(&raw const config, function, arguments, ptr::null_mut()) }
        .result()
        .w()
}
