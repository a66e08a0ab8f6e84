use candle_core::{DType, Device, Tensor};

use crate::KernelError;

/// Numbers of rows, all of which exist: checked once, so that no operation has to wait for a check.
#[derive(Clone, Debug)]
pub struct Ids {
    /// \[ids\], u32 or i64, contiguous.
    tensor: Tensor,
    rows: usize,
}

impl Ids {
    /// `ids` of `0..rows`, brought to `device`; checked on the host, where they are.
    ///
    /// # Errors
    ///
    /// [`KernelError::Id`] for the first that is out of range.
    pub fn new(ids: &[u32], rows: usize, device: &Device) -> Result<Self, KernelError> {
        check(ids.iter().map(|&id| i64::from(id)), rows)?;
        let tensor = Tensor::from_slice(ids, ids.len(), device)?;
        Ok(Self { tensor, rows })
    }

    /// `ids` \[ids\] of u32 or i64, of `0..rows`; one copy to the host checks them.
    ///
    /// # Errors
    ///
    /// [`KernelError::Id`] for the first that is out of range, [`KernelError::Shape`] and [`KernelError::DType`].
    pub fn from_tensor(ids: &Tensor, rows: usize) -> Result<Self, KernelError> {
        if ids.rank() != 1 {
            let expected = "[ids]".to_owned();
            return Err(KernelError::Shape {
                name: "ids",
                expected,
                found: ids.shape().clone(),
            });
        }
        match ids.dtype() {
            DType::U32 => check(ids.to_vec1::<u32>()?.into_iter().map(i64::from), rows)?,
            DType::I64 => check(ids.to_vec1::<i64>()?.into_iter(), rows)?,
            found => {
                return Err(KernelError::DType {
                    name: "ids",
                    expected: "u32 or i64",
                    found,
                });
            }
        }
        let tensor = ids.contiguous()?;
        Ok(Self { tensor, rows })
    }

    /// The ids, \[ids\].
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The number of rows that they are numbers of.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

fn check(mut ids: impl Iterator<Item = i64>, rows: usize) -> Result<(), KernelError> {
    let mut last = 0;
    let outside = ids.position(|id| {
        last = id;
        usize::try_from(id).map_or(true, |id| id >= rows)
    });
    match outside {
        Some(position) => Err(KernelError::Id {
            position,
            id: last,
            rows,
        }),
        None => Ok(()),
    }
}
