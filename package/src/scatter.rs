//! The row of every token, written out when somebody first asks for it.

use std::sync::OnceLock;

/// Consecutive tokens of a sequence that have consecutive rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) row: u32,
    pub(crate) len: u32,
}

/// The rows of all tokens. A batch of long shared prefixes has few spans for its tokens, and a
/// forward pass may never want to know more.
#[derive(Clone, Debug)]
pub(crate) struct Scatter {
    spans: Vec<Span>,
    rows: OnceLock<Vec<u32>>,
}

impl Scatter {
    /// From the spans of all tokens, in their order.
    pub(crate) fn new(spans: Vec<Span>) -> Self {
        Self {
            spans,
            rows: OnceLock::new(),
        }
    }

    pub(crate) fn rows(&self) -> &[u32] {
        self.rows.get_or_init(|| self.write())
    }

    pub(crate) fn into_rows(mut self) -> Vec<u32> {
        self.rows.take().unwrap_or_else(|| self.write())
    }

    fn write(&self) -> Vec<u32> {
        let tokens = self.spans.iter().map(|span| span.len as usize).sum();
        let mut rows = Vec::with_capacity(tokens);
        for span in &self.spans {
            rows.extend(span.row..span.row + span.len);
        }
        rows
    }
}

impl PartialEq for Scatter {
    fn eq(&self, other: &Self) -> bool {
        self.rows() == other.rows()
    }
}
