//! The model behind the queue, and what its directory says about prompts and pooling.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail};
use radix_mlp::qwen3::{FoldLevel, Pooling, Qwen3Model};
use radix_mlp::{Fold, Tokens};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::queue::{Compute, Computed, Want};
use crate::engine::{FoldChoice, fold};

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
    pub pooling: Pooling,
    pub answers: Option<YesNo>,
}

impl Compute for ServedModel {
    fn compute(&self, sequences: &[Tokens], wants: &[Vec<Want>]) -> anyhow::Result<Computed> {
        let fold = fold(sequences.iter().map(|tokens| &tokens[..]))?;
        let level = self.rule.level(&self.model, &fold);
        let states = self.model.forward(&fold, level)?;
        let embeddings = match wants.iter().flatten().any(|want| *want != Want::Score) {
            true => states.pool(self.pooling)?.to_vec2()?,
            false => Vec::new(),
        };
        let scores = match (
            self.answers,
            wants.iter().flatten().any(|want| *want == Want::Score),
        ) {
            (Some(YesNo { yes, no }), true) => self.model.yes_logits(&states, yes, no)?,
            (None, true) => bail!("the tokenizer has no \"yes\" and \"no\" to score with"),
            (_, false) => Vec::new(),
        };
        let value = |sequence: usize, want: &Want| match *want {
            Want::Score => vec![scores[sequence]],
            Want::Embedding {
                normalize,
                dimensions,
            } => finish(&embeddings[sequence], normalize, dimensions),
        };
        let values = wants.iter().enumerate();
        Ok(Computed {
            values: values
                .map(|(s, wants)| wants.iter().map(|w| value(s, w)).collect())
                .collect(),
            folded: level != FoldLevel::None,
        })
    }
}

/// The first `dimensions` of an embedding, scaled to length 1 where that is asked for.
fn finish(embedding: &[f32], normalize: bool, dimensions: Option<usize>) -> Vec<f32> {
    let kept = &embedding[..dimensions.unwrap_or(embedding.len())];
    let norm = kept.iter().map(|x| x * x).sum::<f32>().sqrt();
    let scale = if normalize && norm > 0.0 {
        norm.recip()
    } else {
        1.0
    };
    kept.iter().map(|x| x * scale).collect()
}

/// Texts that are put before inputs, by name.
#[derive(Debug, Default, Deserialize)]
pub struct Prompts {
    #[serde(default)]
    prompts: BTreeMap<String, String>,
    #[serde(default)]
    default_prompt_name: Option<String>,
}

impl Prompts {
    /// Reads `config_sentence_transformers.json`, which a model may have.
    pub fn load(directory: &Path) -> anyhow::Result<Self> {
        let prompts: Self =
            read_json(&directory.join("config_sentence_transformers.json"))?.unwrap_or_default();
        if let Some(name) = &prompts.default_prompt_name {
            prompts.get(Some(name)).map_err(anyhow::Error::msg)?;
        }
        Ok(prompts)
    }

    /// The prompt of this name, or the model's default; or why there is none.
    pub fn get(&self, name: Option<&str>) -> Result<&str, String> {
        let Some(name) = name.or(self.default_prompt_name.as_deref()) else {
            return Ok("");
        };
        let prompt = self.prompts.get(name).map(String::as_str);
        prompt.ok_or_else(|| {
            let names: Vec<&str> = self.prompts.keys().map(String::as_str).collect();
            format!("no prompt is named {name:?}: the model has {names:?}")
        })
    }
}

/// The part of sentence-transformers' `1_Pooling/config.json` that models of this kind use.
#[derive(Deserialize)]
struct PoolingConfig {
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
    #[serde(default)]
    pooling_mode_lasttoken: bool,
}

/// The pooling that the model's directory names; the last token's where it names none.
pub fn pooling(directory: &Path) -> anyhow::Result<Pooling> {
    let path = directory.join("1_Pooling").join("config.json");
    let Some(config) = read_json::<PoolingConfig>(&path)? else {
        return Ok(Pooling::LastToken);
    };
    let PoolingConfig {
        pooling_mode_cls_token: cls,
        pooling_mode_mean_tokens: mean,
        pooling_mode_lasttoken: last,
    } = config;
    match (cls, mean, last) {
        (true, false, false) => Ok(Pooling::Cls),
        (false, true, false) => Ok(Pooling::Mean),
        (false, false, true) => Ok(Pooling::LastToken),
        _ => bail!(
            "{} names no single pooling of cls, mean and last token: give --pooling",
            path.display()
        ),
    }
}

/// As text-embeddings-inference spells it.
pub fn pooling_name(pooling: Pooling) -> &'static str {
    match pooling {
        Pooling::LastToken => "last_token",
        Pooling::Mean => "mean",
        Pooling::Cls => "cls",
    }
}

/// The file's content, `None` where there is no such file.
fn read_json<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let value = serde_json::from_str(&text);
    value
        .map(Some)
        .with_context(|| format!("cannot parse {}", path.display()))
}
