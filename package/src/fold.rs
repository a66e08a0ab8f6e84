use std::borrow::Cow;
use std::ops::Range;

use crate::block_mask::BlockMask;
use crate::error::FoldError;
use crate::path_mask::PathMask;
use crate::scatter::{Scatter, Span};
use crate::trie::{Batch, Trie};

/// In which order the rows of compact space stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Nodes in the order in which the batch first shows them: each sequence's new tokens are one
    /// contiguous run, always the end of that sequence. What query-folded attention reads.
    #[default]
    FirstOccurrence,
    /// Every subtree contiguous, siblings in order of appearance: the attention mask of the whole
    /// trie is one interval test. What tree attention reads.
    DepthFirst,
}

/// A batch folded onto its prefix trie: the maps between *original space* (the N tokens as packed
/// by the caller) and *compact space* (one row for each of the N' trie nodes, then padding).
///
/// Two tokens share a row if and only if the whole paths of (token id, position id) pairs from the
/// start of their sequences to them, and their sequences' salts, are equal.
///
/// ```
/// use radix_mlp::Fold;
///
/// // Two sequences, [7, 8, 1] and [7, 8, 2].
/// let fold = Fold::builder(&[7, 8, 1, 7, 8, 2], &[0, 1, 2, 0, 1, 2], &[0, 3, 6]).build()?;
/// assert_eq!(fold.input_ids(), [7, 8, 1, 2]);
/// assert_eq!(fold.scatter_indices(), [0, 1, 2, 0, 1, 3]);
/// assert_eq!(fold.compression(), 1.5);
/// # Ok::<(), radix_mlp::FoldError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Fold {
    layout: LayoutData,
    num_nodes: usize,
    cu_seq_lengths: Vec<u32>,
    input_ids: Vec<u32>,
    position_ids: Vec<u32>,
    scatter: Scatter,
    fold_gather: Vec<u32>,
}

/// What only one layout has.
#[derive(Clone, Debug, PartialEq)]
enum LayoutData {
    FirstOccurrence {
        query_lengths: Vec<u32>,
    },
    DepthFirst {
        subtree_end: Vec<u32>,
        row_order: Vec<u32>,
    },
}

/// Collects what [`Fold::builder`] is to fold; [`build`](Self::build) validates and folds it.
#[derive(Clone, Copy, Debug)]
#[must_use = "a builder folds nothing before `build`"]
pub struct FoldBuilder<'a> {
    input_ids: &'a [u32],
    position_ids: Option<&'a [u32]>,
    cu_seq_lengths: &'a [u32],
    layout: Layout,
    pad_multiple_of: Option<usize>,
    salts: Option<&'a [u64]>,
}

impl<'a> FoldBuilder<'a> {
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
        let batch = self.validate()?;
        let trie = Trie::new(batch);
        let num_rows = padded(trie.num_nodes as usize, self.pad_multiple_of)?;
        Ok(match self.layout {
            Layout::FirstOccurrence => first_occurrence(batch, trie, num_rows),
            Layout::DepthFirst => depth_first(batch, trie, num_rows),
        })
    }

    fn validate(&self) -> Result<Batch<'a>, FoldError> {
        let tokens = self.input_ids.len();
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
                input_ids: self.input_ids,
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

fn first_occurrence(batch: Batch<'_>, trie: Trie, num_rows: usize) -> Fold {
    let ends = batch.cu_seq_lengths[1..].iter();
    let new_runs = ends.zip(&trie.query_lengths);
    let rows = Rows::gather(batch, new_runs.map(|(&end, &len)| end - len..end), num_rows);
    let scatter = scatter(trie.spans, |run| trie.runs[run].row);
    let layout = LayoutData::FirstOccurrence {
        query_lengths: trie.query_lengths,
    };
    rows.into_fold(batch, trie.num_nodes, scatter, layout)
}

fn depth_first(batch: Batch<'_>, trie: Trie, num_rows: usize) -> Fold {
    let order = trie.depth_first();
    let runs = order.iter().map(|&(index, ..)| &trie.runs[index as usize]);
    let tokens = runs.map(|run| run.start..run.start + run.len);
    let rows = Rows::gather(batch, tokens, num_rows);

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
    rows.into_fold(batch, trie.num_nodes, scatter, layout)
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
    fn gather(batch: Batch<'_>, runs: impl Iterator<Item = Range<u32>>, num_rows: usize) -> Self {
        let mut rows = Self {
            input_ids: Vec::with_capacity(num_rows),
            position_ids: Vec::with_capacity(num_rows),
            fold_gather: Vec::with_capacity(num_rows),
        };
        for run in runs {
            let tokens = run.start as usize..run.end as usize;
            rows.input_ids
                .extend_from_slice(&batch.input_ids[tokens.clone()]);
            batch.copy_positions(tokens, &mut rows.position_ids);
            rows.fold_gather.extend(run);
        }
        rows.input_ids.resize(num_rows, 0);
        rows.position_ids.resize(num_rows, 0);
        rows.fold_gather.resize(num_rows, 0);
        rows
    }

    fn into_fold(
        self,
        batch: Batch<'_>,
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

impl Fold {
    /// Starts to fold a batch: `input_ids` \[N\], `position_ids` \[N\] and `cu_seq_lengths`
    /// \[sequences + 1\], where sequence `s` is the tokens
    /// `cu_seq_lengths[s]..cu_seq_lengths[s + 1]`.
    pub fn builder<'a>(
        input_ids: &'a [u32],
        position_ids: &'a [u32],
        cu_seq_lengths: &'a [u32],
    ) -> FoldBuilder<'a> {
        FoldBuilder {
            position_ids: Some(position_ids),
            ..Self::counted(input_ids, cu_seq_lengths)
        }
    }

    /// As [`builder`](Self::builder), where each sequence's tokens are at positions 0, 1, 2 and so
    /// on: faster, for there are none to read.
    ///
    /// ```
    /// use radix_mlp::Fold;
    ///
    /// let fold = Fold::counted(&[7, 8, 1, 7, 8, 2], &[0, 3, 6]).build()?;
    /// assert_eq!(fold.position_ids(), [0, 1, 2, 2]);
    /// # Ok::<(), radix_mlp::FoldError>(())
    /// ```
    pub fn counted<'a>(input_ids: &'a [u32], cu_seq_lengths: &'a [u32]) -> FoldBuilder<'a> {
        FoldBuilder {
            input_ids,
            position_ids: None,
            cu_seq_lengths,
            layout: Layout::default(),
            pad_multiple_of: None,
            salts: None,
        }
    }

    /// The order of the rows.
    pub fn layout(&self) -> Layout {
        match self.layout {
            LayoutData::FirstOccurrence { .. } => Layout::FirstOccurrence,
            LayoutData::DepthFirst { .. } => Layout::DepthFirst,
        }
    }

    /// Number of tokens in the batch, N.
    pub fn num_tokens(&self) -> usize {
        self.cu_seq_lengths.last().map_or(0, |&end| end as usize)
    }

    /// Number of sequences in the batch.
    pub fn num_sequences(&self) -> usize {
        self.cu_seq_lengths.len() - 1
    }

    /// Number of unique tokens, N', without padding.
    pub fn num_nodes(&self) -> usize {
        self.num_nodes
    }

    /// Number of rows in compact space: N' and padding.
    pub fn num_rows(&self) -> usize {
        self.input_ids.len()
    }

    /// Where the sequences start and end in original space, \[sequences + 1\].
    pub fn cu_seq_lengths(&self) -> &[u32] {
        &self.cu_seq_lengths
    }

    /// Token id of each row, \[rows\].
    pub fn input_ids(&self) -> &[u32] {
        &self.input_ids
    }

    /// Position id of each row, \[rows\].
    pub fn position_ids(&self) -> &[u32] {
        &self.position_ids
    }

    /// Row of each token, \[N\]: `original[i] = compact[scatter_indices[i]]`. Written out at the
    /// first call.
    pub fn scatter_indices(&self) -> &[u32] {
        self.scatter.rows()
    }

    /// First occurrence of each row's token, \[rows\]: `compact[j] = original[fold_gather[j]]`.
    pub fn fold_gather(&self) -> &[u32] {
        &self.fold_gather
    }

    /// First-occurrence layout: how many new rows each sequence brings, \[sequences\]. They are the
    /// sequence's last tokens, and stand in compact space in the order of the sequences.
    pub fn query_lengths(&self) -> Option<&[u32]> {
        match &self.layout {
            LayoutData::FirstOccurrence { query_lengths } => Some(query_lengths),
            LayoutData::DepthFirst { .. } => None,
        }
    }

    /// Depth-first layout: row `j` and its descendants are exactly the rows `j..subtree_end[j]`,
    /// \[rows\]. Row `q` attends to row `kv` if and only if `kv <= q && q < subtree_end[kv]`.
    pub fn subtree_end(&self) -> Option<&[u32]> {
        match &self.layout {
            LayoutData::DepthFirst { subtree_end, .. } => Some(subtree_end),
            LayoutData::FirstOccurrence { .. } => None,
        }
    }

    /// Depth-first layout: row `j` is row `row_order[j]` of the first-occurrence layout, \[rows\].
    pub fn row_order(&self) -> Option<&[u32]> {
        match &self.layout {
            LayoutData::DepthFirst { row_order, .. } => Some(row_order),
            LayoutData::FirstOccurrence { .. } => None,
        }
    }

    /// N / N', how many tokens each computed row serves on average; 1 for an empty batch.
    pub fn compression(&self) -> f64 {
        match self.num_nodes {
            0 => 1.0,
            nodes => self.num_tokens() as f64 / nodes as f64,
        }
    }

    /// N' / N, the share of the work that is left; 1 for an empty batch.
    pub fn gamma(&self) -> f64 {
        self.compression().recip()
    }

    /// Block lists of the tree-attention mask, for blocks of `query_block` by `key_block` rows. Time
    /// and memory follow the rows and the listed blocks, not the square of the rows.
    ///
    /// # Errors
    ///
    /// [`FoldError::NeedsDepthFirst`] in first-occurrence layout, [`FoldError::ZeroBlockSize`].
    pub fn block_mask(&self, query_block: usize, key_block: usize) -> Result<BlockMask, FoldError> {
        let subtree_end = self.subtree_end().ok_or(FoldError::NeedsDepthFirst)?;
        BlockMask::new(subtree_end, query_block, key_block)
    }

    /// The mask of tree attention in blocks of paths, from a fold in depth-first layout: query blocks of `query_block`
    /// rows, key blocks of `key_block` keys, and of a window of so many rows where there is one. Padding rows are one path.
    ///
    /// # Errors
    ///
    /// [`FoldError::NeedsDepthFirst`] in first-occurrence layout, [`FoldError::ZeroBlockSize`], for a window as well.
    pub fn path_mask(
        &self,
        query_block: usize,
        key_block: usize,
        window: Option<u32>,
    ) -> Result<PathMask, FoldError> {
        let subtree_end = self.subtree_end().ok_or(FoldError::NeedsDepthFirst)?;
        let mut subtree_end = Cow::Borrowed(subtree_end);
        if self.num_rows() > self.num_nodes() {
            subtree_end.to_mut()[self.num_nodes()..].fill(self.num_rows() as u32);
        }
        PathMask::new(&subtree_end, query_block, key_block, window)
    }

    /// Takes values from original to compact space: \[N, width\] to \[rows, width\], where padding
    /// rows copy token 0.
    ///
    /// # Errors
    ///
    /// [`FoldError::RowsMismatch`] where `original` does not hold N × `width` elements.
    pub fn fold<T: Copy>(&self, original: &[T], width: usize) -> Result<Vec<T>, FoldError> {
        gather(original, self.num_tokens(), width, &self.fold_gather)
    }

    /// Takes values from compact to original space: \[rows, width\] to \[N, width\].
    ///
    /// # Errors
    ///
    /// [`FoldError::RowsMismatch`] where `compact` does not hold rows × `width` elements.
    pub fn unfold<T: Copy>(&self, compact: &[T], width: usize) -> Result<Vec<T>, FoldError> {
        gather(compact, self.num_rows(), width, self.scatter_indices())
    }

    /// The arrays themselves, in the order of [`compute_fold_and_scatter`]: `(input_ids,
    /// position_ids, scatter_indices, fold_gather)`.
    pub fn into_arrays(self) -> (Vec<u32>, Vec<u32>, Vec<u32>, Vec<u32>) {
        (
            self.input_ids,
            self.position_ids,
            self.scatter.into_rows(),
            self.fold_gather,
        )
    }

    /// A picture of the trie in text, one line a run: how many sequences share it, how many tokens
    /// it has, what `label` makes of their ids, and which sequences end with it.
    pub fn draw(&self, label: impl FnMut(&[u32]) -> String) -> String {
        crate::draw::draw(self, label)
    }
}

/// Rows `indices` of `from`, which holds `rows` rows of `width` elements.
fn gather<T: Copy>(
    from: &[T],
    rows: usize,
    width: usize,
    indices: &[u32],
) -> Result<Vec<T>, FoldError> {
    if rows.checked_mul(width) != Some(from.len()) {
        return Err(FoldError::RowsMismatch {
            len: from.len(),
            rows,
            width,
        });
    }
    let mut gathered = Vec::with_capacity(indices.len() * width);
    for &row in indices {
        gathered.extend_from_slice(&from[row as usize * width..][..width]);
    }
    Ok(gathered)
}

/// Folds a batch in first-occurrence layout, in the form of the published crate `radix_mlp` 0.0.x:
/// returns `(compact_input_ids, compact_position_ids, scatter_indices, fold_gather)`.
///
/// `input_ids` and `position_ids` are \[N\], `cu_seq_lengths` \[sequences + 1\]. Compact arrays are
/// \[rows\], N' rounded up to `pad_multiple_of`; padding rows are token 0, position 0, gather 0.
/// `scatter_indices` is \[N\]. [`Fold`] gives the same with names, and more.
///
/// # Panics
///
/// With the message of a [`FoldError`] where the slices do not describe a batch;
/// [`FoldBuilder::build`] returns the error instead.
pub fn compute_fold_and_scatter(
    input_ids: &[u32],
    position_ids: &[u32],
    cu_seq_lengths: &[u32],
    pad_multiple_of: Option<usize>,
) -> (Vec<u32>, Vec<u32>, Vec<u32>, Vec<u32>) {
    let mut builder = Fold::builder(input_ids, position_ids, cu_seq_lengths);
    builder.pad_multiple_of = pad_multiple_of;
    match builder.build() {
        Ok(fold) => fold.into_arrays(),
        Err(error) => panic!("{error}"),
    }
}
