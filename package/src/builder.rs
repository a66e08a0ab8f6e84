//! Folds a batch: validates it, builds its trie, and lays out the rows.

use std::ops::Range;

use crate::error::FoldError;
use crate::fold::{Fold, Layout, LayoutData};
use crate::ids::{Id, TokenIds};
use crate::scatter::{Scatter, Span};
use crate::trie::{Batch, Trie};

/// Collects what [`Fold::builder`] is to fold; [`build`](Self::build) validates and folds it.
#[derive(Clone, Copy, Debug)]
#[must_use = "a builder folds nothing before `build`"]
pub struct FoldBuilder<'a> {
    input_ids: TokenIds<'a>,
    position_ids: Option<&'a [u32]>,
    cu_seq_lengths: &'a [u32],
    layout: Layout,
    pad_multiple_of: Option<usize>,
    salts: Option<&'a [u64]>,
}

impl<'a> FoldBuilder<'a> {
    /// As [`Fold::builder`], or [`Fold::counted`] where there are no positions, for ids of either
    /// type.
    ///
    /// ```
    /// use radix_mlp::{FoldBuilder, TokenIds};
    ///
    /// let ids = TokenIds::I64(&[7, 8, 1, 7, 8, 2]);
    /// let fold = FoldBuilder::new(ids, None, &[0, 3, 6]).build()?;
    /// assert_eq!(fold.input_ids(), [7, 8, 1, 2]);
    /// # Ok::<(), radix_mlp::FoldError>(())
    /// ```
    pub fn new(
        input_ids: TokenIds<'a>,
        position_ids: Option<&'a [u32]>,
        cu_seq_lengths: &'a [u32],
    ) -> Self {
        Self {
            input_ids,
            position_ids,
            cu_seq_lengths,
            layout: Layout::default(),
            pad_multiple_of: None,
            salts: None,
        }
    }

    /// The order of rows; [`Layout::FirstOccurrence`] unless set.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// Rounds the number of rows up to a multiple of `rows`. A padding row is token 0 at position
    /// 0, gathers token 0, and in depth-first layout is a subtree of its own.
    pub fn pad_multiple_of(mut self, rows: usize) -> Self {
        self.pad_multiple_of = Some(rows);
        self
    }

    /// One salt a sequence, \[sequences\]: sequences of different salts share nothing, as with
    /// another adapter or another image behind the same tokens.
    pub fn salts(mut self, salts: &'a [u64]) -> Self {
        self.salts = Some(salts);
        self
    }

    /// Folds the batch, in time linear in N.
    ///
    /// # Errors
    ///
    /// [`FoldError`] where the slices do not describe a batch. An empty batch and empty sequences
    /// are valid.
    pub fn build(self) -> Result<Fold, FoldError> {
        match self.input_ids {
            TokenIds::U32(ids) => self.fold(ids),
            TokenIds::I64(ids) => self.fold(ids),
        }
    }

    fn fold<I: Id>(&self, input_ids: &'a [I]) -> Result<Fold, FoldError> {
        let batch = self.validate(input_ids)?;
        let out_of_range = || batch.out_of_range();
        let trie = Trie::new(batch).ok_or_else(out_of_range)?;
        let num_rows = padded(trie.num_nodes as usize, self.pad_multiple_of)?;
        let fold = match self.layout {
            Layout::FirstOccurrence => first_occurrence(batch, trie, num_rows),
            Layout::DepthFirst => depth_first(batch, trie, num_rows),
        };
        fold.ok_or_else(out_of_range)
    }

    fn validate<I>(&self, input_ids: &'a [I]) -> Result<Batch<'a, I>, FoldError> {
        let tokens = input_ids.len();
        if let Some(position_ids) = self.position_ids
            && position_ids.len() != tokens
        {
            return Err(FoldError::LengthMismatch {
                input_ids: tokens,
                position_ids: position_ids.len(),
            });
        }
        if u32::try_from(tokens).is_err() {
            return Err(FoldError::TooManyTokens { tokens });
        }
        // The published crate takes an empty batch without offsets, too.
        let offsets = match self.cu_seq_lengths {
            [] => &[0],
            offsets => offsets,
        };
        if offsets[0] != 0 {
            return Err(FoldError::OffsetsStart { first: offsets[0] });
        }
        if let Some(index) = (1..offsets.len()).find(|&i| offsets[i] < offsets[i - 1]) {
            return Err(FoldError::OffsetsDecrease {
                index,
                previous: offsets[index - 1],
                next: offsets[index],
            });
        }
        let last = offsets[offsets.len() - 1];
        if last as usize != tokens {
            return Err(FoldError::OffsetsEnd { last, tokens });
        }
        let sequences = offsets.len() - 1;
        match self.salts {
            Some(salts) if salts.len() != sequences => Err(FoldError::SaltsLength {
                salts: salts.len(),
                sequences,
            }),
            salts => Ok(Batch {
                input_ids,
                position_ids: self.position_ids,
                cu_seq_lengths: offsets,
                salts,
            }),
        }
    }
}

/// `num_nodes` rounded up to a multiple of `pad_multiple_of`.
fn padded(num_nodes: usize, pad_multiple_of: Option<usize>) -> Result<usize, FoldError> {
    let multiple = pad_multiple_of.unwrap_or(1);
    if multiple == 0 {
        return Err(FoldError::ZeroPadMultiple);
    }
    let rows = num_nodes.checked_next_multiple_of(multiple);
    match rows {
        Some(rows) if u32::try_from(rows).is_ok() => Ok(rows),
        _ => Err(FoldError::TooManyTokens {
            tokens: rows.unwrap_or(usize::MAX),
        }),
    }
}

fn first_occurrence<I: Id>(batch: Batch<'_, I>, trie: Trie, num_rows: usize) -> Option<Fold> {
    let ends = batch.cu_seq_lengths[1..].iter();
    let new_runs = ends.zip(&trie.query_lengths);
    let rows = Rows::gather(batch, new_runs.map(|(&end, &len)| end - len..end), num_rows)?;
    let scatter = scatter(trie.spans, |run| trie.runs[run].row);
    let layout = LayoutData::FirstOccurrence {
        query_lengths: trie.query_lengths,
    };
    Some(rows.into_fold(batch, trie.num_nodes, scatter, layout))
}

fn depth_first<I: Id>(batch: Batch<'_, I>, trie: Trie, num_rows: usize) -> Option<Fold> {
    let order = trie.depth_first();
    let runs = order.iter().map(|&(index, ..)| &trie.runs[index as usize]);
    let tokens = runs.map(|run| run.start..run.start + run.len);
    let rows = Rows::gather(batch, tokens, num_rows)?;

    let mut subtree_end = Vec::with_capacity(num_rows);
    let mut row_order = Vec::with_capacity(num_rows);
    let mut row_of_run = vec![0; trie.runs.len()];
    for (index, row, end) in order {
        let run = &trie.runs[index as usize];
        subtree_end.resize((row + run.len) as usize, end);
        row_order.extend(run.row..run.row + run.len);
        row_of_run[index as usize] = row;
    }
    // Each padding row is a subtree of its own. `padded` checked that `num_rows` fits in a u32.
    subtree_end.extend(trie.num_nodes + 1..=num_rows as u32);
    row_order.extend(trie.num_nodes..num_rows as u32);

    let layout = LayoutData::DepthFirst {
        subtree_end,
        row_order,
    };
    let scatter = scatter(trie.spans, |run| row_of_run[run]);
    Some(rows.into_fold(batch, trie.num_nodes, scatter, layout))
}

/// The row of every token, from that of the first token of each run and `Trie::spans`. In both layouts a stretch of
/// tokens keeps together, however its run was split since: what comes first behind a head is its
/// tail, the oldest child.
fn scatter(spans: Vec<(u32, u32)>, row_of_run: impl Fn(usize) -> u32) -> Scatter {
    let span = |(run, len)| Span {
        row: row_of_run(run as usize),
        len,
    };
    Scatter::new(spans.into_iter().map(span).collect())
}

/// The three arrays with one entry a row, padding included.
struct Rows {
    input_ids: Vec<u32>,
    position_ids: Vec<u32>,
    fold_gather: Vec<u32>,
}

impl Rows {
    /// Copies the token ranges `runs` in their order, then pads with zeros to `num_rows`.
    fn gather<I: Id>(
        batch: Batch<'_, I>,
        runs: impl Iterator<Item = Range<u32>>,
        num_rows: usize,
    ) -> Option<Self> {
        let mut rows = Self {
            input_ids: Vec::with_capacity(num_rows),
            position_ids: Vec::with_capacity(num_rows),
            fold_gather: Vec::with_capacity(num_rows),
        };
        for run in runs {
            let tokens = run.start as usize..run.end as usize;
            I::copy(&batch.input_ids[tokens.clone()], &mut rows.input_ids)?;
            batch.copy_positions(tokens, &mut rows.position_ids);
            rows.fold_gather.extend(run);
        }
        rows.input_ids.resize(num_rows, 0);
        rows.position_ids.resize(num_rows, 0);
        rows.fold_gather.resize(num_rows, 0);
        Some(rows)
    }

    fn into_fold<I>(
        self,
        batch: Batch<'_, I>,
        num_nodes: u32,
        scatter: Scatter,
        layout: LayoutData,
    ) -> Fold {
        Fold {
            layout,
            num_nodes: num_nodes as usize,
            cu_seq_lengths: batch.cu_seq_lengths.to_vec(),
            input_ids: self.input_ids,
            position_ids: self.position_ids,
            scatter,
            fold_gather: self.fold_gather,
        }
    }
}
