use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::attention::AttentionPlan;
use super::config::Qwen3Config;
use super::error::ModelError;
use super::pooling::{HiddenStates, Pooling};
use super::weights::{Head, Weights};
use super::{cost, cpu, portable};
use crate::Fold;

/// How much of a forward pass is computed once for each node of the prefix trie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FoldLevel {
    /// Nothing: N rows everywhere.
    None,
    /// What is position-wise, as in the RadixMLP paper; queries, keys and values are expanded to N
    /// rows in every layer, and the output of the attention is folded back.
    Mlp,
    /// Everything: N' rows everywhere, and each row is a query once.
    #[default]
    Full,
}

/// A Qwen3 model without a key-value cache: text in, hidden states out.
pub struct Qwen3Model {
    config: Qwen3Config,
    weights: Weights,
}

/// What every row of a forward pass starts from.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub input_ids: &'a [u32],
    pub position_ids: &'a [u32],
}

/// The maps by which [`FoldLevel::Mlp`] leaves compact space and returns to it.
#[derive(Clone, Copy)]
pub(super) struct Expansion<'a> {
    pub scatter_indices: &'a [u32],
    pub fold_gather: &'a [u32],
}

impl Qwen3Model {
    /// Loads a Hugging Face directory: `config.json`, and `model.safetensors` or the shards of
    /// `model.safetensors.index.json`. Weights in f32, f16 or bf16 are converted to `dtype`, by
    /// default f32.
    ///
    /// # Errors
    ///
    /// [`ModelError`] where a file or a tensor is missing or has another shape, or the
    /// configuration is not supported.
    pub fn load(
        directory: &Path,
        dtype: Option<DType>,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let dtype = dtype.unwrap_or(DType::F32);
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            let what = "the model".to_owned();
            return Err(ModelError::Dtype { what, dtype });
        }
        let config = Qwen3Config::from_file(&directory.join("config.json"))?;
        let weights = Weights::load(directory, &config, dtype, device)?;
        Ok(Self { config, weights })
    }

    /// A model of random weights in `dtype`, for demonstrations and measurements: the same seed gives the same bits on every
    /// machine.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`] where the sizes don't fit together.
    pub fn random(
        config: &Qwen3Config,
        seed: u64,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        config.validate()?;
        Ok(Self {
            config: config.clone(),
            weights: Weights::random(config, seed, dtype, device)?,
        })
    }

    /// The model's sizes.
    pub fn config(&self) -> &Qwen3Config {
        &self.config
    }

    /// Hidden states after the last norm. Padding rows of the fold are not computed.
    ///
    /// # Errors
    ///
    /// [`ModelError::TokenId`] and [`ModelError::Position`] where the batch has one that the model
    /// has not.
    pub fn forward<'f>(
        &self,
        fold: &'f Fold,
        level: FoldLevel,
    ) -> Result<HiddenStates<'f>, ModelError> {
        self.check(fold)?;
        let embedding = &self.weights.embedding;
        let states = match embedding.device().is_cpu() && embedding.dtype() == DType::F32 {
            true => self.forward_f32_on_cpu(fold, level)?,
            false => portable::forward(&self.config, &self.weights, fold, level)?,
        };
        Ok(HiddenStates {
            fold,
            states,
            compact: level != FoldLevel::None,
        })
    }

    fn forward_f32_on_cpu(&self, fold: &Fold, level: FoldLevel) -> Result<Tensor, ModelError> {
        let compact = Rows {
            input_ids: &fold.input_ids()[..fold.num_nodes()],
            position_ids: &fold.position_ids()[..fold.num_nodes()],
        };
        let plan = AttentionPlan::new(fold, level);
        let run =
            |rows, expansion| cpu::forward(&self.config, &self.weights, rows, &plan, expansion);
        Ok(match level {
            FoldLevel::None => {
                let input_ids = fold.unfold(fold.input_ids(), 1)?;
                let position_ids = fold.unfold(fold.position_ids(), 1)?;
                let original = Rows {
                    input_ids: &input_ids,
                    position_ids: &position_ids,
                };
                run(original, None)?
            }
            FoldLevel::Mlp => {
                let expansion = Expansion {
                    scatter_indices: fold.scatter_indices(),
                    fold_gather: &fold.fold_gather()[..fold.num_nodes()],
                };
                run(compact, Some(expansion))?
            }
            FoldLevel::Full => run(compact, None)?,
        })
    }

    fn check(&self, fold: &Fold) -> Result<(), ModelError> {
        let vocab_size = self.config.vocab_size;
        if let Some(&id) = fold
            .input_ids()
            .iter()
            .find(|&&id| id as usize >= vocab_size)
        {
            return Err(ModelError::TokenId { id, vocab_size });
        }
        let max_position_embeddings = self.config.max_position_embeddings;
        let mut positions = fold.position_ids().iter();
        match positions.find(|&&position| position as usize >= max_position_embeddings) {
            Some(&position) => Err(ModelError::Position {
                position,
                max_position_embeddings,
            }),
            None => Ok(()),
        }
    }

    /// The cheaper of `None` and `Full` for this batch; `None` where they are equal. On the CPU by costs measured there. On
    /// other devices `Full` wherever anything is shared: both run the same kernels, over fewer rows.
    pub fn choose_level(&self, fold: &Fold) -> FoldLevel {
        match self.weights.embedding.device() {
            Device::Cpu => cost::choose_level(&self.config, fold),
            _ if fold.num_nodes() < fold.num_tokens() => FoldLevel::Full,
            _ => FoldLevel::None,
        }
    }

    /// Whether it has an LM head, its own or its embeddings.
    pub fn has_head(&self) -> bool {
        !matches!(self.weights.head, Head::Absent)
    }

    /// How a reranker scores: the probability of token `yes` against token `no` after each
    /// sequence, \[sequences\].
    ///
    /// # Errors
    ///
    /// Those of [`Self::yes_logits`].
    pub fn yes_probabilities(
        &self,
        states: &HiddenStates<'_>,
        yes: u32,
        no: u32,
    ) -> Result<Vec<f32>, ModelError> {
        let logits = self.yes_logits(states, yes, no)?;
        // softmax([yes, no])[0]
        Ok(logits.iter().map(|x| (1.0 + (-x).exp()).recip()).collect())
    }

    /// By how much the logit of token `yes` exceeds that of token `no` after each sequence,
    /// \[sequences\]. The LM head is applied to the last rows and these two tokens only.
    ///
    /// # Errors
    ///
    /// [`ModelError::NoHead`], [`ModelError::TokenId`] and [`ModelError::EmptySequence`].
    pub fn yes_logits(
        &self,
        states: &HiddenStates<'_>,
        yes: u32,
        no: u32,
    ) -> Result<Vec<f32>, ModelError> {
        let vocab_size = self.config.vocab_size;
        if let Some(id) = [yes, no].into_iter().find(|&id| id as usize >= vocab_size) {
            return Err(ModelError::TokenId { id, vocab_size });
        }
        let head = match &self.weights.head {
            Head::Tied => &self.weights.embedding,
            Head::Untied(head) => head,
            Head::Absent => return Err(ModelError::NoHead),
        };
        let tokens = Tensor::new(&[yes, no], head.device())?;
        let head = head.index_select(&tokens, 0)?.to_dtype(DType::F32)?;
        let logits = states.pool(Pooling::LastToken)?.matmul(&head.t()?)?;
        let logits = logits.to_vec2::<f32>()?;
        Ok(logits.iter().map(|row| row[0] - row[1]).collect())
    }
}
