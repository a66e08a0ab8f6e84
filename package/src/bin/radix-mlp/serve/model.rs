//! The model behind the queue, and what its directory says about prompts and pooling.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, bail};
use candle_core::{Device, Tensor};
use radix_mlp::qwen3::{
    FoldLevel, HiddenStates, Pooling, Qwen3Model, normalize, truncate_dimensions,
};
use radix_mlp::{Budget, Fold, Tokens, plan_batches};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::queue::{Compute, Computed, Want};
use super::telemetry;
use crate::engine::{FoldChoice, fold};

const SENTENCE_TRANSFORMERS_CONFIG: &str = "config_sentence_transformers.json";
const POOLING_CONFIG: &str = "1_Pooling/config.json";

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

impl Compute for ServedModel {
    fn compute(&self, sequences: &[Tokens], wants: &[Vec<Want>]) -> anyhow::Result<Computed> {
        #[cfg(debug_assertions)]
        panic_where_told(sequences);
        let batch = fold(sequences.iter().map(|tokens| &tokens[..]))?;
        let level = self.rule.level(&self.model, &batch);
        let values = match level == FoldLevel::None && batch.num_tokens() > self.batch_tokens {
            false => self.pass(&batch, level, wants)?,
            true => self.passes(sequences, wants)?,
        };
        Ok(Computed {
            values,
            folded: level != FoldLevel::None,
        })
    }
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
    /// The values of a batch that was filled by unique tokens and turns out not to be folded.
    fn passes(
        &self,
        sequences: &[Tokens],
        wants: &[Vec<Want>],
    ) -> anyhow::Result<Vec<Vec<Vec<f32>>>> {
        let mut values = vec![Vec::new(); sequences.len()];
        for part in plan_batches(sequences, Budget::Tokens(self.batch_tokens)) {
            let members = &part.sequences;
            let batch = fold(members.iter().map(|&s| &sequences[s][..]))?;
            let wants: Vec<Vec<Want>> = members.iter().map(|&s| wants[s].clone()).collect();
            let found = self.pass(&batch, FoldLevel::None, &wants)?;
            for (&s, found) in members.iter().zip(found) {
                values[s] = found;
            }
        }
        Ok(values)
    }

    /// The values of each sequence, by one forward pass.
    fn pass(
        &self,
        batch: &Fold,
        level: FoldLevel,
        wants: &[Vec<Want>],
    ) -> anyhow::Result<Vec<Vec<Vec<f32>>>> {
        telemetry::pass(match level {
            FoldLevel::None => batch.num_tokens(),
            FoldLevel::Mlp | FoldLevel::Full => batch.num_nodes(),
        });
        let states = self.model.forward(batch, level)?;
        let mut askers: HashMap<Want, Vec<usize>> = HashMap::new();
        for (sequence, wants) in wants.iter().enumerate() {
            for &want in wants {
                askers.entry(want).or_default().push(sequence);
            }
        }
        let mut found = HashMap::new();
        for (want, askers) in askers {
            let values = self.values(&states, want, &askers)?;
            found.extend(askers.into_iter().map(|s| (s, want)).zip(values));
        }
        let values = wants.iter().enumerate();
        let values =
            values.map(|(s, wants)| wants.iter().map(|&w| found[&(s, w)].clone()).collect());
        Ok(values.collect())
    }

    /// What is wanted of these sequences.
    fn values(
        &self,
        states: &HiddenStates<'_>,
        want: Want,
        sequences: &[usize],
    ) -> anyhow::Result<Vec<Vec<f32>>> {
        let scores = |scores: Vec<f32>| sequences.iter().map(|&s| vec![scores[s]]).collect();
        match (want, self.answers) {
            (Want::Logit, Some(YesNo { yes, no })) => {
                Ok(scores(self.model.yes_logits(states, yes, no)?))
            }
            (Want::Probability, Some(YesNo { yes, no })) => {
                Ok(scores(self.model.yes_probabilities(states, yes, no)?))
            }
            (Want::Logit | Want::Probability, None) => {
                bail!("the tokenizer has no \"yes\" and \"no\" to score with")
            }
            (
                Want::Embedding {
                    normalize: unit,
                    dimensions,
                },
                _,
            ) => {
                let rows: Vec<u32> = sequences.iter().map(|&s| s as u32).collect();
                let pooled = states.pool(self.pooling)?.to_device(&Device::Cpu)?;
                let rows = Tensor::from_vec(rows, sequences.len(), &Device::Cpu)?;
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
    }
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
            read_json(&directory.join(SENTENCE_TRANSFORMERS_CONFIG))?.unwrap_or_default();
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

/// What sentence-transformers' `1_Pooling/config.json` says: since version 6 one name or several,
/// before that a flag for each.
#[derive(Deserialize)]
struct PoolingConfig {
    pooling_mode: Option<Names>,
    #[serde(flatten)]
    flags: BTreeMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    One(String),
    Several(Vec<String>),
}

impl PoolingConfig {
    fn names(self) -> Vec<String> {
        match self.pooling_mode {
            Some(Names::One(name)) => vec![name],
            Some(Names::Several(names)) => names,
            None => {
                let on = self.flags.into_iter().filter(|(_, value)| *value == true);
                let names = on.filter_map(|(flag, _)| {
                    let name = flag.strip_prefix("pooling_mode_")?;
                    Some(
                        name.trim_end_matches("_tokens")
                            .trim_end_matches("_token")
                            .to_owned(),
                    )
                });
                names.collect()
            }
        }
    }
}

/// The pooling that the model's directory names; the last token's where it names none.
pub fn pooling(directory: &Path) -> anyhow::Result<Pooling> {
    let path = directory.join(POOLING_CONFIG);
    let Some(config) = read_json::<PoolingConfig>(&path)? else {
        return Ok(Pooling::LastToken);
    };
    let names = config.names();
    match names.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["cls"] => Ok(Pooling::Cls),
        ["mean"] => Ok(Pooling::Mean),
        ["lasttoken"] => Ok(Pooling::LastToken),
        _ => bail!(
            "{} names {names:?}, not one of cls, mean and lasttoken: give --pooling",
            path.display()
        ),
    }
}

/// What a model is served for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Task {
    /// Embeddings
    Embed,
    /// Scores of pairs
    Rerank,
    /// Both: whoever asks knows what the model was trained for
    Any,
}

/// What the model's directory says that it was trained for. Rerankers with a language model's head
/// look like any language model, so that the answer is `Any` for them.
pub fn task(directory: &Path) -> anyhow::Result<Task> {
    #[derive(Default, Deserialize)]
    struct Config {
        model_type: Option<String>,
        #[serde(default)]
        architectures: Vec<String>,
    }
    let read = |name: &str| read_json::<Config>(&directory.join(name));
    let saved = read(SENTENCE_TRANSFORMERS_CONFIG)?.unwrap_or_default();
    match saved.model_type.as_deref() {
        Some("SentenceTransformer") => return Ok(Task::Embed),
        Some("CrossEncoder") => return Ok(Task::Rerank),
        _ => {}
    }
    let architectures = read("config.json")?.unwrap_or_default().architectures;
    // `Qwen3Model` is the model without a head, whatever weights the file has.
    let headless = architectures.iter().any(|name| name == "Qwen3Model");
    match headless || directory.join(POOLING_CONFIG).exists() {
        true => Ok(Task::Embed),
        false => Ok(Task::Any),
    }
}

/// Name and revision of a model: those of Hugging Face's cache where its directory is in there.
pub fn name(directory: &Path) -> (String, Option<String>) {
    let mut names = directory.ancestors().map(|path| {
        let name = path.file_name().unwrap_or(path.as_os_str());
        name.to_string_lossy().into_owned()
    });
    let own = names.next().unwrap_or_default();
    let (above, repository) = (names.next(), names.next().unwrap_or_default());
    match repository.strip_prefix("models--") {
        Some(name) if above.as_deref() == Some("snapshots") => (name.replace("--", "/"), Some(own)),
        _ => (own, None),
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
