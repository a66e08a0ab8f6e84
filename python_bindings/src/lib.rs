//! The Python extension module `radix_mlp._core`: the core's types over NumPy arrays.

use numpy::ndarray::ArrayView1;
use numpy::{IntoPyArray, PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use radix_mlp::{Budget, FoldError, Layout};

type Array<'py, T = u32> = Bound<'py, PyArray1<T>>;

fn value_error(error: FoldError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// A Python integer that counts rows.
fn rows(name: &str, count: i64) -> PyResult<usize> {
    usize::try_from(count)
        .map_err(|_| PyValueError::new_err(format!("{name} must be positive, got {count}")))
}

/// A read-only NumPy view of what `values` borrows from `owner`, which it keeps alive; None where there is nothing.
fn view<'py>(
    owner: &Bound<'py, Fold>,
    values: for<'a> fn(&'a radix_mlp::Fold) -> Option<&'a [u32]>,
) -> Option<Array<'py>> {
    let values = ArrayView1::from(values(&owner.get().0)?);
    // SAFETY: `values` borrows from `owner`, which is frozen, so that nothing moves or changes it,
    // and which the array holds a reference to. Nobody has seen the array while it is writable.
    let array = unsafe { PyArray1::borrow_from_array(&values, owner.clone().into_any()) };
    array.readwrite().make_nonwriteable();
    Some(array)
}

#[pyfunction]
fn compute_fold_and_scatter<'py>(
    py: Python<'py>,
    input_ids: PyReadonlyArray1<'py, u32>,
    position_ids: PyReadonlyArray1<'py, u32>,
    cu_seq_lengths: PyReadonlyArray1<'py, u32>,
    pad_multiple_of: Option<i64>,
) -> PyResult<(Array<'py>, Array<'py>, Array<'py>, Array<'py>)> {
    let (positions, layout) = (Some(position_ids), "first_occurrence");
    let fold = Fold::new(
        py,
        input_ids,
        positions,
        cu_seq_lengths,
        layout,
        pad_multiple_of,
        None,
    )?;
    let (compact_input_ids, compact_position_ids, scatter_indices, fold_gather) =
        fold.0.into_arrays();
    Ok((
        compact_input_ids.into_pyarray(py),
        compact_position_ids.into_pyarray(py),
        scatter_indices.into_pyarray(py),
        fold_gather.into_pyarray(py),
    ))
}

#[pyfunction]
fn plan_batches(
    py: Python<'_>,
    input_ids: PyReadonlyArray1<'_, u32>,
    offsets: Vec<usize>,
    budget: i64,
    unique: bool,
) -> PyResult<Vec<Vec<usize>>> {
    let tokens = rows("budget", budget)?;
    let budget = if unique {
        Budget::UniqueTokens(tokens)
    } else {
        Budget::Tokens(tokens)
    };
    let input_ids = input_ids.as_slice()?;
    let sequences: Option<Vec<&[u32]>> = offsets
        .windows(2)
        .map(|ends| input_ids.get(ends[0]..ends[1]))
        .collect();
    let sequences =
        sequences.ok_or_else(|| PyValueError::new_err("offsets do not lie within input_ids"))?;
    let plan = py.detach(|| radix_mlp::plan_batches(&sequences, budget));
    Ok(plan.into_iter().map(|batch| batch.sequences).collect())
}

#[pyclass(frozen, subclass)]
struct Fold(radix_mlp::Fold);

#[pymethods]
impl Fold {
    #[new]
    fn new(
        py: Python<'_>,
        input_ids: PyReadonlyArray1<'_, u32>,
        position_ids: Option<PyReadonlyArray1<'_, u32>>,
        cu_seq_lengths: PyReadonlyArray1<'_, u32>,
        layout: &str,
        pad_multiple_of: Option<i64>,
        salts: Option<PyReadonlyArray1<'_, u64>>,
    ) -> PyResult<Self> {
        let layout = match layout {
            "first_occurrence" => Layout::FirstOccurrence,
            "depth_first" => Layout::DepthFirst,
            other => {
                return Err(PyValueError::new_err(format!(
                    "layout must be 'first_occurrence' or 'depth_first', got '{other}'"
                )));
            }
        };
        let (ids, offsets) = (input_ids.as_slice()?, cu_seq_lengths.as_slice()?);
        let builder = match &position_ids {
            Some(positions) => radix_mlp::Fold::builder(ids, positions.as_slice()?, offsets),
            None => radix_mlp::Fold::counted(ids, offsets),
        };
        let mut builder = builder.layout(layout);
        if let Some(multiple) = pad_multiple_of {
            builder = builder.pad_multiple_of(rows("pad_multiple_of", multiple)?);
        }
        if let Some(salts) = &salts {
            builder = builder.salts(salts.as_slice()?);
        }
        py.detach(|| builder.build()).map(Fold).map_err(value_error)
    }
    #[getter]
    fn layout(&self) -> &'static str {
        match self.0.layout() {
            Layout::FirstOccurrence => "first_occurrence",
            Layout::DepthFirst => "depth_first",
        }
    }
    #[getter]
    fn num_tokens(&self) -> usize {
        self.0.num_tokens()
    }
    #[getter]
    fn num_sequences(&self) -> usize {
        self.0.num_sequences()
    }
    #[getter]
    fn num_nodes(&self) -> usize {
        self.0.num_nodes()
    }
    #[getter]
    fn num_rows(&self) -> usize {
        self.0.num_rows()
    }
    #[getter]
    fn compression(&self) -> f64 {
        self.0.compression()
    }
    #[getter]
    fn gamma(&self) -> f64 {
        self.0.gamma()
    }
    #[getter]
    fn cu_seq_lengths<'py>(slf: &Bound<'py, Self>) -> Option<Array<'py>> {
        view(slf, |fold| Some(fold.cu_seq_lengths()))
    }
    #[getter]
    fn input_ids<'py>(slf: &Bound<'py, Self>) -> Option<Array<'py>> {
        view(slf, |fold| Some(fold.input_ids()))
    }
    #[getter]
    fn position_ids<'py>(slf: &Bound<'py, Self>) -> Option<Array<'py>> {
        view(slf, |fold| Some(fold.position_ids()))
    }
    #[getter]
    fn scatter_indices<'py>(slf: &Bound<'py, Self>) -> Option<Array<'py>> {
        view(slf, |fold| Some(fold.scatter_indices()))
    }
    #[getter]
    fn fold_gather<'py>(slf: &Bound<'py, Self>) -> Option<Array<'py>> {
        view(slf, |fold| Some(fold.fold_gather()))
    }
    #[getter]
    fn query_lengths<'py>(slf: &Bound<'py, Self>) -> Option<Array<'py>> {
        view(slf, radix_mlp::Fold::query_lengths)
    }
    #[getter]
    fn subtree_end<'py>(slf: &Bound<'py, Self>) -> Option<Array<'py>> {
        view(slf, radix_mlp::Fold::subtree_end)
    }
    #[getter]
    fn row_order<'py>(slf: &Bound<'py, Self>) -> Option<Array<'py>> {
        view(slf, radix_mlp::Fold::row_order)
    }

    /// Offsets and indices of the blocks that are seen whole, and of those that are seen in part.
    fn block_mask<'py>(
        &self,
        py: Python<'py>,
        query_block: i64,
        key_block: i64,
    ) -> PyResult<[(Array<'py, usize>, Array<'py>); 2]> {
        let query_block = rows("query_block", query_block)?;
        let key_block = rows("key_block", key_block)?;
        let mask = py.detach(|| self.0.block_mask(query_block, key_block));
        let lists = mask.map_err(value_error)?.into_lists();
        Ok(lists.map(|csr| (csr.offsets.into_pyarray(py), csr.indices.into_pyarray(py))))
    }

    fn draw(&self, label: &Bound<'_, PyAny>) -> PyResult<String> {
        let mut failure = None;
        let picture = self.0.draw(|ids| {
            if failure.is_some() {
                return String::new();
            }
            let text = label.call1((ids,)).and_then(|text| text.extract());
            text.unwrap_or_else(|error| {
                failure = Some(error);
                String::new()
            })
        });
        failure.map_or(Ok(picture), Err)
    }
}

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::{Fold, compute_fold_and_scatter, plan_batches};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
