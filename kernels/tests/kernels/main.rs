//! Every operation against its definition: on the CPU, on CUDA where a device is there, and the kernels' sources on an
//! emulated one.

mod attention;
mod common;
mod emulated;
mod layer;
mod rows;
