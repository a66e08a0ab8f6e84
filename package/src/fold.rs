use std::borrow::Cow;

use crate::block_mask::BlockMask;
use crate::builder::FoldBuilder;
use crate::error::FoldError;
use crate::ids::TokenIds;
use crate::path_mask::PathMask;
use crate::scatter::Scatter;

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
    pub(crate) layout: LayoutData,
    pub(crate) num_nodes: usize,
    pub(crate) cu_seq_lengths: Vec<u32>,
    pub(crate) input_ids: Vec<u32>,
    pub(crate) position_ids: Vec<u32>,
    pub(crate) scatter: Scatter,
    pub(crate) fold_gather: Vec<u32>,
}

/// What only one layout has.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum LayoutData {
    FirstOccurrence {
        query_lengths: Vec<u32>,
    },
    DepthFirst {
        subtree_end: Vec<u32>,
        row_order: Vec<u32>,
    },
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
        let ids = TokenIds::U32(input_ids);
        FoldBuilder::new(ids, Some(position_ids), cu_seq_lengths)
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
        FoldBuilder::new(TokenIds::U32(input_ids), None, cu_seq_lengths)
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
    if let Some(rows) = pad_multiple_of {
        builder = builder.pad_multiple_of(rows);
    }
    match builder.build() {
        Ok(fold) => fold.into_arrays(),
        Err(error) => panic!("{error}"),
    }
}
