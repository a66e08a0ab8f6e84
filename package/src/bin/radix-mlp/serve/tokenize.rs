//! From the texts of a request to its sequences, within the server's limits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use radix_mlp::text::{MaxLength, TextError, reranker};

use super::api::{Input, RerankRequest};
use super::error::ApiError;
use super::routes::App;

/// Sequences of a request, and what it took to make them.
pub struct Tokenized {
    pub sequences: Vec<Vec<u32>>,
    pub characters: usize,
    pub time: Duration,
}

impl App {
    pub fn max_length(&self, truncate: Option<bool>) -> MaxLength {
        MaxLength {
            tokens: self.info.max_input_length,
            truncate: truncate.unwrap_or(self.info.auto_truncate),
        }
    }

    /// Refuses a number of inputs that is none or too many.
    pub fn check_count(&self, count: usize) -> Result<(), ApiError> {
        let max = self.info.max_client_batch_size;
        match count {
            0 => Err(ApiError::empty("inputs")),
            count if count > max => Err(ApiError::too_large(format!(
                "{count} inputs are more than the {max} of --max-client-batch-size"
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses what would fail a batch that others share.
    fn check_ids(&self, ids: &[u32]) -> Result<(), ApiError> {
        let size = self.vocab_size;
        match ids.iter().find(|&&id| id as usize >= size) {
            Some(id) => Err(ApiError::validation(format!(
                "token id {id} is outside the vocabulary of {size}"
            ))),
            None => Ok(()),
        }
    }

    /// All sequences, or the first error.
    fn all_of(
        &self,
        sequences: Vec<Result<Vec<u32>, TextError>>,
    ) -> Result<Vec<Vec<u32>>, ApiError> {
        let check = |sequence: Result<Vec<u32>, TextError>| {
            let ids = sequence.map_err(|error| ApiError::of_text(&error))?;
            self.check_ids(&ids)?;
            Ok(ids)
        };
        sequences.into_iter().map(check).collect()
    }

    /// The sequences of `input`.
    pub fn tokenize(
        &self,
        input: Input,
        prompt_name: Option<&str>,
        max: MaxLength,
    ) -> Result<Tokenized, ApiError> {
        let start = Instant::now();
        let texts = match input {
            Input::Text(text) => vec![text],
            Input::Texts(texts) => texts,
            Input::Ids(ids) => return self.of_ids(vec![ids], prompt_name, max),
            Input::IdLists(lists) => return self.of_ids(lists, prompt_name, max),
        };
        self.check_count(texts.len())?;
        let prompt = self
            .prompts
            .get(prompt_name)
            .map_err(ApiError::validation)?;
        let texts: Vec<String> = texts
            .into_iter()
            .map(|text| prompt.to_owned() + &text)
            .collect();
        let sequences = self.encoder.encode(&texts, max);
        Ok(Tokenized {
            sequences: self.all_of(sequences)?,
            characters: characters(&texts),
            time: start.elapsed(),
        })
    }

    fn of_ids(
        &self,
        mut lists: Vec<Vec<u32>>,
        prompt_name: Option<&str>,
        max: MaxLength,
    ) -> Result<Tokenized, ApiError> {
        self.check_count(lists.len())?;
        if let Some(name) = prompt_name {
            let message = format!("prompt_name {name:?} goes with texts, not with token ids");
            return Err(ApiError::validation(message));
        }
        for ids in &mut lists {
            if max.truncate {
                ids.truncate(max.tokens);
            }
            let (tokens, max) = (ids.len(), max.tokens);
            if tokens == 0 {
                return Err(ApiError::empty("inputs"));
            }
            if tokens > max {
                return Err(ApiError::of_text(&TextError::TooLong { tokens, max }));
            }
            self.check_ids(ids)?;
        }
        Ok(Tokenized {
            sequences: lists,
            characters: 0,
            time: Duration::ZERO,
        })
    }

    pub fn tokenize_pairs(&self, request: &RerankRequest) -> Result<Tokenized, ApiError> {
        let start = Instant::now();
        self.check_count(request.texts.len())?;
        let Some(prompt) = &self.pair_prompt else {
            let message = "the model is no reranker: it has no LM head or no \"yes\" and \"no\"";
            return Err(ApiError::validation(message));
        };
        let query = &request.query;
        let pair = |text: &String| reranker::pair(reranker::INSTRUCTION, query, text);
        let pairs: Vec<String> = request.texts.iter().map(pair).collect();
        let max = self.max_length(request.truncate);
        let sequences = self.encoder.encode_in_prompt(&pairs, prompt, max);
        Ok(Tokenized {
            sequences: self.all_of(sequences)?,
            characters: characters(&pairs),
            time: start.elapsed(),
        })
    }
}

fn characters(texts: &[String]) -> usize {
    texts.iter().map(|text| text.chars().count()).sum()
}

/// Makes tokens of `bytes` of text, beside the threads that serve connections.
pub async fn tokenized<T: Send + 'static>(
    app: Arc<App>,
    bytes: usize,
    work: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let work = {
        let app = app.clone();
        move || work(&app)
    };
    let bytes = bytes.min(app.tokenizing_bytes) as u32;
    let room = app.tokenizing.acquire_many(bytes).await;
    let result = match room {
        Ok(_room) => tokio::task::spawn_blocking(work).await,
        Err(_) => return Err(ApiError::unhealthy()),
    };
    result.unwrap_or_else(|error| Err(ApiError::backend(error.to_string())))
}
