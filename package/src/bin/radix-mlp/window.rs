//! Reads ahead as far as memory allows, to find what shares prefixes.

use anyhow::Context;
use radix_mlp::text::TextError;

use super::input::{Content, Records};

/// How far to read ahead, in batches and in bytes a token: it bounds the memory for texts and tokens.
const WINDOW_BATCHES: usize = 16;
const BYTES_PER_TOKEN: usize = 4;

/// Records read ahead, as texts.
#[derive(Default)]
pub struct Window {
    pub entries: Vec<Entry>,
    pub texts: Vec<String>,
}

/// What became of a record.
pub struct Entry {
    line: usize,
    /// Number of its texts, which follow those of the record before it.
    pub texts: usize,
    /// Whether they are the passages of a query.
    pub pairs: bool,
}

impl Window {
    /// The tokens of every text, or the first error with the line of its text.
    pub fn sequences(
        &self,
        encoded: Vec<Result<Vec<u32>, TextError>>,
    ) -> anyhow::Result<Vec<Vec<u32>>> {
        let lines = self.entries.iter();
        let lines = lines.flat_map(|entry| std::iter::repeat_n(entry.line, entry.texts));
        let numbered = encoded.into_iter().zip(lines);
        numbered
            .map(|(tokens, line)| tokens.with_context(|| format!("line {line}")))
            .collect()
    }
}

/// Turns records into texts, and hands them to `flush` a window at a time, in order.
pub fn for_each_window(
    records: &mut Records,
    batch_tokens: usize,
    texts_of: impl Fn(Content) -> anyhow::Result<Vec<String>>,
    mut flush: impl FnMut(&Records, &Window) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let tokens = batch_tokens.saturating_mul(WINDOW_BATCHES);
    let limit = tokens.saturating_mul(BYTES_PER_TOKEN);
    let mut window = Window::default();
    let mut bytes = 0;
    while let Some(record) = records.next().transpose()? {
        let line = record.line;
        let pairs = matches!(record.content, Content::Pairs { .. });
        let texts = texts_of(record.content).with_context(|| format!("line {line}"))?;
        // A text of no bytes still takes memory.
        bytes += texts
            .iter()
            .map(|text| text.len() + BYTES_PER_TOKEN)
            .sum::<usize>();
        window.entries.push(Entry {
            line,
            texts: texts.len(),
            pairs,
        });
        window.texts.extend(texts);
        if bytes >= limit {
            flush(records, &window)?;
            window = Window::default();
            bytes = 0;
        }
    }
    flush(records, &window)
}
