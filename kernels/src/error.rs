use candle_core::{DType, Shape};

/// Why an operation refuses its arguments, or fails. Each variant carries the offending values.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// An id names a row that is not there.
    #[error("ids[{position}] is {id}, which is not in 0..{rows}")]
    Id {
        /// Where the first of them stands.
        position: usize,
        /// What it is.
        id: i64,
        /// How many rows there are.
        rows: usize,
    },
    /// Ids were made for another number of rows.
    #[error("the ids are of {expected} rows, got a tensor of shape {found:?}")]
    Rows {
        /// The rows that the ids were checked for.
        expected: usize,
        /// The tensor's shape.
        found: Shape,
    },
    /// A tensor does not have the shape that goes with the others.
    #[error("{name} must be {expected}, got shape {found:?}")]
    Shape {
        /// Which tensor.
        name: &'static str,
        /// What would have gone.
        expected: String,
        /// Its shape.
        found: Shape,
    },
    /// A tensor has a dtype that the operation does not take.
    #[error("{name} must be {expected}, got {found:?}")]
    DType {
        /// Which tensor.
        name: &'static str,
        /// What the operation takes.
        expected: &'static str,
        /// Its dtype.
        found: DType,
    },
    /// Tensors, ids or a mask are on different devices.
    #[error("{name} is on {found}, and not on {expected}")]
    Device {
        /// Which of them.
        name: &'static str,
        /// Where the first tensor is.
        expected: String,
        /// Where this one is.
        found: String,
    },
    /// A number that scores are computed with cannot be right.
    #[error("{name} must be positive and finite, got {found}")]
    Number {
        /// Which of them.
        name: &'static str,
        /// Its value.
        found: f32,
    },
    /// A mask does not describe a trie, or lists blocks that are not there.
    #[error("{0}")]
    Mask(String),
    /// candle, or CUDA, says so.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<KernelError> for candle_core::Error {
    fn from(error: KernelError) -> Self {
        match error {
            KernelError::Candle(error) => error,
            other => Self::wrap(other),
        }
    }
}
