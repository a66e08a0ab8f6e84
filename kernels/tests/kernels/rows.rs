//! Rows by number against a loop over the rows, on the CPU, and on CUDA where a device is there.

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;
use radix_mlp_kernels::{Ids, KernelError, gather, index_select};

/// Widths that are whole 16-byte loads, that are not, and none at all; the last two are more than a warp copies at once.
const WIDTHS: [usize; 8] = [0, 1, 3, 8, 51, 128, 1027, 4104];
const DTYPES: [DType; 6] = [
    DType::U8,
    DType::U32,
    DType::I64,
    DType::BF16,
    DType::F16,
    DType::F32,
];

/// Numbers that every dtype holds exactly, \[rows, width\].
fn numbered(rows: usize, width: usize, dtype: DType, device: &Device) -> Tensor {
    let values: Vec<u8> = (0..rows * width).map(|at| (at * 7 % 251) as u8).collect();
    let values = Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap();
    values.to_dtype(dtype).unwrap().to_device(device).unwrap()
}

fn values(x: &Tensor) -> Vec<Vec<f64>> {
    let x = x.to_device(&Device::Cpu).unwrap().flatten_from(1).unwrap();
    x.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
}

fn expected(x: &Tensor, ids: &[u32]) -> Vec<Vec<f64>> {
    let rows = values(x);
    ids.iter().map(|&id| rows[id as usize].clone()).collect()
}

fn selects_rows(device: &Device) {
    let strategy = (1_usize..40).prop_flat_map(|rows| {
        let ids = prop::collection::vec(0..rows as u32, 0..100);
        (
            Just(rows),
            ids,
            prop::sample::select(&WIDTHS[..]),
            prop::sample::select(&DTYPES[..]),
            any::<bool>(),
            0_usize..2,
        )
    });
    proptest!(crate::common::cases_of(200), |((rows, ids, width, dtype, wide, cut) in strategy)| {
        let checked = if wide {
            let wide: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
            let tensor = Tensor::from_vec(wide, ids.len(), &Device::Cpu).unwrap();
            // CUDA has no allocations of nothing.
            if ids.is_empty() { Ids::new(&ids, rows, device) } else { Ids::from_tensor(&tensor.to_device(device).unwrap(), rows) }
        } else {
            Ids::new(&ids, rows, device)
        };
        let checked = checked.unwrap();
        // Starting within a larger tensor, at rows of other alignments; with a cut, not contiguous.
        let x = numbered(rows + 1, width + cut, dtype, device).narrow(0, 1, rows).unwrap();
        let x = x.narrow(1, cut, width).unwrap();
        let found = index_select(&x, &checked).unwrap();
        prop_assert_eq!(found.dims(), [ids.len(), width]);
        prop_assert_eq!(found.dtype(), dtype);
        prop_assert_eq!(values(&found), expected(&x, &ids));
    });
}

fn gathers_three(device: &Device) {
    let ids = [3_u32, 0, 3, 4];
    let checked = Ids::new(&ids, 5, device).unwrap();
    let of = |width: usize| numbered(5, width, DType::BF16, device);
    // One unit of 2 bytes for all, and of 16 bytes: 260, 65 and 1 a row.
    for [head, k, v] in [[16, 9, 1], [520, 520, 8]] {
        let (q, k, v) = (of(4 * head).reshape((5, 4, head)).unwrap(), of(k), of(v));
        let found = gather([&q, &k, &v], &checked).unwrap();
        assert_eq!(found[0].dims(), [4, 4, head]);
        for (x, rows) in [&q, &k, &v].into_iter().zip(&found) {
            assert_eq!(values(rows), expected(x, &ids));
        }
    }
}

fn sums_the_gradients_of_copies(device: &Device) {
    let x = Var::from_tensor(&numbered(5, 3, DType::F32, device)).unwrap();
    let ids = Ids::new(&[3, 0, 3], 5, device).unwrap();
    let [rows, others] = gather([x.as_tensor(), x.as_tensor()], &ids).unwrap();
    let loss = (rows + (others * 10.0).unwrap())
        .unwrap()
        .sum_all()
        .unwrap();
    let gradient = loss.backward().unwrap().remove(&x).unwrap();
    let counts = values(&gradient)
        .into_iter()
        .map(|row| row[0])
        .collect::<Vec<_>>();
    assert_eq!(counts, [11.0, 0.0, 0.0, 22.0, 0.0]);
}

#[test]
fn on_the_cpu() {
    selects_rows(&Device::Cpu);
    gathers_three(&Device::Cpu);
    sums_the_gradients_of_copies(&Device::Cpu);
}

#[cfg(feature = "cuda")]
#[test]
#[ignore = "needs a CUDA device"]
fn on_cuda() {
    let device = radix_mlp_kernels::cuda_device(0).unwrap();
    selects_rows(&device);
    gathers_three(&device);
    sums_the_gradients_of_copies(&device);
}

#[test]
fn what_is_no_row_is_named() {
    let error = Ids::new(&[0, 4, 7, 5], 5, &Device::Cpu).unwrap_err();
    assert_eq!(error.to_string(), "ids[2] is 7, which is not in 0..5");
    let negative = Tensor::new(&[1_i64, -3], &Device::Cpu).unwrap();
    let error = Ids::from_tensor(&negative, 5).unwrap_err();
    assert_eq!(error.to_string(), "ids[1] is -3, which is not in 0..5");
    let floats = Tensor::new(&[1_f32], &Device::Cpu).unwrap();
    assert!(matches!(
        Ids::from_tensor(&floats, 5),
        Err(KernelError::DType {
            found: DType::F32,
            ..
        })
    ));
    let square = Tensor::new(&[[1_u32]], &Device::Cpu).unwrap();
    assert!(matches!(
        Ids::from_tensor(&square, 5),
        Err(KernelError::Shape { .. })
    ));
}

#[test]
fn tensors_that_do_not_go_together_are_refused() {
    let ids = Ids::new(&[1], 5, &Device::Cpu).unwrap();
    let x = numbered(4, 2, DType::F32, &Device::Cpu);
    assert!(matches!(
        index_select(&x, &ids),
        Err(KernelError::Rows { expected: 5, .. })
    ));
    let x = numbered(5, 2, DType::F32, &Device::Cpu);
    let other = numbered(5, 2, DType::U8, &Device::Cpu);
    assert!(matches!(
        gather([&x, &other], &ids),
        Err(KernelError::DType {
            found: DType::U8,
            ..
        })
    ));
}
