use std::path::PathBuf;

use candle_core::DType;

use crate::FoldError;

/// Why a model cannot be loaded or run. Each variant carries the offending values.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file of the model cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The directory holds neither `model.safetensors` nor `model.safetensors.index.json`.
    #[error("no model.safetensors and no model.safetensors.index.json in {}", directory.display())]
    NoWeights {
        /// The model's directory.
        directory: PathBuf,
    },
    /// A JSON file does not have the expected form.
    #[error("cannot parse {}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A safetensors file is damaged.
    #[error("cannot parse {}: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: candle_core::Error,
    },
    /// The model is not a Qwen3.
    #[error("unsupported architecture {architecture:?}: expected Qwen3ForCausalLM or Qwen3Model")]
    Architecture {
        /// `architectures[0]`, or `model_type` where that is absent.
        architecture: String,
    },
    /// Layers that attend within a sliding window, which the fold does not cover.
    #[error("sliding-window attention is not supported (sliding_window {sliding_window:?})")]
    SlidingWindow {
        /// The window in tokens, where the configuration names it.
        sliding_window: Option<usize>,
    },
    /// A model whose tokens also see later ones: equal prefixes don't give equal states.
    #[error("bidirectional attention cannot be folded ({field})")]
    Bidirectional {
        /// The field of `config.json` that says so.
        field: &'static str,
    },
    /// A RoPE scaling other than `default` and `linear`.
    #[error("unsupported RoPE type {rope_type:?}: expected \"default\" or \"linear\"")]
    RopeType {
        /// The type in `config.json`.
        rope_type: String,
    },
    /// An activation other than `silu`.
    #[error("unsupported activation {activation:?}: expected \"silu\"")]
    Activation {
        /// `hidden_act` in `config.json`.
        activation: String,
    },
    /// A size in the configuration cannot be right.
    #[error("invalid configuration: {field} is {value}, {requirement}")]
    Config {
        /// The field of `config.json`.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it has to be.
        requirement: &'static str,
    },
    /// A tensor is in none of the files.
    #[error("the weights have no tensor {name:?}")]
    MissingTensor {
        /// Name of the tensor, as in the files.
        name: String,
    },
    /// A tensor does not have the shape that the configuration asks for.
    #[error("tensor {name:?} has shape {found:?}, expected {expected:?}")]
    TensorShape {
        /// Name of the tensor, as in the files.
        name: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor, or the computation asked for, is not in a floating-point format.
    #[error("{what} has dtype {dtype:?}, expected f32, f16 or bf16")]
    Dtype {
        /// Name of the tensor, or "the model".
        what: String,
        /// Its dtype.
        dtype: DType,
    },
    /// A token id that the model has no embedding for.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    TokenId {
        /// The id.
        id: u32,
        /// Number of embeddings.
        vocab_size: usize,
    },
    /// A position beyond the model's context.
    #[error("position {position} is beyond the model's context of {max_position_embeddings}")]
    Position {
        /// The position.
        position: u32,
        /// The context in tokens.
        max_position_embeddings: usize,
    },
    /// A sequence without tokens has no hidden state to pool.
    #[error("sequence {sequence} is empty and cannot be pooled")]
    EmptySequence {
        /// Index of the sequence.
        sequence: usize,
    },
    /// The checkpoint has no LM head: it embeds but does not score.
    #[error("the model has no LM head: its embeddings are not tied and it has no lm_head.weight")]
    NoHead,
    /// More dimensions are asked for than an embedding has.
    #[error("cannot take {dimensions} dimensions of {hidden_size}")]
    Dimensions {
        /// How many are asked for.
        dimensions: usize,
        /// How many there are.
        hidden_size: usize,
    },
    /// The batch cannot be folded.
    #[error(transparent)]
    Fold(#[from] FoldError),
    /// An operation on tensors refuses what it gets, or fails.
    #[error(transparent)]
    Kernel(#[from] radix_mlp_kernels::KernelError),
    /// An operation of candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
