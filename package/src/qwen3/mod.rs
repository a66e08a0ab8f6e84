//! A Qwen3 model that runs folded: embeddings and reranking scores of batches of text, each shared
//! prefix computed once.
//!
//! ```
//! use candle_core::{DType, Device};
//! use radix_mlp::Fold;
//! use radix_mlp::qwen3::{FoldLevel, Pooling, Qwen3Config, Qwen3Model, normalize};
//!
//! // A small model of random weights; `Qwen3Model::load` reads a Hugging Face directory.
//! let config = Qwen3Config {
//!     vocab_size: 256,
//!     hidden_size: 64,
//!     intermediate_size: 192,
//!     num_hidden_layers: 2,
//!     num_attention_heads: 4,
//!     num_key_value_heads: 2,
//!     head_dim: 16,
//!     max_position_embeddings: 512,
//!     rms_norm_eps: 1e-6,
//!     rope_theta: 1e6,
//!     rope_factor: 1.0,
//!     attention_bias: false,
//!     tie_word_embeddings: true,
//! };
//! let model = Qwen3Model::random(&config, 42, DType::F32, &Device::Cpu)?;
//!
//! // Two sequences that share two tokens: 4 rows are computed instead of 6.
//! let fold = Fold::builder(&[7, 8, 1, 7, 8, 2], &[0, 1, 2, 0, 1, 2], &[0, 3, 6]).build()?;
//! let states = model.forward(&fold, FoldLevel::Full)?;
//! let embeddings = normalize(&states.pool(Pooling::LastToken)?)?;
//! assert_eq!(embeddings.dims(), [2, 64]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! There are two forward passes: `cpu` for f32 on the CPU, and `portable`, in tensor operations, for every device and
//! dtype. `Qwen3Model::forward` chooses.

mod attention;
mod config;
mod cost;
mod cpu;
mod error;
mod gemm;
mod model;
mod pooling;
mod portable;
mod rope;
mod simd;
mod weights;

pub use config::Qwen3Config;
pub use error::ModelError;
pub use model::{FoldLevel, Qwen3Model};
pub use pooling::{HiddenStates, Pooling, normalize, truncate_dimensions};

use model::{Expansion, Rows};
