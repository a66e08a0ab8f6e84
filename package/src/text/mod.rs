//! Text to tokens: a Hugging Face tokenizer, and the prompts that models are fed with.

mod cut;
mod template;

use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use tokenizers::{Encoding, Tokenizer};

pub use self::template::{Fields, Template};

/// Why a text cannot become tokens. Each variant carries the offending values.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The tokenizer cannot be read.
    #[error("cannot read tokenizer {}: {source}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: tokenizers::Error,
    },
    /// The tokenizer fails on a text.
    #[error("cannot tokenize: {source}")]
    Encode {
        /// What it says.
        source: tokenizers::Error,
    },
    /// The tokenizer does not know a token that the model needs.
    #[error("the tokenizer has no token {token:?}")]
    NoToken {
        /// The token.
        token: String,
    },
    /// A text that leaves no token to compute.
    #[error("the text has no tokens")]
    Empty,
    /// A text longer than the model's context.
    #[error("the text has {tokens} tokens, more than the {max} that the model takes")]
    TooLong {
        /// Tokens of the text, its prompt included.
        tokens: usize,
        /// The longest sequence allowed.
        max: usize,
    },
    /// A prompt that leaves no room for the text in it.
    #[error("the prompt alone has {tokens} of the {max} tokens that the model takes")]
    NoRoom {
        /// Tokens of the prompt.
        tokens: usize,
        /// The longest sequence allowed.
        max: usize,
    },
    /// A placeholder that templates do not have.
    #[error(
        "unknown placeholder {{{name}}} in the template: there are {{text}}, {{query}}, {{passage}} and {{instruction}}"
    )]
    UnknownPlaceholder {
        /// What stands between the braces.
        name: String,
    },
    /// A brace without its partner.
    #[error("unpaired brace in the template {template:?}: write {{{{ and }}}} for plain braces")]
    UnpairedBrace {
        /// The template.
        template: String,
    },
    /// A template asks for what its input does not have.
    #[error("the template needs {{{placeholder}}}, which the input does not have")]
    MissingField {
        /// The placeholder.
        placeholder: &'static str,
    },
}

/// How long a sequence may be, and what becomes of a longer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxLength {
    /// In tokens.
    pub tokens: usize,
    /// Cut the text at the end instead of refusing it.
    pub truncate: bool,
}

/// A tokenizer.
pub struct TextEncoder {
    tokenizer: Tokenizer,
    /// Whether texts may be cut where `cut` says.
    cuts: bool,
}

impl TextEncoder {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// [`TextError::Load`].
    pub fn from_file(path: &Path) -> Result<Self, TextError> {
        let mut tokenizer = Tokenizer::from_file(path).map_err(|source| TextError::Load {
            path: path.to_owned(),
            source,
        })?;
        // What the file says of padding and truncation is for padded batches of one length.
        tokenizer.with_padding(None);
        let truncation = tokenizer.with_truncation(None).map(|_| ());
        truncation.map_err(|source| TextError::Encode { source })?;
        let cuts = cut::is_exact(&tokenizer);
        Ok(Self { tokenizer, cuts })
    }

    /// The tokens of each text with the tokenizer's special ones around it, in parallel; what all
    /// texts begin with is tokenized once, where the tokenizer is Qwen's. One result a text: those
    /// that fail do not hide those that don't.
    pub fn encode(&self, texts: &[String], max: MaxLength) -> Vec<Result<Vec<u32>, TextError>> {
        self.encode_around(texts, &Prompt::default(), max, true)
    }

    /// The tokens of each text between those of a prompt, without the tokenizer's special ones.
    /// Truncation keeps the prompt whole.
    pub fn encode_in_prompt(
        &self,
        texts: &[String],
        prompt: &Prompt,
        max: MaxLength,
    ) -> Vec<Result<Vec<u32>, TextError>> {
        self.encode_around(texts, prompt, max, false)
    }

    fn encode_around(
        &self,
        texts: &[String],
        prompt: &Prompt,
        max: MaxLength,
        special_tokens: bool,
    ) -> Vec<Result<Vec<u32>, TextError>> {
        // A start that cannot be tokenized is left to each of its texts.
        let start = texts.first().filter(|_| self.cuts).and_then(|text| {
            let shared = cut::shared(texts);
            Some((shared, self.ids(&text[..shared]).ok()?))
        });
        let (shared, start) = start.unwrap_or_default();
        let encode = |text: &String| {
            let encoding = self.encoding(&text[shared..], special_tokens)?;
            let (ids, special) = (encoding.get_ids(), encoding.get_special_tokens_mask());
            let before = special.iter().take_while(|&&special| special == 1).count();
            let whole = [&ids[..before], &start, &ids[before..]].concat();
            prompt.surround(&whole, max, special.last() == Some(&1))
        };
        texts.par_iter().map(encode).collect()
    }

    fn encoding(&self, text: &str, special_tokens: bool) -> Result<Encoding, TextError> {
        let encoding = self.tokenizer.encode_fast(text, special_tokens);
        encoding.map_err(|source| TextError::Encode { source })
    }

    /// The tokens of a text, without the tokenizer's special ones.
    fn ids(&self, text: &str) -> Result<Vec<u32>, TextError> {
        Ok(self.encoding(text, false)?.get_ids().to_vec())
    }

    /// A prompt from the texts before and after what varies.
    ///
    /// # Errors
    ///
    /// [`TextError::Encode`].
    pub fn prompt(&self, before: &str, after: &str) -> Result<Prompt, TextError> {
        let (before, after) = (self.ids(before)?, self.ids(after)?);
        Ok(Prompt { before, after })
    }

    /// The tokens of a text and where they stand in it, the tokenizer's special ones with
    /// `special_tokens`.
    ///
    /// # Errors
    ///
    /// [`TextError::Encode`].
    pub fn tokens(&self, text: &str, special_tokens: bool) -> Result<Vec<TextToken>, TextError> {
        let encoding = self.tokenizer.encode_char_offsets(text, special_tokens);
        let encoding = encoding.map_err(|source| TextError::Encode { source })?;
        let ids = encoding.get_ids().iter().zip(encoding.get_tokens());
        let places = encoding.get_special_tokens_mask().iter();
        let places = places.zip(encoding.get_offsets());
        let token = |((&id, token), (&special, &(start, end))): ((_, &String), (_, _))| TextToken {
            id,
            token: token.clone(),
            special: special == 1,
            characters: start..end,
        };
        Ok(ids.zip(places).map(token).collect())
    }

    /// The id of a token of the vocabulary.
    ///
    /// # Errors
    ///
    /// [`TextError::NoToken`].
    pub fn token_id(&self, token: &str) -> Result<u32, TextError> {
        let id = self.tokenizer.token_to_id(token);
        id.ok_or_else(|| TextError::NoToken {
            token: token.to_owned(),
        })
    }
}

/// A token of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextToken {
    /// Its id.
    pub id: u32,
    /// How the vocabulary spells it.
    pub token: String,
    /// Whether the tokenizer added it.
    pub special: bool,
    /// The characters of the text that it stands for.
    pub characters: Range<usize>,
}

/// Tokens around every text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    before: Vec<u32>,
    after: Vec<u32>,
}

impl Prompt {
    /// `text` within the prompt and within `max`. Where `text` ends with a special token, which the
    /// model may pool, truncation cuts before it.
    fn surround(
        &self,
        text: &[u32],
        max: MaxLength,
        ends_special: bool,
    ) -> Result<Vec<u32>, TextError> {
        let prompt = self.before.len() + self.after.len();
        let tokens = prompt + text.len();
        if tokens == 0 {
            return Err(TextError::Empty);
        }
        if tokens <= max.tokens {
            return Ok([&self.before, text, &self.after].concat());
        }
        if !max.truncate {
            let max = max.tokens;
            return Err(TextError::TooLong { tokens, max });
        }
        let Some(room) = max.tokens.checked_sub(prompt + 1) else {
            return Err(TextError::NoRoom {
                tokens: prompt,
                max: max.tokens,
            });
        };
        let last = if ends_special { text.len() - 1 } else { room };
        Ok([&self.before, &text[..room], &text[last..=last], &self.after].concat())
    }
}

/// The prompt of Qwen3-Reranker: what the model is asked, of which "yes" or "no" is the answer.
/// Source: the model card of Qwen/Qwen3-Reranker-0.6B.
pub mod reranker {
    /// Instruction where the user gives none.
    pub const INSTRUCTION: &str =
        "Given a web search query, retrieve relevant passages that answer the query";

    /// Text before every pair.
    pub const BEFORE: &str = "<|im_start|>system\nJudge whether the Document meets the \
        requirements based on the Query and the Instruct provided. Note that the answer can only \
        be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n";

    /// Text after every pair.
    pub const AFTER: &str = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";

    /// The pair itself.
    pub fn pair(instruction: &str, query: &str, passage: &str) -> String {
        format!("<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}")
    }
}
