use candle_core::{D, DType, Tensor};

use super::error::ModelError;
use crate::Fold;

/// How the hidden states of a sequence become one embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Pooling {
    /// That of its last token, as Qwen3-Embedding does it.
    #[default]
    LastToken,
    /// The mean over its tokens.
    Mean,
    /// That of its first token.
    Cls,
}

/// The hidden states of a batch: compact rows where the forward pass was folded.
pub struct HiddenStates<'f> {
    pub(super) fold: &'f Fold,
    /// \[rows, hidden\]
    pub(super) states: Tensor,
    /// Whether the rows are nodes of the fold, or its tokens.
    pub(super) compact: bool,
}

impl HiddenStates<'_> {
    /// The states of every token, \[N, hidden\], in the model's dtype.
    ///
    /// # Errors
    ///
    /// Those of candle.
    pub fn unfold(&self) -> Result<Tensor, ModelError> {
        match self.compact {
            true => self.rows_of(0..self.fold.num_tokens()),
            false => Ok(self.states.clone()),
        }
    }

    /// One embedding a sequence, \[sequences, hidden\], f32, without unfolding the batch.
    ///
    /// # Errors
    ///
    /// [`ModelError::EmptySequence`] where a sequence has no tokens.
    pub fn pool(&self, pooling: Pooling) -> Result<Tensor, ModelError> {
        let offsets = self.fold.cu_seq_lengths();
        let mut sequences = Vec::with_capacity(self.fold.num_sequences());
        for (sequence, ends) in offsets.windows(2).enumerate() {
            if ends[0] == ends[1] {
                return Err(ModelError::EmptySequence { sequence });
            }
            sequences.push(ends[0] as usize..ends[1] as usize);
        }
        let pooled = match pooling {
            _ if sequences.is_empty() => self.rows_of([])?,
            Pooling::LastToken => self.rows_of(sequences.iter().map(|tokens| tokens.end - 1))?,
            Pooling::Cls => self.rows_of(sequences.iter().map(|tokens| tokens.start))?,
            Pooling::Mean => {
                let mean = |tokens| -> Result<Tensor, ModelError> {
                    Ok(self.rows_of(tokens)?.to_dtype(DType::F32)?.mean(0)?)
                };
                let means = sequences.into_iter().map(mean);
                Tensor::stack(&means.collect::<Result<Vec<_>, _>>()?, 0)?
            }
        };
        Ok(pooled.to_dtype(DType::F32)?)
    }

    /// The states of these tokens, \[tokens, hidden\].
    fn rows_of(&self, tokens: impl IntoIterator<Item = usize>) -> Result<Tensor, ModelError> {
        let row = |token: usize| match self.compact {
            true => self.fold.scatter_indices()[token],
            false => token as u32,
        };
        let rows: Vec<u32> = tokens.into_iter().map(row).collect();
        let count = rows.len();
        let rows = Tensor::from_vec(rows, count, self.states.device())?;
        Ok(self.states.index_select(&rows, 0)?)
    }
}

/// Divides each row of \[rows, columns\] by its L2 norm; a row of zeros stays.
///
/// # Errors
///
/// Those of candle.
pub fn normalize(embeddings: &Tensor) -> Result<Tensor, ModelError> {
    // What torch.nn.functional.normalize does.
    const SMALLEST_NORM: f32 = 1e-12;
    let norms = embeddings.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    Ok(embeddings.broadcast_div(&norms.maximum(SMALLEST_NORM)?)?)
}

/// The first `dimensions` columns of \[rows, columns\], for embeddings trained to be cut
/// (Matryoshka); to be normalised after this.
///
/// # Errors
///
/// [`ModelError::Dimensions`] where `dimensions` is 0 or more than there are.
pub fn truncate_dimensions(embeddings: &Tensor, dimensions: usize) -> Result<Tensor, ModelError> {
    let hidden_size = embeddings.dim(D::Minus1)?;
    if dimensions == 0 || dimensions > hidden_size {
        return Err(ModelError::Dimensions {
            dimensions,
            hidden_size,
        });
    }
    Ok(embeddings.narrow(D::Minus1, 0, dimensions)?.contiguous()?)
}
