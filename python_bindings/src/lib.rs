//! The Python extension module `radix_mlp._core`: the core's types over NumPy arrays.

mod kernels;
mod masks;

use numpy::ndarray::ArrayView1;
use numpy::{IntoPyArray, PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use radix_mlp::{Budget, FoldBuilder, FoldError, Layout, TokenIds};

type Array<'py, T = u32> = Bound<'py, PyArray1<T>>;

enum Ids<'py> {
    U32(PyReadonlyArray1<'py, u32>),
    I64(PyReadonlyArray1<'py, i64>),
}

/// Not derived, for that makes an exception of the first type's error, which takes longer than a small fold.
impl<'py> FromPyObject<'_, 'py> for Ids<'py> {
    type Error = PyErr;

    fn extract(ids: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let narrow = ids.extract().map(Self::U32);
        narrow.or_else(|_| Ok(Self::I64(ids.extract()?)))
    }
}

fn value_error(error: FoldError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// A Python integer that counts rows.
fn rows(name: &str, count: i64) -> PyResult<usize> {
    usize::try_from(count)
        .map_err(|_| PyValueError::new_err(format!("{name} must be positive, got {count}")))
}

#[pyfunction]
fn compute_fold_and_scatter<'py>(
    py: Python<'py>,
    input_ids: Ids<'py>,
    position_ids: PyReadonlyArray1<'py, u32>,
    offsets: PyReadonlyArray1<'py, u32>,
    pad: Option<i64>,
) -> PyResult<(Array<'py>, Array<'py>, Array<'py>, Array<'py>)> {
    let layout = "first_occurrence";
    let fold = Fold::new(
        py,
        input_ids,
        Some(position_ids),
        offsets,
        layout,
        pad,
        None,
    )?;
    let (ids, positions, scatter, gather) = fold.0.into_arrays();
    let [ids, positions, scatter, gather] =
        [ids, positions, scatter, gather].map(|values| values.into_pyarray(py));
    Ok((ids, positions, scatter, gather))
}

#[pyfunction]
fn plan_batches(
    py: Python<'_>,
    sequences: Vec<PyReadonlyArray1<'_, u32>>,
    budget: i64,
    unique: bool,
) -> PyResult<Vec<Vec<usize>>> {
    let tokens = rows("budget", budget)?;
    let budget = match unique {
        true => Budget::UniqueTokens(tokens),
        false => Budget::Tokens(tokens),
    };
    let sequences = sequences.iter().map(PyReadonlyArray1::as_slice);
    let sequences: Vec<&[u32]> = sequences.collect::<Result<_, _>>()?;
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
        input_ids: Ids<'_>,
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
        let ids = match &input_ids {
            Ids::U32(ids) => TokenIds::U32(ids.as_slice()?),
            Ids::I64(ids) => TokenIds::I64(ids.as_slice()?),
        };
        let positions = position_ids.as_ref().map(|array| array.as_slice());
        let offsets = cu_seq_lengths.as_slice()?;
        let mut builder = FoldBuilder::new(ids, positions.transpose()?, offsets).layout(layout);
        if let Some(multiple) = pad_multiple_of {
            builder = builder.pad_multiple_of(rows("pad_multiple_of", multiple)?);
        }
        if let Some(salts) = &salts {
            builder = builder.salts(salts.as_slice()?);
        }
        py.detach(|| builder.build()).map(Fold).map_err(value_error)
    }

    /// Tokens, sequences, nodes and rows.
    #[pyo3(name = "_counts")]
    fn counts(&self) -> (usize, usize, usize, usize) {
        let fold = &self.0;
        let (tokens, sequences) = (fold.num_tokens(), fold.num_sequences());
        (tokens, sequences, fold.num_nodes(), fold.num_rows())
    }

    /// A read-only view of the fold's array of this name, which keeps the fold alive; None where its layout has none.
    #[pyo3(name = "_array")]
    fn array<'py>(slf: &Bound<'py, Self>, name: &str) -> PyResult<Option<Array<'py>>> {
        let fold = &slf.get().0;
        let values = match name {
            "cu_seq_lengths" => Some(fold.cu_seq_lengths()),
            "input_ids" => Some(fold.input_ids()),
            "position_ids" => Some(fold.position_ids()),
            "scatter_indices" => Some(fold.scatter_indices()),
            "fold_gather" => Some(fold.fold_gather()),
            "query_lengths" => fold.query_lengths(),
            "subtree_end" => fold.subtree_end(),
            "row_order" => fold.row_order(),
            other => return Err(PyValueError::new_err(format!("no array is called {other}"))),
        };
        Ok(values.map(|values| {
            let values = ArrayView1::from(values);
            // SAFETY: `values` borrows from the fold, which is frozen, so that nothing moves or changes it, and which the
            // array holds a reference to. Nobody has seen the array while it is writable.
            let array = unsafe { PyArray1::borrow_from_array(&values, slf.clone().into_any()) };
            array.readwrite().make_nonwriteable();
            array
        }))
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
    use super::kernels::cuda_sources;
    #[pymodule_export]
    use super::masks::{block_mask, path_mask};
    #[pymodule_export]
    use super::{Fold, compute_fold_and_scatter, plan_batches};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
