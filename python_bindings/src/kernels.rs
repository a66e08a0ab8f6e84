//! The CUDA sources of crate `radix_mlp_kernels` that Python compiles where there is a GPU for them.

use std::collections::BTreeMap;

use pyo3::pyfunction;

macro_rules! sources {
    ($($name:literal),*) => {
        BTreeMap::from([$(($name, include_str!(concat!("../../kernels/cuda/", $name)))),*])
    };
}

/// Hopper's tree attention and its gradients, the text of each file by its name.
#[pyfunction]
pub fn cuda_sources() -> BTreeMap<&'static str, &'static str> {
    sources![
        "barrier.cuh",
        "half.cuh",
        "hopper_load.cuh",
        "hopper_memory.cuh",
        "launch.cuh",
        "products.cuh",
        "ring.cuh",
        "tensor_copy.cuh",
        "tree_attention.cuh",
        "tree_attention_hopper.cuh",
        "tree_gradient_ends.cuh",
        "tree_gradient_hopper.cuh",
        "tree_gradient_memory.cuh",
        "warp.cuh",
        "warpgroup.cuh"
    ]
}
