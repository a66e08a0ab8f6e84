//! The CUDA kernels themselves, run by a CPU: `emulator/` runs their sources, compiled as C++, thread by thread. It finds
//! wrong indices, fragments, masks, and missing barriers and waits; what it cannot tell is how fast they are.

mod attention;
mod gradient;
mod layer;

use std::ffi::c_void;
use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use libloading::{Library, Symbol};
use radix_mlp_kernels::{Ids, gather};

const DTYPES: [DType; 2] = [DType::BF16, DType::F16];

/// The kernels as a library, or `None` (with the reason printed) without a compiler.
fn library() -> Option<Library> {
    let compiler = std::env::var("CXX").unwrap_or("c++".to_owned());
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libemulated.so");
    let mut command = Command::new(&compiler);
    // As CUDA, which lets a pair of halves be read as 32 bits.
    command.args([
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        "-fno-strict-aliasing",
    ]);
    command.arg("-I").arg(here.join("tests/kernels/emulator"));
    command.arg("-I").arg(here.join("cuda"));
    command.args(["-x", "c++", "-o"]).arg(&library);
    command.arg(here.join("tests/kernels/emulator/library.cpp"));
    let Ok(output) = command.output() else {
        println!("skipped: no C++ compiler {compiler} (set CXX)");
        return None;
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    // SAFETY: a library without initialisers that do anything.
    Some(unsafe { Library::new(library) }.unwrap())
}

/// 16-bit elements, as they are in memory.
fn bits(x: &Tensor) -> Vec<u16> {
    let x = x.flatten_all().unwrap();
    match x.dtype() {
        DType::BF16 => x
            .to_vec1::<half::bf16>()
            .unwrap()
            .into_iter()
            .map(half::bf16::to_bits)
            .collect(),
        _ => x
            .to_vec1::<half::f16>()
            .unwrap()
            .into_iter()
            .map(half::f16::to_bits)
            .collect(),
    }
}

fn of_bits(bits: Vec<u16>, shape: &[usize], dtype: DType) -> Tensor {
    match dtype {
        DType::BF16 => {
            let values: Vec<_> = bits.into_iter().map(half::bf16::from_bits).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        }
        _ => {
            let values: Vec<_> = bits.into_iter().map(half::f16::from_bits).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        }
    }
}

/// Has the kernel before the next one write what `array` has: the next one finds it when it has awaited that, no sooner.
fn written_before<T>(library: &Library, array: &mut [T]) {
    type Previous = unsafe extern "C" fn(*mut c_void, u64);
    // SAFETY: the symbol has this type. The array is plain numbers, and outlives the next kernel, which gives it back.
    unsafe {
        let previous: Symbol<'_, Previous> = library.get(b"emulate_previous").unwrap();
        previous(array.as_mut_ptr().cast(), size_of_val(array) as u64);
    }
}

type IndexSelect = unsafe extern "C" fn(
    u32,
    u32,
    u32,
    u32,
    u32,
    *const *const c_void,
    *const c_void,
    *const *mut c_void,
    u64,
    *const u32,
    u32,
    u32,
    u32,
);

/// Three tensors of bytes, in units of every size.
fn selections(library: &Library) {
    let ids: Vec<u32> = (0..37).map(|at| at * 7 % 11).collect();
    let wide_ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
    let checked = Ids::new(&ids, 11, &Device::Cpu).unwrap();
    for (unit, wide) in [1, 2, 4, 8, 16]
        .into_iter()
        .flat_map(|unit| [(unit, false), (unit, true)])
    {
        // Within a chunk; chunks that a row fills, begins, or leaves to some lanes; rows that end before the widest's last chunk.
        for (widths, lanes, slices, chunks) in [
            ([1, 2, 3], 4, 1, 1),
            ([33, 200, 1], 32, 1, 2),
            ([128, 129, 256], 32, 1, 2),
            ([610, 40, 257], 32, 2, 3),
        ] {
            let x = widths.map(|width| {
                let count = 11 * width * unit;
                let bytes: Vec<u8> = (0..count).map(|at| (at * 31 % 251) as u8).collect();
                Tensor::from_vec(bytes, (11, width * unit), &Device::Cpu).unwrap()
            });
            let expected = gather(x.each_ref(), &checked).unwrap();
            let bytes = x.map(|x| x.flatten_all().unwrap().to_vec1::<u8>().unwrap());
            // With a row behind the last, which stays as it is.
            let mut out = widths.map(|width| vec![255_u8; (ids.len() + 1) * width * unit]);
            let sources = bytes.each_ref().map(|bytes| bytes.as_ptr().cast());
            let targets = out.each_mut().map(|bytes| bytes.as_mut_ptr().cast());
            let id_pointer = if wide {
                wide_ids.as_ptr().cast()
            } else {
                ids.as_ptr().cast()
            };
            let units = widths.map(|width| width as u32);
            let row_blocks = ids.len().div_ceil(256 / lanes as usize) as u32;
            // SAFETY: the symbol has this type, and the arrays the sizes that the kernel is told.
            unsafe {
                let run: Symbol<'_, IndexSelect> = library.get(b"emulate_index_select").unwrap();
                run(
                    unit as u32,
                    wide.into(),
                    3,
                    row_blocks * slices * chunks,
                    256,
                    sources.as_ptr(),
                    id_pointer,
                    targets.as_ptr(),
                    ids.len() as u64,
                    units.as_ptr(),
                    lanes,
                    chunks,
                    row_blocks,
                );
            }
            for (found, expected) in out.iter().zip(&expected) {
                let mut expected = expected.flatten_all().unwrap().to_vec1::<u8>().unwrap();
                expected.resize(found.len(), 255);
                assert_eq!(found, &expected, "units of {unit}, {widths:?}");
            }
        }
    }
}

#[test]
fn kernels_compute_what_their_oracles_do() {
    let Some(library) = library() else {
        return;
    };
    selections(&library);
    layer::angles(&library);
    for dtype in DTYPES {
        layer::norms(&library, dtype);
        layer::rotations(&library, dtype);
        layer::activations(&library, dtype);
    }
    attention::attends(&library);
    gradient::differentiates(&library);
}
