//! Matrix products of f32 slices on the CPU.

use std::ops::{Deref, Range};

use candle_core::{Error, Result, Storage, Tensor};
use gemm::Parallelism;

/// A matrix in a slice, by strides in elements.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows` × `columns`, where each row is contiguous and starts `row_stride` after the one
    /// before it.
    ///
    /// # Panics
    ///
    /// Where the matrix reaches beyond `data`.
    pub fn new(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(span(rows, columns, row_stride) <= data.len());
        Self {
            data,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        }
    }

    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// Elements from the first of a matrix to its last.
fn span(rows: usize, columns: usize, row_stride: usize) -> usize {
    match (rows, columns) {
        (0, _) | (_, 0) => 0,
        (rows, columns) => (rows - 1) * row_stride + columns,
    }
}

/// What a product does with what its destination holds.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Store {
    Replace,
    Add,
}

/// `into` (+)= `a` · `b`, where the rows of `into` start `into_stride` apart.
///
/// # Panics
///
/// Where the shapes don't fit.
pub(super) fn matmul(
    into: &mut [f32],
    into_stride: usize,
    store: Store,
    a: Matrix<'_>,
    b: Matrix<'_>,
    parallelism: Parallelism,
) {
    assert_eq!(a.columns, b.rows);
    assert!(b.columns <= into_stride);
    assert!(span(a.rows, b.columns, into_stride) <= into.len());
    // SAFETY: `Matrix::new` checked that `a` and `b` lie in their slices, and the asserts above
    // that the result lies in `into`, with rows that don't overlap.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            into.as_mut_ptr(),
            1,
            into_stride as isize,
            store == Store::Add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Read access to the elements of a contiguous tensor on the CPU.
pub(super) struct Elements<S> {
    storage: S,
    range: Range<usize>,
}

/// # Errors
///
/// Where the tensor is not contiguous.
pub(super) fn elements(tensor: &Tensor) -> Result<Elements<impl Deref<Target = Storage>>> {
    let (storage, layout) = tensor.storage_and_layout();
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(Elements {
            storage,
            range: start..end,
        }),
        None => Err(Error::Msg(format!(
            "expected a contiguous tensor, got {layout:?}"
        ))),
    }
}

impl<S: Deref<Target = Storage>> Elements<S> {
    /// # Errors
    ///
    /// Where the tensor is not f32, or not on the CPU.
    pub fn slice(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(&storage.as_slice::<f32>()?[self.range.clone()]),
            _ => Err(Error::Msg("expected a tensor on the CPU".to_owned())),
        }
    }
}
