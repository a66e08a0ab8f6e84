//! From the texts of a request to its sequences, within the server's limits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use radix_mlp::text::{MaxLength, TextError, TextToken, reranker};
use tokio::sync::OwnedSemaphorePermit;

use super::api::{Input, RerankRequest};
use super::error::ApiError;
use super::guard::Room;
use super::routes::App;

/// Bytes of a request's pairs, each with its own copy of the query.
const MAX_PAIR_BYTES: usize = 1 << 26;
/// A token of `/tokenize` takes some 128 bytes until it is sent, an id four.
const IDS_PER_TOKEN: usize = 32;

/// Sequences of a request, and what it took to make them.
pub struct Tokenized {
    pub sequences: Vec<Vec<u32>>,
    pub characters: usize,
    pub time: Duration,
    /// For the tokens, held until they are computed.
    pub room: OwnedSemaphorePermit,
}

type Encoded = Vec<Result<Vec<u32>, TextError>>;

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

    /// The sequences of `texts`, made of a limited number of bytes at a time until one fails.
    fn encode(
        &self,
        texts: impl Iterator<Item = String>,
        encode: impl Fn(&[String]) -> Encoded,
    ) -> Result<Tokenized, ApiError> {
        let start = Instant::now();
        let mut room = self.tokens.take(0)?;
        let (mut sequences, mut characters) = (Vec::new(), 0);
        let mut texts = texts.peekable();
        while let Some(text) = texts.next() {
            let mut bytes = text.len();
            let mut chunk = vec![text];
            while let Some(text) = texts.next_if(|text| bytes + text.len() <= self.tokenizing_bytes)
            {
                bytes += text.len();
                chunk.push(text);
            }
            for ids in encode(&chunk) {
                let ids = ids.map_err(|error| ApiError::of_text(&error))?;
                self.check_ids(&ids)?;
                self.tokens.extend(&mut room, ids.len())?;
                sequences.push(ids);
            }
            characters += chunk.iter().map(|text| text.chars().count()).sum::<usize>();
        }
        Ok(Tokenized {
            sequences,
            characters,
            time: start.elapsed(),
            room,
        })
    }

    /// The sequences of `input`.
    pub fn tokenize(
        &self,
        input: Input,
        prompt_name: Option<&str>,
        max: MaxLength,
    ) -> Result<Tokenized, ApiError> {
        let texts = match input {
            Input::Text(text) => vec![text],
            Input::Texts(texts) => texts,
            Input::Ids(ids) => return self.of_ids(vec![ids], prompt_name, max),
            Input::IdLists(lists) => return self.of_ids(lists, prompt_name, max),
        };
        self.check_count(texts.len())?;
        let prompt = self.prompts.get(prompt_name);
        let prompt = prompt.map_err(ApiError::validation)?;
        let texts = texts.into_iter().map(|text| prompt.to_owned() + &text);
        self.encode(texts, |texts| self.encoder.encode(texts, max))
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
            room: self.tokens.take(lists.iter().map(Vec::len).sum())?,
            sequences: lists,
            characters: 0,
            time: Duration::ZERO,
        })
    }

    /// The pairs of the query and each text. Of a query that is too long by itself, none is made.
    pub fn tokenize_pairs(&self, request: &RerankRequest) -> Result<Tokenized, ApiError> {
        self.check_count(request.texts.len())?;
        let Some(prompt) = &self.pair_prompt else {
            let message = "the model is no reranker: see --task, and model_type of /info";
            return Err(ApiError::validation(message));
        };
        let max = self.max_length(request.truncate);
        let pair = |text: &str| reranker::pair(reranker::INSTRUCTION, &request.query, text);
        let encode = |pairs: &[String]| self.encoder.encode_in_prompt(pairs, prompt, max);
        self.encode(std::iter::once(pair("")), encode)?;
        let bytes = request.pair_bytes();
        if bytes > MAX_PAIR_BYTES {
            let message =
                format!("the query with each text makes {bytes} bytes, more than {MAX_PAIR_BYTES}");
            return Err(ApiError::too_large(message));
        }
        self.encode(request.texts.iter().map(|text| pair(text)), encode)
    }

    /// The tokens of each of `texts` after `prompt`, and the room that they take until they are sent.
    pub fn tokens_of<T>(
        &self,
        prompt: &str,
        texts: Vec<String>,
        special_tokens: bool,
        token: impl Fn(TextToken) -> T,
    ) -> Result<(Vec<Vec<T>>, OwnedSemaphorePermit), ApiError> {
        let mut room = self.tokens.take(0)?;
        let mut lists = Vec::with_capacity(texts.len());
        for text in texts {
            let tokens = self
                .encoder
                .tokens(&(prompt.to_owned() + &text), special_tokens);
            let tokens = tokens.map_err(|error| ApiError::of_text(&error))?;
            self.tokens
                .extend(&mut room, tokens.len() * IDS_PER_TOKEN)?;
            lists.push(tokens.into_iter().map(&token).collect());
        }
        Ok((lists, room))
    }
}

/// Makes tokens of `bytes` of text, beside the threads that serve connections. The request's room is
/// held until that is done, even where nobody waits for it any more.
pub async fn tokenized<T: Send + 'static>(
    app: Arc<App>,
    bytes: usize,
    admitted: Room,
    work: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let bytes = bytes.min(app.tokenizing_bytes) as u32;
    let Ok(turn) = app.tokenizing.clone().acquire_many_owned(bytes).await else {
        return Err(ApiError::unhealthy());
    };
    let work = move || {
        let _held = (admitted, turn);
        work(&app)
    };
    let result = tokio::task::spawn_blocking(work).await;
    result.unwrap_or_else(|error| Err(ApiError::backend(error.to_string())))
}
