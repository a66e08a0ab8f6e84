//! Anything may be folded: either it is an error, or the maps hold and the trie is the oracle's.
//!
//! `cargo +nightly fuzz run fold` in `package/`.
#![no_main]

use std::collections::HashMap;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use radix_mlp::{Fold, Layout};

#[derive(Arbitrary, Debug)]
struct Input {
    /// A salt and (token id, position id) pairs each. Bytes, so that sequences meet.
    sequences: Vec<(u8, Vec<(u8, u8)>)>,
    /// Offsets that may be no batch's, instead of those of the sequences.
    offsets: Option<Vec<u32>>,
    salted: bool,
    depth_first: bool,
    pad_multiple_of: u16,
    block_sizes: [u8; 2],
    window: Option<u32>,
}

struct Batch {
    input_ids: Vec<u32>,
    position_ids: Vec<u32>,
    cu_seq_lengths: Vec<u32>,
    salts: Option<Vec<u64>>,
}

impl Batch {
    fn new(input: &Input) -> Self {
        let tokens = || input.sequences.iter().flat_map(|(_, tokens)| tokens);
        let mut end = 0;
        let ends = input.sequences.iter().map(|(_, tokens)| {
            end += tokens.len() as u32;
            end
        });
        let offsets = || std::iter::once(0).chain(ends).collect();
        let salts = || input.sequences.iter().map(|(salt, _)| u64::from(*salt));
        Self {
            input_ids: tokens().map(|token| token.0.into()).collect(),
            position_ids: tokens().map(|token| token.1.into()).collect(),
            cu_seq_lengths: input.offsets.clone().unwrap_or_else(offsets),
            salts: input.salted.then(|| salts().collect()),
        }
    }
}

/// Number of distinct paths, each found by its last step.
fn num_nodes(batch: &Batch) -> usize {
    let mut nodes = HashMap::new();
    for (s, ends) in batch.cu_seq_lengths.windows(2).enumerate() {
        let salt = batch.salts.as_ref().map_or(0, |salts| salts[s]);
        let mut parent = None;
        for i in ends[0] as usize..ends[1] as usize {
            let count = nodes.len();
            let path = (salt, parent, batch.input_ids[i], batch.position_ids[i]);
            parent = Some(*nodes.entry(path).or_insert(count));
        }
    }
    nodes.len()
}

fuzz_target!(|input: Input| {
    let batch = Batch::new(&input);
    let mut builder = Fold::builder(&batch.input_ids, &batch.position_ids, &batch.cu_seq_lengths)
        .pad_multiple_of(input.pad_multiple_of.into());
    if input.depth_first {
        builder = builder.layout(Layout::DepthFirst);
    }
    if let Some(salts) = &batch.salts {
        builder = builder.salts(salts);
    }
    let Ok(fold) = builder.build() else {
        return;
    };
    assert_eq!(fold.num_nodes(), num_nodes(&batch));
    assert_eq!(fold.unfold(fold.input_ids(), 1).unwrap(), batch.input_ids);
    assert_eq!(
        fold.unfold(fold.position_ids(), 1).unwrap(),
        batch.position_ids
    );
    for (row, &token) in fold.fold_gather()[..fold.num_nodes()].iter().enumerate() {
        assert_eq!(fold.scatter_indices()[token as usize] as usize, row);
    }
    let [query_block, key_block] = input.block_sizes.map(usize::from);
    let _ = fold.block_mask(query_block, key_block);
    let _ = fold.path_mask(query_block, key_block, input.window);
    let _ = fold.draw(|ids| ids.len().to_string());
});
