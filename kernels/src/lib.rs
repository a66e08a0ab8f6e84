//! Operations on candle's tensors for batches that are folded onto their prefix trie, with CUDA kernels of our own.
//!
//! - [`index_select`] and [`gather`]: rows by number, at the speed of memory, of any dtype and width;
//! - [`tree_attention`]: attention of a folded batch in depth-first order, which expands nothing;
//! - [`add_rms_norm`], [`rotary_angles`], [`norm_rope`] and [`swiglu`]: what stands between the matrix products of a Qwen3 layer, one kernel each.
//!
//! On the CPU, and in builds without the feature `cuda`, they run on candle's own operations, tree attention on
//! its products over the same block lists.

#![deny(missing_docs)]

#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod ids;
mod layer;
mod rows;
mod tree_attention;

#[cfg(feature = "cuda")]
pub use cuda::cuda_device;
pub use error::KernelError;
pub use ids::Ids;
pub use layer::{add_rms_norm, norm_rope, rotary_angles, swiglu};
pub use rows::{gather, index_select};
pub use tree_attention::{
    KEY_BLOCK, Lists, PathLists, TreeMask, query_block, tree_attention, tree_attention_with_lse,
};
