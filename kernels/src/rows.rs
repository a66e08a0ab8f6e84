use candle_core::Tensor;

use crate::{Ids, KernelError};

/// Rows of `x` \[rows, ...\] by number: \[ids, ...\], of any dtype. Differentiable where candle's `index_add` takes the dtype.
///
/// # Errors
///
/// [`KernelError::Rows`] where `x` does not have the rows that `ids` are numbers of, [`KernelError::Device`].
pub fn index_select(x: &Tensor, ids: &Ids) -> Result<Tensor, KernelError> {
    let [rows] = gather([x], ids)?;
    Ok(rows)
}

/// The same rows of up to three tensors of one dtype, on CUDA in one launch: queries, keys and values.
///
/// # Errors
///
/// Those of [`index_select`], and [`KernelError::DType`] where they differ in it.
pub fn gather<const N: usize>(
    tensors: [&Tensor; N],
    ids: &Ids,
) -> Result<[Tensor; N], KernelError> {
    const { assert!(1 <= N && N <= 3, "gather takes one to three tensors") };
    let dtype = tensors[0].dtype();
    for x in tensors {
        if x.rank() == 0 || x.dims()[0] != ids.rows() {
            return Err(KernelError::Rows {
                expected: ids.rows(),
                found: x.shape().clone(),
            });
        }
        if x.dtype() != dtype {
            let expected = "of one dtype with the first";
            return Err(KernelError::DType {
                name: "each tensor",
                expected,
                found: x.dtype(),
            });
        }
        same_device("ids", ids.tensor(), x)?;
    }
    #[cfg(feature = "cuda")]
    if tensors[0].device().is_cuda() {
        return Ok(crate::cuda::gather(tensors, ids)?);
    }
    let mut rows = tensors.map(Tensor::clone);
    for x in &mut rows {
        *x = x.contiguous()?.index_select(ids.tensor(), 0)?;
    }
    Ok(rows)
}

/// An error where `x`, which is called `name`, is not where `first` is.
pub(crate) fn same_device(
    name: &'static str,
    x: &Tensor,
    first: &Tensor,
) -> Result<(), KernelError> {
    if x.device().same_device(first.device()) {
        return Ok(());
    }
    let [expected, found] = [first, x].map(|x| format!("{:?}", x.device().location()));
    Err(KernelError::Device {
        name,
        expected,
        found,
    })
}
