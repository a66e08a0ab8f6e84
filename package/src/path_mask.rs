use std::cmp::Reverse;
use std::ops::Range;

use crate::block_mask::{Chain, Csr, chains};
use crate::error::FoldError;

/// The tree-attention mask in blocks of paths: each row's keys are cut where its own path, counted from the root, comes to a
/// multiple of the block size, wherever in the batch the rows lie. Sums over these blocks are those of the sequence alone.
///
/// A key block is four numbers, `[first, end, depth, above]`. It has `key_block` keys, of a path that first comes to
/// `first`, a row with `depth` rows above it, and goes on to the rows that follow. Before it come the `depth % key_block`
/// rows above that belong to the block, which [`above`](Self::above) lists from index `above` on. Rows `first..end` have
/// the block on their path, and see its keys up to themselves: of a block that its path does not fill, those are all that
/// it has.
///
/// Query block `b` is the rows `b * query_block..(b + 1) * query_block`, the last one cut at the number of rows. Every path
/// block of one of its rows is listed, the deepest first: first those in [`partial`](Self::partial), of which some row
/// does not see some key, then those in [`full`](Self::full). With a window of `w` rows, the query's own included, blocks
/// that lie beyond the window of all rows of the query block are not listed; what is listed as full is without regard to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathMask {
    depth: Vec<u32>,
    blocks: Vec<[u32; 4]>,
    above: Vec<u32>,
    partial: Csr,
    full: Csr,
}

impl PathMask {
    pub(crate) fn new(
        subtree_end: &[u32],
        query_block: usize,
        key_block: usize,
        window: Option<u32>,
    ) -> Result<Self, FoldError> {
        if query_block == 0 || key_block == 0 || window == Some(0) {
            return Err(FoldError::ZeroBlockSize);
        }
        let rows = subtree_end.len();
        let mut cut = Cut::new(rows, key_block);
        for chain in chains(subtree_end) {
            cut.enter(chain);
        }
        let num_blocks = rows.div_ceil(query_block);
        let [mut partial, mut full] = [0; 2].map(|_| Csr::with_capacity(num_blocks));
        let mut seen = Seen::new(&cut, window);
        for start in (0..rows).step_by(query_block) {
            let queries = start..rows.min(start + query_block);
            for &block in seen.by(queries.clone()) {
                let whole = cut.is_whole(block, &queries);
                let lists = if whole { &mut full } else { &mut partial };
                lists.indices.push(block as u32);
            }
            partial.end_row();
            full.end_row();
        }
        Ok(Self {
            depth: cut.depth,
            blocks: cut.blocks,
            above: cut.above,
            partial,
            full,
        })
    }

    /// How many rows are above each, \[rows\].
    pub fn depth(&self) -> &[u32] {
        &self.depth
    }

    /// The key blocks.
    pub fn blocks(&self) -> &[[u32; 4]] {
        &self.blocks
    }

    /// Rows above those at which blocks' paths leave the order of rows.
    pub fn above(&self) -> &[u32] {
        &self.above
    }

    /// For each query block, the key blocks of which some of its rows do not see some keys.
    pub fn partial(&self) -> &Csr {
        &self.partial
    }

    /// For each query block, the key blocks all of whose keys all of its rows see, but for the window.
    pub fn full(&self) -> &Csr {
        &self.full
    }

    /// What the methods borrow: `depth`, `blocks`, `above`, and the lists `partial` and `full`.
    pub fn into_parts(self) -> (Vec<u32>, Vec<[u32; 4]>, Vec<u32>, [Csr; 2]) {
        (
            self.depth,
            self.blocks,
            self.above,
            [self.partial, self.full],
        )
    }
}

/// The paths of a trie, cut into blocks.
struct Cut {
    key_block: usize,
    depth: Vec<u32>,
    blocks: Vec<[u32; 4]>,
    above: Vec<u32>,
    places: Vec<Place>,
    path: Vec<Entered>,
}

/// Where a block is on its path.
struct Place {
    /// How many blocks are before it, and the next of them.
    level: usize,
    before: Option<usize>,
    /// The row of its last key, if the path goes on so far.
    last: usize,
}

/// A chain on the path, the depth of the row after it, and the block of its last row.
struct Entered {
    chain: Chain,
    end_depth: usize,
    last_block: usize,
}

impl Cut {
    fn new(rows: usize, key_block: usize) -> Self {
        Self {
            key_block,
            depth: Vec::with_capacity(rows),
            blocks: Vec::new(),
            above: Vec::new(),
            places: Vec::new(),
            path: Vec::new(),
        }
    }

    /// Moves on to `chain`, the next in depth-first order.
    fn enter(&mut self, chain: Chain) {
        let ended = |last: &mut Entered| last.chain.subtree_end <= chain.start;
        while self.path.pop_if(ended).is_some() {}
        let parent = self.path.last();
        let depth = parent.map_or(0, |parent| parent.end_depth);
        let is_next = parent.is_some_and(|parent| parent.chain.end == chain.start);
        let mut last = parent.map(|parent| parent.last_block);
        let end_depth = depth + chain.end - chain.start;
        self.depth
            .extend((depth..end_depth).map(|depth| depth as u32));
        let mut at = depth;
        while at < end_depth {
            let block = match last {
                Some(last) if is_next && !at.is_multiple_of(self.key_block) => last,
                _ => self.begin(chain.start + at - depth, at, last),
            };
            at += self.key_block - at % self.key_block;
            let end = if at <= end_depth {
                chain.subtree_end
            } else {
                chain.end
            };
            self.blocks[block][1] = end as u32;
            last = Some(block);
        }
        self.path.push(Entered {
            chain,
            end_depth,
            last_block: self.blocks.len() - 1,
        });
    }

    /// A block from row `first` on, at `depth`, where the path ends; `last` is the block of the row above.
    fn begin(&mut self, first: usize, depth: usize, last: Option<usize>) -> usize {
        let (shared, above) = (depth % self.key_block, self.above.len());
        self.places.push(Place {
            level: depth / self.key_block,
            before: match shared {
                0 => last,
                _ => last.and_then(|last| self.places[last].before),
            },
            last: first + self.key_block - 1 - shared,
        });
        self.blocks
            .push([first, first, depth, above].map(|number| number as u32));
        let upwards = self.path.iter().rev();
        let upwards = upwards.flat_map(|entered| (entered.chain.start..entered.chain.end).rev());
        self.above
            .extend(upwards.take(shared).map(|row| row as u32));
        self.above[above..].reverse();
        self.blocks.len() - 1
    }

    /// Whether all of `queries` see all keys of the block.
    fn is_whole(&self, block: usize, queries: &Range<usize>) -> bool {
        self.places[block].last <= queries.start && queries.end <= self.blocks[block][1] as usize
    }
}

/// Which blocks query blocks see, one query block after another.
struct Seen<'a> {
    cut: &'a Cut,
    window: Option<u32>,
    /// Of the next query block's first row.
    block: usize,
    /// The first row of the query block that saw each last.
    seen_at: Vec<usize>,
    listed: Vec<usize>,
}

impl<'a> Seen<'a> {
    fn new(cut: &'a Cut, window: Option<u32>) -> Self {
        Self {
            cut,
            window,
            block: 0,
            seen_at: vec![usize::MAX; cut.blocks.len()],
            listed: Vec::new(),
        }
    }

    /// Those of `queries`, the deepest first.
    fn by(&mut self, queries: Range<usize>) -> &[usize] {
        let Cut { blocks, places, .. } = self.cut;
        let starts_by = |block: usize, row: usize| {
            blocks
                .get(block)
                .is_some_and(|block| block[0] as usize <= row)
        };
        self.listed.clear();
        while starts_by(self.block + 1, queries.start) {
            self.block += 1;
        }
        for own in (self.block..).take_while(|&own| starts_by(own, queries.end - 1)) {
            let mut next = Some(own);
            while let Some(block) = next.filter(|&block| self.seen_at[block] != queries.start) {
                self.seen_at[block] = queries.start;
                self.listed.push(block);
                next = places[block].before;
            }
        }
        let level = |block: usize| places[block].level;
        if let Some(window) = self.window {
            let shallowest = self.cut.depth[queries].iter().min().copied().unwrap_or(0);
            let reach = (shallowest as usize).saturating_sub(window as usize - 1);
            self.listed
                .retain(|&block| (level(block) + 1) * self.cut.key_block > reach);
        }
        self.listed.sort_by_key(|&block| Reverse(level(block)));
        &self.listed
    }
}
