//! Causal attention of packed sequences, folded or not: an [`AttentionPlan`] says which rows
//! attend to which, [`attend`] does it.

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::FoldLevel;
use super::gemm::{Matrix, Store, matmul};
use super::simd;
use crate::Fold;

/// Rows of the tile of queries that one task multiplies with the keys: the heads of a group at
/// several positions. Fewer repack the keys too often, more compute too much above the diagonal.
const TILE_ROWS: usize = 192;
/// Keys whose scores a tile holds at a time: 192 × 512 f32 stay in the second-level cache.
const CHUNK_KEYS: usize = 512;

/// Which rows attend to which, the same in every layer and head.
pub(super) struct AttentionPlan {
    /// In the order of their queries, which cover `0..rows` without a gap.
    segments: Vec<Segment>,
    /// Number of rows, each of which is a query once.
    rows: usize,
}

/// Consecutive query rows, which see the whole prefix, and of each other the rows up to their own.
#[derive(Debug, PartialEq)]
struct Segment {
    queries: Range<usize>,
    /// Maximal ranges of consecutive rows.
    prefix: Vec<Range<usize>>,
}

impl AttentionPlan {
    /// `None` and `Mlp` attend over the original rows. `Full` attends over the nodes of the trie,
    /// each a query in the sequence that shows it first, and reads their keys where they stand.
    pub fn new(fold: &Fold, level: FoldLevel) -> Self {
        let sequences = fold.cu_seq_lengths().windows(2);
        let sequences = sequences.map(|ends| ends[0] as usize..ends[1] as usize);
        if level == FoldLevel::Full {
            let mut segments: Vec<_> = sequences.flat_map(|seq| new_rows(fold, seq)).collect();
            segments.sort_unstable_by_key(|segment| segment.queries.start);
            return Self {
                segments,
                rows: fold.num_nodes(),
            };
        }
        let segments = sequences.filter(|tokens| !tokens.is_empty());
        let segments = segments.map(|queries| Segment {
            queries,
            prefix: Vec::new(),
        });
        Self {
            segments: segments.collect(),
            rows: fold.num_tokens(),
        }
    }

    /// Number of (query, key) pairs, in each layer and head.
    pub fn pairs(&self) -> u64 {
        let pairs = |segment: &Segment| {
            let queries = segment.queries.len() as u64;
            let prefix: usize = segment.prefix.iter().map(Range::len).sum();
            queries * prefix as u64 + queries * (queries + 1) / 2
        };
        self.segments.iter().map(pairs).sum()
    }
}

/// The segments of the rows that the sequence of these tokens is the first to show. They are its
/// last rows, and consecutive in both layouts: in depth-first layout because the child that a
/// sequence adds is the first of its parent, unless the parent is older.
fn new_rows(fold: &Fold, tokens: Range<usize>) -> Vec<Segment> {
    let rows = &fold.scatter_indices()[tokens.clone()];
    let first_shown = rows
        .iter()
        .map(|&row| fold.fold_gather()[row as usize] as usize);
    let old = first_shown
        .zip(tokens)
        .take_while(|(first, token)| first < token);
    let (old, new) = rows.split_at(old.count());
    let mut prefix: Vec<_> = runs(old).collect();
    let segment = |queries: Range<usize>| {
        let segment = Segment {
            queries: queries.clone(),
            prefix: prefix.clone(),
        };
        prefix.push(queries);
        segment
    };
    runs(new).map(segment).collect()
}

/// Splits rows into maximal runs of consecutive ones.
fn runs(rows: &[u32]) -> impl Iterator<Item = Range<usize>> {
    let runs = rows.chunk_by(|row, next| row + 1 == *next);
    runs.map(|run| run[0] as usize..run[0] as usize + run.len())
}

/// The heads of queries, keys or values in rows of f32: head `h` of row `r` starts at
/// `r * row_stride + h * head_dim`.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a> {
    pub data: &'a [f32],
    pub heads: usize,
    pub head_dim: usize,
    pub row_stride: usize,
}

impl<'a> Heads<'a> {
    /// One head of consecutive rows, \[rows, head_dim\].
    fn head(&self, rows: &Range<usize>, head: usize) -> Matrix<'a> {
        let start = rows.start * self.row_stride + head * self.head_dim;
        Matrix::new(
            &self.data[start..],
            rows.len(),
            self.head_dim,
            self.row_stride,
        )
    }
}

/// What attention reads: `rows` of q, k and v, where groups of heads of q share a head of k and v.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub q: Heads<'a>,
    pub k: Heads<'a>,
    pub v: Heads<'a>,
    /// Factor of the scores.
    pub scale: f32,
}

/// softmax(scale · q kᵀ) v under the plan, into `output` \[rows, heads × head_dim\].
///
/// # Panics
///
/// Where a slice is shorter than the plan's rows, or the heads of q are no multiple of k's.
pub(super) fn attend(output: &mut [f32], inputs: Inputs<'_>, plan: &AttentionPlan) {
    let Inputs { q, k, v, .. } = inputs;
    let width = q.heads * q.head_dim;
    assert_eq!(output.len(), plan.rows * width);
    assert!(q.heads.is_multiple_of(k.heads) && k.heads == v.heads);
    let positions = (TILE_ROWS * k.heads / q.heads).max(1);
    let mut rest = output;
    let mut tiles = Vec::new();
    for segment in &plan.segments {
        for start in segment.queries.clone().step_by(positions) {
            let queries = start..segment.queries.end.min(start + positions);
            let (into, after) = rest.split_at_mut(queries.len() * width);
            rest = after;
            tiles.push((Tile { segment, queries }, into));
        }
    }
    tiles.into_par_iter().with_max_len(1).for_each_init(
        Scratch::default,
        |scratch, (tile, into)| {
            let chunks = tile.chunks();
            for head in 0..k.heads {
                tile.attend(&chunks, into, inputs, head, scratch);
            }
        },
    );
}

/// Some of the queries of a segment.
struct Tile<'a> {
    segment: &'a Segment,
    queries: Range<usize>,
}

/// At most [`CHUNK_KEYS`] keys that a tile sees.
struct Chunk {
    /// How many keys come before.
    start: usize,
    len: usize,
    /// Rows of keys, and in which column of the scores they start.
    keys: Vec<(usize, Range<usize>)>,
}

/// What one tile of queries needs for one head of keys; m = positions × group.
#[derive(Default)]
struct Scratch {
    /// Scaled queries, \[m, head_dim\].
    queries: Vec<f32>,
    /// Scores, then weights, of a chunk of keys, \[m, CHUNK_KEYS\].
    scores: Vec<f32>,
    /// Weighted sum of the values so far, \[m, head_dim\].
    values: Vec<f32>,
    /// Largest score and sum of the weights so far, \[m\].
    softmax: Vec<(f32, f32)>,
}

impl Tile<'_> {
    /// The keys that the last query sees.
    fn chunks(&self) -> Vec<Chunk> {
        let own = self.segment.queries.start..self.queries.end;
        let mut chunks: Vec<Chunk> = Vec::new();
        let mut seen = 0;
        for mut keys in self.segment.prefix.iter().cloned().chain([own]) {
            while !keys.is_empty() {
                if seen % CHUNK_KEYS == 0 {
                    chunks.push(Chunk {
                        start: seen,
                        len: 0,
                        keys: Vec::new(),
                    });
                }
                let Some(chunk) = chunks.last_mut() else {
                    break;
                };
                let taken = keys.len().min(CHUNK_KEYS - chunk.len);
                chunk.keys.push((chunk.len, keys.start..keys.start + taken));
                chunk.len += taken;
                seen += taken;
                keys.start += taken;
            }
        }
        chunks
    }

    /// Attends the group of query heads that share head `head` of the keys; `output` is the rows
    /// of this tile.
    fn attend(
        &self,
        chunks: &[Chunk],
        output: &mut [f32],
        inputs: Inputs<'_>,
        head: usize,
        scratch: &mut Scratch,
    ) {
        let Inputs { q, k, v, scale } = inputs;
        let (dim, group) = (q.head_dim, q.heads / k.heads);
        let m = self.queries.len() * group;
        let query_rows = self.queries.clone().map(|row| row * q.row_stride);
        let group_start = head * group * dim;
        scratch.start(m, dim);
        let packed = scratch.queries.chunks_exact_mut(group * dim);
        for (packed, row) in packed.zip(query_rows) {
            let queries = &q.data[row + group_start..][..group * dim];
            packed
                .iter_mut()
                .zip(queries)
                .for_each(|(to, x)| *to = x * scale);
        }

        let last = chunks.last().map_or(0, |chunk| chunk.start + chunk.len);
        let seen_by_first = last + 1 - self.queries.len();
        for chunk in chunks {
            for (column, keys) in &chunk.keys {
                let queries = Matrix::new(&scratch.queries, m, dim, dim);
                let scores = &mut scratch.scores[*column..];
                let keys = k.head(keys, head).transposed();
                matmul(
                    scores,
                    CHUNK_KEYS,
                    Store::Replace,
                    queries,
                    keys,
                    Parallelism::None,
                );
            }
            pulp::Arch::new().dispatch(Weigh {
                scratch,
                chunk,
                head_dim: dim,
                group,
                seen_by_first,
            });
            for (column, keys) in &chunk.keys {
                let weights = Matrix::new(&scratch.scores[*column..], m, keys.len(), CHUNK_KEYS);
                let values = v.head(keys, head);
                matmul(
                    &mut scratch.values,
                    dim,
                    Store::Add,
                    weights,
                    values,
                    Parallelism::None,
                );
            }
        }

        let rows = scratch.values.chunks_exact(group * dim);
        let sums = scratch.softmax.chunks_exact(group);
        let output = output.chunks_exact_mut(q.heads * dim);
        for ((output, values), sums) in output.zip(rows).zip(sums) {
            let heads = output[group_start..].chunks_exact_mut(dim);
            for ((output, values), (_, sum)) in heads.zip(values.chunks_exact(dim)).zip(sums) {
                output
                    .iter_mut()
                    .zip(values)
                    .for_each(|(to, x)| *to = x / sum);
            }
        }
    }
}

impl Scratch {
    fn start(&mut self, m: usize, head_dim: usize) {
        self.queries.resize(m * head_dim, 0.0);
        self.scores.resize(m * CHUNK_KEYS, 0.0);
        self.values.clear();
        self.values.resize(m * head_dim, 0.0);
        self.softmax.clear();
        self.softmax.resize(m, (f32::NEG_INFINITY, 0.0));
    }
}

/// Turns the scores of a chunk of keys into weights, and scales what is summed so far to the new
/// largest score.
struct Weigh<'a> {
    scratch: &'a mut Scratch,
    chunk: &'a Chunk,
    head_dim: usize,
    /// Rows of scratch for each position.
    group: usize,
    /// Keys that the first position sees; each further one sees one more.
    seen_by_first: usize,
}

impl pulp::NullaryFnOnce for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let scores = self.scratch.scores.chunks_exact_mut(CHUNK_KEYS);
        let values = self.scratch.values.chunks_exact_mut(self.head_dim);
        let rows = scores.zip(values).zip(&mut self.scratch.softmax);
        for (row, ((scores, values), (max, sum))) in rows.enumerate() {
            let seen = (self.seen_by_first + row / self.group).saturating_sub(self.chunk.start);
            let (seen, hidden) = scores[..self.chunk.len].split_at_mut(seen.min(self.chunk.len));
            hidden.fill(0.0);
            if seen.is_empty() {
                continue;
            }
            let new_max = simd::max(seen).max(*max);
            let shrink = simd::exp(*max - new_max);
            *sum = *sum * shrink + simd::exp_and_sum(seen, new_max);
            *max = new_max;
            for x in values {
                *x *= shrink;
            }
        }
    }
}

#[cfg(test)]
mod tests;
