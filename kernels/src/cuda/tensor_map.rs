use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdeviceptr, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};
use candle_core::{DType, Layout, Result};

/// Columns of a box: 128 bytes, which the copy engine swizzles as the tensor cores read them.
const COLUMNS: u32 = 64;

/// Tells Hopper's copy engine of a tensor [rows, heads, columns] of f16 or bf16, and of the boxes that are copied from it.
#[repr(transparent)]
pub struct TensorMap(CUtensorMap);

// SAFETY: what kernels take by value as a CUtensorMap.
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// For boxes of `box_rows` rows and `box_heads` heads, 256 at most, of the tensor of this layout whose first element is
    /// at `start`. Strides are multiples of 16 bytes and not 0, columns are adjacent.
    ///
    /// # Errors
    ///
    /// The driver's, where it does not take these numbers.
    pub fn new(
        start: CUdeviceptr,
        layout: &Layout,
        dtype: DType,
        [box_rows, box_heads]: [usize; 2],
    ) -> Result<Self> {
        let (rows, heads, columns) = layout.shape().dims3()?;
        let bytes = |dim: usize| (layout.stride()[dim] * dtype.size_in_bytes()) as u64;
        let sizes = [columns as u64, heads as u64, rows as u64];
        let strides = [bytes(1), bytes(0)];
        let corner = [COLUMNS, u32::try_from(box_heads)?, u32::try_from(box_rows)?];
        let kind = match dtype {
            DType::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let mut map = CUtensorMap { opaque: [0; 16] };
        // SAFETY: the arrays have as many numbers as the call reads for three dimensions. It only notes the address.
        let answer = unsafe {
            cuTensorMapEncodeTiled(
                &raw mut map,
                kind,
                3,
                start as *mut _,
                sizes.as_ptr(),
                strides.as_ptr(),
                corner.as_ptr(),
                [1; 3].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        answer.result().w()?;
        Ok(Self(map))
    }
}
