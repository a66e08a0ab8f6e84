//! The masks of tree attention, from folds in depth-first layout.

use numpy::IntoPyArray;
use pyo3::prelude::*;
use radix_mlp::Csr;

use crate::{Array, Fold, rows, value_error};

/// Offsets and indices.
type Lists<'py> = (Array<'py, usize>, Array<'py>);

fn lists(py: Python<'_>, csr: Csr) -> Lists<'_> {
    (csr.offsets.into_pyarray(py), csr.indices.into_pyarray(py))
}

/// The blocks that are seen whole, and those that are seen in part.
#[pyfunction]
pub fn block_mask<'py>(
    py: Python<'py>,
    fold: &Bound<'py, Fold>,
    query_block: i64,
    key_block: i64,
) -> PyResult<[Lists<'py>; 2]> {
    let query_block = rows("query_block", query_block)?;
    let key_block = rows("key_block", key_block)?;
    let fold = &fold.get().0;
    let mask = py.detach(|| fold.block_mask(query_block, key_block));
    let [full, partial] = mask.map_err(value_error)?.into_lists();
    Ok([lists(py, full), lists(py, partial)])
}

/// Depths, blocks one after another, the rows above them, and those that are seen in part and whole.
#[pyfunction]
pub fn path_mask<'py>(
    py: Python<'py>,
    fold: &Bound<'py, Fold>,
    query_block: i64,
    key_block: i64,
    window: Option<u32>,
) -> PyResult<([Array<'py>; 3], [Lists<'py>; 2])> {
    let query_block = rows("query_block", query_block)?;
    let key_block = rows("key_block", key_block)?;
    let fold = &fold.get().0;
    let mask = py.detach(|| fold.path_mask(query_block, key_block, window));
    let (depth, blocks, above, [partial, full]) = mask.map_err(value_error)?.into_parts();
    let arrays = [depth, blocks.into_flattened(), above].map(|values| values.into_pyarray(py));
    Ok((arrays, [lists(py, partial), lists(py, full)]))
}
