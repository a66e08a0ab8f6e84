//! What a model's directory says about prompts, pooling and what it was trained for.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail};
use radix_mlp::qwen3::Pooling;
use serde::Deserialize;
use serde::de::DeserializeOwned;

const SENTENCE_TRANSFORMERS_CONFIG: &str = "config_sentence_transformers.json";
const POOLING_CONFIG: &str = "1_Pooling/config.json";

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
