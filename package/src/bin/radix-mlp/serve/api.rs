//! The JSON of text-embeddings-inference 1.9 and of OpenAI's embeddings.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One text or several, as strings or as token ids.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of token ids, or a list of such lists"
)]
pub enum Input {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    IdLists(Vec<Vec<u32>>),
}

impl Input {
    /// Bytes of text in it.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Texts(texts) => texts.iter().map(String::len).sum(),
            Self::Ids(_) | Self::IdLists(_) => 0,
        }
    }
}

/// The end at which a text that is too long is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TruncationDirection {
    #[serde(alias = "Left")]
    Left,
    #[default]
    #[serde(alias = "Right")]
    Right,
}

#[derive(Debug, Deserialize, ToSchema)]
pub struct EmbedRequest {
    pub inputs: Input,
    /// Cut what is longer than the model's context; the server's `--auto-truncate` by default
    pub truncate: Option<bool>,
    /// Only "right" is supported
    #[serde(default)]
    pub truncation_direction: TruncationDirection,
    /// Scale each embedding to length 1
    #[serde(default = "yes")]
    pub normalize: bool,
    /// One of the model's prompts, which is put before every text
    pub prompt_name: Option<String>,
    /// Keep the first dimensions, of models trained for it
    pub dimensions: Option<usize>,
}

#[derive(Debug, Deserialize, ToSchema)]
pub struct RerankRequest {
    pub query: String,
    pub texts: Vec<String>,
    /// Cut texts, not the query, where a pair is longer than the model's context
    pub truncate: Option<bool>,
    /// Only "right" is supported
    #[serde(default)]
    pub truncation_direction: TruncationDirection,
    /// Differences of logits instead of probabilities
    #[serde(default)]
    pub raw_scores: bool,
    /// Send the texts back
    #[serde(default)]
    pub return_text: bool,
}

impl RerankRequest {
    /// Bytes of the texts, each with its own copy of the query.
    pub fn pair_bytes(&self) -> usize {
        let texts = self.texts.iter().map(String::len).sum::<usize>();
        texts.saturating_add(self.query.len().saturating_mul(self.texts.len()))
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Rank {
    /// Index in the request's texts
    pub index: usize,
    pub score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
pub struct TokenizeRequest {
    #[schema(inline)]
    pub inputs: TextInput,
    #[serde(default = "yes")]
    pub add_special_tokens: bool,
    pub prompt_name: Option<String>,
}

/// One text or several.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum TextInput {
    Text(String),
    Texts(Vec<String>),
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Token {
    pub id: u32,
    pub text: String,
    pub special: bool,
    /// First character of the text that it stands for
    pub start: Option<usize>,
    /// The character after its last
    pub stop: Option<usize>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EncodingFormat {
    #[default]
    Float,
    /// Little-endian float32
    Base64,
}

#[derive(Debug, Deserialize, ToSchema)]
pub struct OpenAiRequest {
    pub input: Input,
    /// Echoed; there is one model
    pub model: Option<String>,
    #[serde(default)]
    pub encoding_format: EncodingFormat,
    pub dimensions: Option<usize>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum OpenAiVector {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiEmbedding {
    pub object: &'static str,
    pub embedding: OpenAiVector,
    pub index: usize,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiUsage {
    pub prompt_tokens: usize,
    pub total_tokens: usize,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiResponse {
    pub object: &'static str,
    pub data: Vec<OpenAiEmbedding>,
    pub model: String,
    pub usage: OpenAiUsage,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Info {
    pub model_id: String,
    /// Revision, where the directory is one of Hugging Face's cache
    pub model_sha: Option<String>,
    pub model_dtype: &'static str,
    /// What the server answers with: embeddings, scores or both
    pub model_type: ModelType,
    pub max_concurrent_requests: usize,
    /// Longest sequence in tokens
    pub max_input_length: usize,
    pub max_batch_tokens: usize,
    /// Null: tokens bound a batch, not requests
    pub max_batch_requests: Option<usize>,
    pub max_client_batch_size: usize,
    pub auto_truncate: bool,
    /// Threads that make tokens, which are those that compute
    pub tokenization_workers: usize,
    pub version: &'static str,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelType {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding: Option<EmbeddingModel>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reranker: Option<RerankerModel>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EmbeddingModel {
    pub pooling: &'static str,
    pub dimensions: usize,
}

/// As text-embeddings-inference tells of classifiers: names of what is scored.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RerankerModel {
    pub id2label: BTreeMap<String, String>,
    pub label2id: BTreeMap<String, usize>,
}

fn yes() -> bool {
    true
}
