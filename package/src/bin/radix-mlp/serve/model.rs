//! The model behind the queue, and what its directory says about prompts and pooling.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use anyhow::{Context, bail};
use candle_core::{Device, Tensor};
use radix_mlp::qwen3::{
    FoldLevel, HiddenStates, Pooling, Qwen3Model, normalize, truncate_dimensions,
};
use radix_mlp::{Budget, Fold, Tokens, plan_batches};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::pipeline::{Compute, Computed};
use super::queue::Want;
use super::telemetry;
use crate::engine::{FoldChoice, fold};

const SENTENCE_TRANSFORMERS_CONFIG: &str = "config_sentence_transformers.json";
const POOLING_CONFIG: &str = "1_Pooling/config.json";

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
        let sequences: Vec<Tokens> = (0..tokens.div_ceil(longest).min(config.vocab_size))
            .map(|s| vec![s as u32; longest.min(tokens - s * longest)].into())
            .collect();
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
