//! The model behind the queue.

use std::collections::{HashMap, HashSet};

use anyhow::bail;
use candle_core::{Device, Tensor};
use radix_mlp::qwen3::{
    FoldLevel, HiddenStates, Pooling, Qwen3Model, normalize, truncate_dimensions,
};
use radix_mlp::{Budget, Fold, Tokens, plan_batches};

use super::pipeline::{Compute, Computed};
use super::queue::Want;
use super::telemetry;
use crate::engine::{FoldChoice, fold};

/// Tokens of a sequence of the first batch.
const WARM_UP_LENGTH: usize = 512;

/// When a batch is folded.
#[derive(Clone, Copy, Debug)]
pub enum FoldRule {
    Choice(FoldChoice),
    /// Where N' / N is at most this.
    Threshold(f64),
}

impl FoldRule {
    fn level(self, model: &Qwen3Model, fold: &Fold) -> FoldLevel {
        match self {
            Self::Choice(choice) => choice.level(model, fold),
            Self::Threshold(threshold) if 1.0 <= threshold * fold.compression() => FoldLevel::Full,
            Self::Threshold(_) => FoldLevel::None,
        }
    }
}

/// Tokens whose logits are a reranker's score.
#[derive(Clone, Copy, Debug)]
pub struct YesNo {
    pub yes: u32,
    pub no: u32,
}

pub struct ServedModel {
    pub model: Qwen3Model,
    pub rule: FoldRule,
    /// Most rows that go through the model at once.
    pub batch_tokens: usize,
    pub pooling: Pooling,
    pub answers: Option<YesNo>,
}

/// A batch as it goes through the model, in one pass or several.
pub struct Passes {
    level: FoldLevel,
    /// The sequences of each pass, by their numbers, and these folded.
    parts: Vec<(Vec<usize>, Fold)>,
}

/// What is wanted of each pass, on the host.
pub struct Outputs {
    level: FoldLevel,
    /// With the sequences' numbers.
    parts: Vec<(Vec<usize>, PassOutputs)>,
}

struct PassOutputs {
    /// f32 \[sequences, hidden\], where embeddings are wanted.
    pooled: Option<Tensor>,
    /// Of all sequences, for each kind of score that is wanted.
    scores: HashMap<Want, Vec<f32>>,
}

impl Compute for ServedModel {
    type Prepared = Passes;
    type Outputs = Outputs;

    fn prepare(&self, sequences: &[Tokens]) -> anyhow::Result<Passes> {
        #[cfg(debug_assertions)]
        panic_where_told(sequences);
        let fold_of = |members: &[usize]| fold(members.iter().map(|&s| &sequences[s][..]));
        let all: Vec<usize> = (0..sequences.len()).collect();
        let batch = fold_of(&all)?;
        let level = self.rule.level(&self.model, &batch);
        if level != FoldLevel::None || batch.num_tokens() <= self.batch_tokens {
            let parts = vec![(all, batch)];
            return Ok(Passes { level, parts });
        }
        // Filled by unique tokens, and not folded after all.
        let parts = plan_batches(sequences, Budget::Tokens(self.batch_tokens)).into_iter();
        let parts = parts.map(|part| {
            let batch = fold_of(&part.sequences)?;
            anyhow::Ok((part.sequences, batch))
        });
        let parts = parts.collect::<Result<_, _>>()?;
        Ok(Passes { level, parts })
    }

    fn run(&self, Passes { level, parts }: Passes, wants: &[Vec<Want>]) -> anyhow::Result<Outputs> {
        let parts = parts.into_iter().map(|(members, batch)| {
            let outputs = self.pass(&batch, level, &wanted(&members, wants))?;
            anyhow::Ok((members, outputs))
        });
        let parts = parts.collect::<Result<_, _>>()?;
        Ok(Outputs { level, parts })
    }

    fn finish(&self, outputs: Outputs, wants: &[Vec<Want>]) -> anyhow::Result<Computed> {
        let values = wants.iter().map(|wants| vec![Vec::new(); wants.len()]);
        let mut values: Vec<_> = values.collect();
        for (members, outputs) in &outputs.parts {
            for want in wanted(members, wants) {
                let asks = |&place: &usize| wants[members[place]].contains(&want);
                let places: Vec<usize> = (0..members.len()).filter(asks).collect();
                for (&place, found) in places.iter().zip(outputs.values(want, &places)?) {
                    let own = values[members[place]].iter_mut();
                    let own = own.zip(&wants[members[place]]);
                    own.filter(|&(_, &asked)| asked == want)
                        .for_each(|(value, _)| value.clone_from(&found));
                }
            }
        }
        Ok(Computed {
            values,
            folded: outputs.level != FoldLevel::None,
        })
    }
}

fn wanted(members: &[usize], wants: &[Vec<Want>]) -> HashSet<Want> {
    let wants = members.iter().flat_map(|&s| &wants[s]);
    wants.copied().collect()
}

/// Panics in a batch that has this token. A test of a whole process has no other way to make a model
/// panic that is not wrong; release builds do not have this one.
#[cfg(debug_assertions)]
fn panic_where_told(sequences: &[Tokens]) {
    let token = std::env::var("RADIX_MLP_TEST_PANIC_TOKEN").ok();
    let token: Option<u32> = token.and_then(|token| token.parse().ok());
    let told = token.is_some_and(|token| sequences.iter().any(|ids| ids.contains(&token)));
    assert!(!told, "told to panic");
}

impl ServedModel {
    /// Computes a batch of so many different tokens, which takes the memory that later ones use, or fails for want of it.
    pub fn warm_up(&self, tokens: usize) -> anyhow::Result<()> {
        let want = Want::Embedding {
            normalize: true,
            dimensions: None,
        };
        let config = self.model.config();
        let longest = config.max_position_embeddings.min(WARM_UP_LENGTH);
        let sequences = strangers(tokens, longest, config.vocab_size);
        let wants = vec![vec![want]; sequences.len()];
        let batch = self.prepare(&sequences)?;
        self.finish(self.run(batch, &wants)?, &wants)?;
        Ok(())
    }

    fn pass(
        &self,
        batch: &Fold,
        level: FoldLevel,
        wanted: &HashSet<Want>,
    ) -> anyhow::Result<PassOutputs> {
        telemetry::pass(match level {
            FoldLevel::None => batch.num_tokens(),
            FoldLevel::Mlp | FoldLevel::Full => batch.num_nodes(),
        });
        let states = self.model.forward(batch, level)?;
        let mut outputs = PassOutputs {
            pooled: None,
            scores: HashMap::new(),
        };
        for &want in wanted {
            if let Want::Embedding { .. } = want {
                if outputs.pooled.is_none() {
                    let pooled = states.pool(self.pooling)?;
                    outputs.pooled = Some(pooled.to_device(&Device::Cpu)?);
                }
            } else {
                outputs.scores.insert(want, self.scores(&states, want)?);
            }
        }
        Ok(outputs)
    }

    fn scores(&self, states: &HiddenStates<'_>, want: Want) -> anyhow::Result<Vec<f32>> {
        let Some(YesNo { yes, no }) = self.answers else {
            bail!("the tokenizer has no \"yes\" and \"no\" to score with")
        };
        Ok(match want {
            Want::Logit => self.model.yes_logits(states, yes, no)?,
            _ => self.model.yes_probabilities(states, yes, no)?,
        })
    }
}

/// Sequences of so many tokens in all, or as many as the vocabulary has firsts for, that share nothing.
pub fn strangers(tokens: usize, longest: usize, vocab_size: usize) -> Vec<Tokens> {
    let sequences = 0..tokens.div_ceil(longest).min(vocab_size);
    sequences
        .map(|s| vec![s as u32; longest.min(tokens - s * longest)].into())
        .collect()
}

impl PassOutputs {
    /// What is wanted of the sequences at these places.
    fn values(&self, want: Want, places: &[usize]) -> anyhow::Result<Vec<Vec<f32>>> {
        if let Some(scores) = self.scores.get(&want) {
            return Ok(places.iter().map(|&place| vec![scores[place]]).collect());
        }
        let (
            Want::Embedding {
                normalize: unit,
                dimensions,
            },
            Some(pooled),
        ) = (want, &self.pooled)
        else {
            bail!("{want:?} was not computed")
        };
        let rows: Vec<u32> = places.iter().map(|&place| place as u32).collect();
        let rows = Tensor::from_vec(rows, places.len(), &Device::Cpu)?;
        let mut embeddings = pooled.index_select(&rows, 0)?;
        if let Some(dimensions) = dimensions {
            embeddings = truncate_dimensions(&embeddings, dimensions)?;
        }
        if unit {
            embeddings = normalize(&embeddings)?;
        }
        Ok(embeddings.to_vec2()?)
    }
}
