//! The path-compressed prefix trie of a batch, built in one pass over its tokens.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{Hash, Hasher};
use std::ops::Range;

use crate::error::FoldError;
use crate::hash::MultiplyAddShift;
use crate::ids::Id;
use crate::prefix::common_prefix;

/// Marks the end of a sibling list.
const NONE: u32 = u32::MAX;

/// A node with more children than this finds them by hash instead of by scanning its list.
const WIDE: u32 = 8;

/// A validated batch: all slices of N entries, offsets from 0 to N. Whether its ids are in range is seen
/// where they become keys and rows: all others are equal to those.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a, I> {
    pub(crate) input_ids: &'a [I],
    /// Without them, tokens count from 0 in each sequence: on equal paths they are equal.
    pub(crate) position_ids: Option<&'a [u32]>,
    pub(crate) cu_seq_lengths: &'a [u32],
    /// Sequences share only with sequences of the same salt.
    pub(crate) salts: Option<&'a [u64]>,
}

impl<I: Id> Batch<'_, I> {
    /// Token `index` as the one word in which siblings differ.
    fn key(&self, index: usize) -> Option<u64> {
        let position = self.position_ids.map_or(0, |positions| positions[index]);
        let id: u32 = self.input_ids[index].try_into().ok()?;
        Some(u64::from(id) << 32 | u64::from(position))
    }

    /// The error for the first id that is out of range, of a batch that has one.
    #[cold]
    pub(crate) fn out_of_range(&self) -> FoldError {
        let ids = self.input_ids.iter();
        let index = ids.take_while(|&&id| id.try_into().is_ok()).count();
        FoldError::TokenId {
            index,
            value: self.input_ids[index].into(),
        }
    }

    /// How many tokens from `a` on equal those from `b` on, at most `limit`.
    fn shared(&self, a: usize, b: usize, limit: usize) -> usize {
        let ids = common_prefix(&self.input_ids[a..a + limit], &self.input_ids[b..b + limit]);
        self.position_ids.map_or(ids, |positions| {
            common_prefix(&positions[a..a + ids], &positions[b..b + ids])
        })
    }

    /// Appends the positions of `tokens`, which are of one sequence, to `to`.
    pub(crate) fn copy_positions(&self, tokens: Range<usize>, to: &mut Vec<u32>) {
        match self.position_ids {
            Some(positions) => to.extend_from_slice(&positions[tokens]),
            None => {
                let starts = self.cu_seq_lengths;
                let next = starts.partition_point(|&start| start as usize <= tokens.start);
                let first = starts[next - 1];
                to.extend(tokens.start as u32 - first..tokens.end as u32 - first);
            }
        }
    }
}

/// A run of trie nodes without a branch: consecutive in the batch and in first-occurrence rows.
pub(crate) struct Run {
    /// Index of the first token's first occurrence in the batch.
    pub(crate) start: u32,
    /// First-occurrence row of the first token.
    pub(crate) row: u32,
    pub(crate) len: u32,
    /// Head of the list of children, newest first.
    first_child: u32,
    next_sibling: u32,
    num_children: u32,
    /// Names this run's children in `Trie::wide`, once there are more than `WIDE`. Not the run's
    /// own index, which changes hands when the run is split.
    wide: u32,
    /// The first token, `Batch::key`.
    key: u64,
}

impl Run {
    /// An empty run, above the first tokens of all sequences of one salt.
    fn root() -> Self {
        Self {
            start: 0,
            row: 0,
            len: 0,
            first_child: NONE,
            next_sibling: NONE,
            num_children: 0,
            wide: NONE,
            key: 0,
        }
    }
}

/// A child of a wide run: `Run::wide` of that run, and the halves of its own `Run::key`. Of 32-bit words, so that an entry
/// of the table has 16 bytes and lies in one cache line.
#[derive(PartialEq, Eq)]
struct Child {
    wide: u32,
    key: [u32; 2],
}

impl Child {
    fn new(wide: u32, key: u64) -> Self {
        Self {
            wide,
            key: [(key >> 32) as u32, key as u32],
        }
    }
}

impl Hash for Child {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let [high, low] = self.key.map(u64::from);
        state.write_u32(self.wide);
        state.write_u64(high << 32 | low);
    }
}

/// The trie, and what falls out of building it.
pub(crate) struct Trie {
    pub(crate) runs: Vec<Run>,
    /// One root for each distinct salt, in order of appearance.
    roots: Vec<u32>,
    /// Children of wide runs.
    wide: HashMap<Child, u32, MultiplyAddShift>,
    num_wide: u32,
    /// Number of unique tokens, N'.
    pub(crate) num_nodes: u32,
    /// All tokens in stretches: the run whose first row is the first token's, and how many.
    pub(crate) spans: Vec<(u32, u32)>,
    /// How many tokens each sequence brought first, all at its end, [sequences].
    pub(crate) query_lengths: Vec<u32>,
}

impl Trie {
    pub(crate) fn new<I: Id>(batch: Batch<'_, I>) -> Option<Self> {
        let sequences = batch.cu_seq_lengths.len() - 1;
        let mut trie = Self {
            // A sequence with tokens adds at most a leaf and the tail of a split run.
            runs: Vec::with_capacity(2 * sequences.min(batch.input_ids.len()) + 1),
            roots: Vec::new(),
            wide: HashMap::with_hasher(MultiplyAddShift::new()),
            num_wide: 0,
            num_nodes: 0,
            spans: Vec::with_capacity(2 * sequences),
            query_lengths: Vec::with_capacity(sequences),
        };
        let mut root_of_salt = HashMap::new();
        for (index, ends) in batch.cu_seq_lengths.windows(2).enumerate() {
            let root = match batch.salts {
                None if index == 0 => trie.add_root(),
                None => trie.roots[0],
                Some(salts) => *root_of_salt
                    .entry(salts[index])
                    .or_insert_with(|| trie.add_root()),
            };
            let query_length = trie.insert(batch, root, ends[0] as usize, ends[1] as usize)?;
            trie.query_lengths.push(query_length);
        }
        Some(trie)
    }

    /// Inserts the sequence `start..end` and returns how many tokens were new.
    fn insert<I: Id>(
        &mut self,
        batch: Batch<'_, I>,
        root: u32,
        start: usize,
        end: usize,
    ) -> Option<u32> {
        let mut parent = root;
        let mut at = start;
        while at < end {
            let key = batch.key(at)?;
            let Some(child) = self.child(parent, key) else {
                let new = (end - at) as u32;
                self.add_leaf(parent, key, at as u32, new);
                return Some(new);
            };
            let run = &self.runs[child as usize];
            let len = run.len;
            let limit = (end - at).min(len as usize);
            // At most `len`, so the cast is exact.
            let shared = batch.shared(run.start as usize, at, limit) as u32;
            self.spans.push((child, shared));
            at += shared as usize;
            if at < end && shared < len {
                self.split(batch, child, shared)?;
            }
            parent = child;
        }
        Some(0)
    }

    fn add_root(&mut self) -> u32 {
        let index = self.runs.len() as u32;
        self.runs.push(Run::root());
        self.roots.push(index);
        index
    }

    /// The child of `parent` that starts with `key`. A wide parent without one takes note that the
    /// next run will be it.
    fn child(&mut self, parent: u32, key: u64) -> Option<u32> {
        let run = &self.runs[parent as usize];
        if run.wide == NONE {
            let mut children = self.children(run);
            return children.find(|&child| self.runs[child as usize].key == key);
        }
        match self.wide.entry(Child::new(run.wide, key)) {
            Entry::Occupied(child) => Some(*child.get()),
            Entry::Vacant(place) => {
                place.insert(self.runs.len() as u32);
                None
            }
        }
    }

    /// Adds the `len` tokens from `start` on as a new child of `parent`, which [`Self::child`] did
    /// not find.
    fn add_leaf(&mut self, parent: u32, key: u64, start: u32, len: u32) {
        let index = self.runs.len() as u32;
        let row = self.num_nodes;
        self.num_nodes += len;
        self.spans.push((index, len));
        let above = &mut self.runs[parent as usize];
        let next_sibling = std::mem::replace(&mut above.first_child, index);
        above.num_children += 1;
        let crowded = above.num_children > WIDE && above.wide == NONE;
        self.runs.push(Run {
            start,
            row,
            len,
            next_sibling,
            key,
            ..Run::root()
        });
        if crowded {
            self.widen(parent);
        }
    }

    /// Children of `run`, newest first.
    fn children(&self, run: &Run) -> impl Iterator<Item = u32> {
        let link = |index: u32| (index != NONE).then_some(index);
        std::iter::successors(link(run.first_child), move |&child| {
            link(self.runs[child as usize].next_sibling)
        })
    }

    /// Enters the children of `parent` in the hash table.
    fn widen(&mut self, parent: u32) {
        let wide = self.num_wide;
        self.num_wide += 1;
        if wide == 0 {
            // Every sequence may bring one child: growing in steps would hash them all again.
            self.wide.reserve(self.query_lengths.capacity());
        }
        self.runs[parent as usize].wide = wide;
        let mut child = self.runs[parent as usize].first_child;
        while child != NONE {
            let run = &self.runs[child as usize];
            self.wide.insert(Child::new(wide, run.key), child);
            child = run.next_sibling;
        }
    }

    /// Cuts `run` after `len` tokens; the rest becomes its only child and takes its children.
    fn split<I: Id>(&mut self, batch: Batch<'_, I>, run: u32, len: u32) -> Option<()> {
        let index = self.runs.len() as u32;
        let head = &mut self.runs[run as usize];
        let start = head.start + len;
        let tail = Run {
            start,
            row: head.row + len,
            len: head.len - len,
            first_child: head.first_child,
            next_sibling: NONE,
            num_children: head.num_children,
            wide: head.wide,
            key: batch.key(start as usize)?,
        };
        head.len = len;
        head.first_child = index;
        head.num_children = 1;
        head.wide = NONE;
        self.runs.push(tail);
        Some(())
    }

    /// The indices of all runs with their subtrees contiguous, siblings in order of appearance, each
    /// with the row at which it starts and the row at which its subtree ends.
    pub(crate) fn depth_first(&self) -> Vec<(u32, u32, u32)> {
        let mut order = Vec::with_capacity(self.runs.len());
        // Runs still to visit, and visited runs (by their place in `order`) whose subtree is open.
        let mut stack: Vec<Visit> = self.roots.iter().rev().map(|&r| Visit::Enter(r)).collect();
        let mut row = 0;
        while let Some(visit) = stack.pop() {
            match visit {
                Visit::Enter(index) => {
                    let run = &self.runs[index as usize];
                    stack.push(Visit::Leave(order.len()));
                    order.push((index, row, row));
                    row += run.len;
                    // Newest first on the stack's bottom: the oldest is popped first.
                    stack.extend(self.children(run).map(Visit::Enter));
                }
                Visit::Leave(place) => order[place].2 = row,
            }
        }
        order
    }
}

enum Visit {
    Enter(u32),
    Leave(usize),
}
