use crate::error::FoldError;

/// The tree-attention mask in blocks: for every query block, which key blocks it sees whole and
/// which in part. Key blocks that are listed nowhere are not seen.
///
/// Query block `b` is the rows `b * query_block..(b + 1) * query_block`, the last one cut at the
/// number of rows; key blocks likewise. A key block that is cut counts as seen in part, so that a
/// kernel may load the others whole. Within each query block, key blocks ascend. The form is that of
/// FlexAttention's `BlockMask`, as compressed sparse rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMask {
    query_block: usize,
    key_block: usize,
    full: Csr,
    partial: Csr,
}

/// Compressed sparse rows: row `r` lists `indices[offsets[r]..offsets[r + 1]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Csr {
    /// Where each row's list starts, and the end of the last, \[rows + 1\].
    pub offsets: Vec<usize>,
    /// The lists, one after another.
    pub indices: Vec<u32>,
}

impl Csr {
    /// No rows, with room for the offsets of `rows`.
    pub(crate) fn with_capacity(rows: usize) -> Self {
        let mut offsets = Vec::with_capacity(rows + 1);
        offsets.push(0);
        Self {
            offsets,
            indices: Vec::new(),
        }
    }

    pub(crate) fn end_row(&mut self) {
        self.offsets.push(self.indices.len());
    }

    /// The list of row `row`.
    ///
    /// # Panics
    ///
    /// Where there is no such row.
    pub fn row(&self, row: usize) -> &[u32] {
        &self.indices[self.offsets[row]..self.offsets[row + 1]]
    }
}

impl BlockMask {
    pub(crate) fn new(
        subtree_end: &[u32],
        query_block: usize,
        key_block: usize,
    ) -> Result<Self, FoldError> {
        if query_block == 0 || key_block == 0 {
            return Err(FoldError::ZeroBlockSize);
        }
        let rows = subtree_end.len();
        let num_blocks = rows.div_ceil(query_block);
        let mut full = Csr::with_capacity(num_blocks);
        let mut partial = Csr::with_capacity(num_blocks);
        let mut path = Path::new(key_block);
        let mut chains = chains(subtree_end).peekable();
        for start in (0..rows).step_by(query_block) {
            let end = rows.min(start + query_block);
            // Keys before this block are seen from within it only if its first row sees them:
            // their subtrees are intervals that start before it.
            while let Some(chain) = chains.next_if(|chain| chain.start <= start) {
                path.enter(chain);
            }
            let own = start / key_block..end.div_ceil(key_block);
            for seen in path.blocks.iter().take_while(|seen| seen.block < own.start) {
                let whole = seen.rows == key_block && seen.subtree_end >= end;
                let lists = if whole { &mut full } else { &mut partial };
                lists.indices.push(seen.block as u32);
            }
            for block in own {
                // Causality cuts the blocks of the query block's own rows, unless its first row is
                // their last.
                let whole = (block + 1) * key_block == start + 1 && path.covers(block, end);
                let lists = if whole { &mut full } else { &mut partial };
                lists.indices.push(block as u32);
            }
            full.end_row();
            partial.end_row();
        }
        Ok(Self {
            query_block,
            key_block,
            full,
            partial,
        })
    }

    /// Rows in a query block.
    pub fn query_block(&self) -> usize {
        self.query_block
    }

    /// Rows in a key block.
    pub fn key_block(&self) -> usize {
        self.key_block
    }

    /// Number of query blocks.
    pub fn num_blocks(&self) -> usize {
        self.full.offsets.len() - 1
    }

    /// For each query block, the key blocks all of whose rows all of its rows see.
    pub fn full(&self) -> &Csr {
        &self.full
    }

    /// For each query block, the key blocks of which it sees some pairs but not all.
    pub fn partial(&self) -> &Csr {
        &self.partial
    }

    /// What [`full`](Self::full) and [`partial`](Self::partial) borrow.
    pub fn into_lists(self) -> [Csr; 2] {
        [self.full, self.partial]
    }
}

/// Rows `start..end` of which each is the only child of the one before: one `subtree_end` for all.
pub(crate) struct Chain {
    pub start: usize,
    pub end: usize,
    pub subtree_end: usize,
}

/// The chains of a depth-first layout: rows of equal `subtree_end` are neighbours.
pub(crate) fn chains(subtree_end: &[u32]) -> impl Iterator<Item = Chain> {
    let mut start = 0;
    subtree_end.chunk_by(|a, b| a == b).map(move |rows| {
        let chain = Chain {
            start,
            end: start + rows.len(),
            subtree_end: rows[0] as usize,
        };
        start = chain.end;
        chain
    })
}

/// The chains from the root to a row, and the key blocks that they cover.
struct Path {
    block_size: usize,
    chains: Vec<Chain>,
    blocks: Vec<PathBlock>,
}

/// A key block with rows on the path.
struct PathBlock {
    block: usize,
    /// How many of its rows are on the path.
    rows: usize,
    /// Where the subtree of the last that entered ends; those above end there or later.
    subtree_end: usize,
}

impl Path {
    fn new(block_size: usize) -> Self {
        Self {
            block_size,
            chains: Vec::new(),
            blocks: Vec::new(),
        }
    }

    /// Whether the path holds all rows of key block `block`, and every row before `end` that follows
    /// them sees them.
    fn covers(&self, block: usize, end: usize) -> bool {
        let seen = self.blocks.iter().rfind(|seen| seen.block == block);
        seen.is_some_and(|seen| seen.rows == self.block_size && seen.subtree_end >= end)
    }

    /// Moves on to `chain`, the next in depth-first order.
    fn enter(&mut self, chain: Chain) {
        while self
            .chains
            .last()
            .is_some_and(|last| last.subtree_end <= chain.start)
        {
            self.leave();
        }
        let mut row = chain.start;
        while row < chain.end {
            let block = row / self.block_size;
            let end = chain.end.min((block + 1) * self.block_size);
            match self.blocks.last_mut().filter(|last| last.block == block) {
                Some(last) => {
                    last.rows += end - row;
                    last.subtree_end = chain.subtree_end;
                }
                None => self.blocks.push(PathBlock {
                    block,
                    rows: end - row,
                    subtree_end: chain.subtree_end,
                }),
            }
            row = end;
        }
        self.chains.push(chain);
    }

    /// Drops the deepest chain.
    fn leave(&mut self) {
        let Some(chain) = self.chains.pop() else {
            return;
        };
        let first = chain.start / self.block_size;
        while self.blocks.last().is_some_and(|last| last.block > first) {
            self.blocks.pop();
        }
        // Its first block may hold rows above it. With a row off the path the block is never seen
        // whole again, so its `subtree_end` has had its use.
        let Some(shared) = self.blocks.last_mut() else {
            return;
        };
        shared.rows -= chain.end.min((first + 1) * self.block_size) - chain.start;
        if shared.rows == 0 {
            self.blocks.pop();
        }
    }
}
