//! Random batches, the naive fold of one, and the trie that a fold has.

use std::collections::HashMap;

use proptest::prelude::*;
use radix_mlp::{Fold, Layout};

#[derive(Clone, Debug)]
pub struct Batch {
    pub input_ids: Vec<u32>,
    pub position_ids: Vec<u32>,
    pub cu_seq_lengths: Vec<u32>,
    pub salts: Vec<u64>,
}

impl Batch {
    pub fn new(sequences: Vec<(u64, Vec<(u32, u32)>)>) -> Self {
        let mut batch = Self {
            input_ids: Vec::new(),
            position_ids: Vec::new(),
            cu_seq_lengths: vec![0],
            salts: Vec::new(),
        };
        for (salt, tokens) in sequences {
            batch.salts.push(salt);
            batch.input_ids.extend(tokens.iter().map(|token| token.0));
            batch
                .position_ids
                .extend(tokens.iter().map(|token| token.1));
            batch.cu_seq_lengths.push(batch.input_ids.len() as u32);
        }
        batch
    }

    pub fn wide_ids(&self) -> Vec<i64> {
        self.input_ids.iter().map(|&id| id.into()).collect()
    }

    pub fn fold(&self, layout: Layout, pad_multiple_of: usize) -> Fold {
        Fold::builder(&self.input_ids, &self.position_ids, &self.cu_seq_lengths)
            .salts(&self.salts)
            .layout(layout)
            .pad_multiple_of(pad_multiple_of)
            .build()
            .unwrap()
    }
}

/// The oracle: rows in first-occurrence order, each found by its whole path. Returns the row of
/// every token and the parent of every row.
pub fn naive(batch: &Batch) -> (Vec<u32>, Vec<Option<u32>>) {
    let mut rows: HashMap<(u64, Option<u32>, u32, u32), u32> = HashMap::new();
    let (mut scatter, mut parents) = (Vec::new(), Vec::new());
    for (ends, &salt) in batch.cu_seq_lengths.windows(2).zip(&batch.salts) {
        let mut parent = None;
        for i in ends[0] as usize..ends[1] as usize {
            let key = (salt, parent, batch.input_ids[i], batch.position_ids[i]);
            let row = *rows.entry(key).or_insert_with(|| {
                parents.push(parent);
                parents.len() as u32 - 1
            });
            scatter.push(row);
            parent = Some(row);
        }
    }
    (scatter, parents)
}

/// Sequences that branch off one another at random places, repeat, or are empty. A small
/// vocabulary and few lengths around 32 (the lanes of the run comparison) make collisions likely.
pub fn batches() -> impl Strategy<Value = Batch> {
    let token = (0..3u32, 0..2u32);
    let fresh = prop::collection::vec(token, 0..80);
    // (which earlier sequence to branch off, how far along it in 1/8, what follows, salt)
    let branch = (
        any::<prop::sample::Index>(),
        0..9usize,
        fresh,
        0..2u64,
        any::<bool>(),
    );
    prop::collection::vec(branch, 0..24).prop_map(|branches| {
        let mut sequences: Vec<(u64, Vec<(u32, u32)>)> = Vec::new();
        for (from, eighths, fresh, salt, counted) in branches {
            let mut tokens = match sequences.len() {
                0 => Vec::new(),
                len => {
                    let earlier = &sequences[from.index(len)].1;
                    earlier[..earlier.len() * eighths / 8].to_vec()
                }
            };
            let start = tokens.len() as u32;
            // Positions as in a real batch, or anything.
            let at = |(i, (id, position)): (u32, (u32, u32))| {
                (id, if counted { start + i } else { position })
            };
            tokens.extend((0..).zip(fresh).map(at));
            sequences.push((salt, tokens));
        }
        Batch::new(sequences)
    })
}

/// Parent of each row, read off the sequences.
pub fn parents(fold: &Fold) -> Vec<Option<u32>> {
    let mut parents = vec![None; fold.num_rows()];
    for ends in fold.cu_seq_lengths().windows(2) {
        let path = &fold.scatter_indices()[ends[0] as usize..ends[1] as usize];
        for pair in path.windows(2) {
            parents[pair[1] as usize] = Some(pair[0]);
        }
    }
    parents
}

/// Is `kv` on the path from the root to `q`? By walking up, the definition.
pub fn sees(parents: &[Option<u32>], q: usize, kv: usize) -> bool {
    let mut row = Some(q as u32);
    std::iter::from_fn(|| {
        let this = row?;
        row = parents[this as usize];
        Some(this)
    })
    .any(|ancestor| ancestor as usize == kv)
}
