//! Folds a batch of causal sequences onto its prefix trie.
//!
//! In a causal transformer the hidden state of a token depends only on the tokens before it, so
//! sequences that start alike have equal states as far as they are alike. This crate finds what a
//! batch shares and returns the maps between *original space*, the N tokens as packed by the
//! caller, and *compact space*, the N' unique nodes of the batch's prefix trie: everything that is
//! computed token by token is computed once a node.
//!
//! ```
//! use radix_mlp::{Fold, Layout};
//!
//! // Two sequences that share their first two tokens.
//! let input_ids = [5, 6, 7, 5, 6, 8];
//! let position_ids = [0, 1, 2, 0, 1, 2];
//! let fold = Fold::builder(&input_ids, &position_ids, &[0, 3, 6]).build()?;
//! assert_eq!(fold.input_ids(), [5, 6, 7, 8]);
//!
//! // Values go to compact space and back.
//! let compact = fold.fold(&[0.5, 0.6, 0.7, 0.5, 0.6, 0.8], 1)?;
//! assert_eq!(compact, [0.5, 0.6, 0.7, 0.8]);
//! assert_eq!(fold.unfold(&compact, 1)?, [0.5, 0.6, 0.7, 0.5, 0.6, 0.8]);
//!
//! // For tree attention: row q sees row kv if and only if kv <= q && q < subtree_end[kv].
//! let tree = Fold::builder(&input_ids, &position_ids, &[0, 3, 6])
//!     .layout(Layout::DepthFirst)
//!     .build()?;
//! assert_eq!(tree.subtree_end(), Some(&[4, 4, 3, 4][..]));
//! # Ok::<(), radix_mlp::FoldError>(())
//! ```
//!
//! [`compute_fold_and_scatter`] is the same in the form of the published crate 0.0.x. How the trie
//! is built, and what the layouts guarantee, is told in the crate's `DESIGN.md`.
//!
//! # Features
//!
//! None is on by default, and the fold has no dependency.
//!
//! - `candle`: the `qwen3` and `text` modules, a Qwen3 model that runs folded on the CPU.
//! - `cuda`: the same on CUDA devices; needs a CUDA toolkit to build.
//! - `cli`: the `radix-mlp` command, which embeds and reranks text.
//! - `server`: `radix-mlp serve`, the same over HTTP.

mod batching;
mod block_mask;
mod builder;
mod draw;
mod error;
mod fold;
mod hash;
mod ids;
mod path_mask;
mod prefix;
#[cfg(feature = "candle")]
pub mod qwen3;
mod scatter;
mod scheduler;
#[cfg(feature = "candle")]
pub mod text;
mod trie;

pub use crate::batching::{Budget, PlannedBatch, plan_batches};
pub use crate::block_mask::{BlockMask, Csr};
pub use crate::builder::FoldBuilder;
pub use crate::error::FoldError;
pub use crate::fold::{Fold, Layout, compute_fold_and_scatter};
pub use crate::ids::TokenIds;
pub use crate::path_mask::PathMask;
pub use crate::scheduler::{Batch, Next, Scheduled, Scheduler, Ticket, Tokens};

/// Compiles and runs the README's example.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
