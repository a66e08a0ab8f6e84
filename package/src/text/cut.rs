//! Where texts may be cut so that the tokens of the parts are those of the whole.

use tokenizers::models::ModelWrapper;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

/// How Qwen2 and Qwen3 split a text before they merge bytes, as their tokenizer.json has it. No
/// alternative matches a letter and a space behind it, so that every text is split between the two,
/// and what stands on one side has no say in how the other is split.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Whether a text may be cut wherever a space follows an ASCII letter: the tokenizer splits there,
/// at most composes characters, of which a space is none, and has no added token that could reach
/// over the cut.
pub fn is_exact(tokenizer: &Tokenizer) -> bool {
    let merges = matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_none());
    let composes = matches!(
        tokenizer.get_normalizer(),
        None | Some(NormalizerWrapper::NFC(_))
    );
    let added = tokenizer.get_added_tokens_decoder();
    let reaches = |token: &tokenizers::AddedToken| token.rstrip || token.content.contains(' ');
    merges && composes && splits_words(tokenizer) && !added.values().any(reaches)
}

fn splits_words(tokenizer: &Tokenizer) -> bool {
    let Some(PreTokenizerWrapper::Sequence(steps)) = tokenizer.get_pre_tokenizer() else {
        return false;
    };
    let [
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(_),
    ] = steps.as_ref()
    else {
        return false;
    };
    let pattern = SplitPattern::Regex(WORDS.to_owned());
    let words = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
    words.is_ok_and(|words| *split == words)
}

/// Bytes that all of several texts begin with, up to the last place where they may be cut.
pub fn shared(texts: &[String]) -> usize {
    let Some((first, others @ [_, ..])) = texts.split_first() else {
        return 0;
    };
    let common = |other: &String| {
        let pairs = first.bytes().zip(other.bytes());
        pairs.take_while(|(a, b)| a == b).count()
    };
    let common = others.iter().map(common).min().unwrap_or(0);
    let mut pairs = first.as_bytes()[..common].windows(2);
    let place = pairs.rposition(|pair| pair[0].is_ascii_alphabetic() && pair[1] == b' ');
    place.map_or(0, |letter| letter + 1)
}
