//! Random batches against naive oracles, and invariants on whatever real batches are there.

mod batch;
mod masks;

use std::path::Path;

use proptest::prelude::*;
use radix_mlp::{Fold, FoldBuilder, FoldError, Layout, TokenIds};
use serde_json::Value;

use crate::batch::{Batch, batches, naive, parents, sees};
use crate::masks::check_block_mask;

fn check_first_occurrence(batch: &Batch, fold: &Fold) {
    let (scatter, parents) = naive(batch);
    assert_eq!(fold.scatter_indices(), scatter);
    assert_eq!(fold.num_nodes(), parents.len());
    // A row's first occurrence is the first token that maps to it.
    let mut first = vec![None; parents.len()];
    for (token, &row) in (0u32..).zip(&scatter) {
        first[row as usize].get_or_insert(token);
    }
    let first: Vec<u32> = first.into_iter().flatten().collect();
    assert_eq!(fold.fold_gather()[..first.len()], first);
    let ends = &batch.cu_seq_lengths[1..];
    let new_ends_sequences = ends.iter().zip(fold.query_lengths().unwrap());
    assert!(
        new_ends_sequences
            .flat_map(|(&end, &new)| end - new..end)
            .eq(first)
    );
}

/// What every fold keeps, whatever its layout.
fn check_maps(batch: &Batch, fold: &Fold, pad_multiple_of: usize) {
    let nodes = fold.num_nodes();
    assert_eq!(fold.num_rows(), nodes.next_multiple_of(pad_multiple_of));
    assert_eq!(fold.cu_seq_lengths(), batch.cu_seq_lengths);
    let ids = fold.unfold(fold.input_ids(), 1).unwrap();
    let positions = fold.unfold(fold.position_ids(), 1).unwrap();
    assert_eq!(ids, batch.input_ids);
    assert_eq!(positions, batch.position_ids);
    for (row, &token) in fold.fold_gather()[..nodes].iter().enumerate() {
        assert_eq!(fold.scatter_indices()[token as usize] as usize, row);
    }
    for padding in [fold.input_ids(), fold.position_ids(), fold.fold_gather()] {
        assert!(padding[nodes..].iter().all(|&value| value == 0));
    }
}

fn check_depth_first(first: &Fold, tree: &Fold) {
    let order = tree.row_order().unwrap();
    let mut sorted = order.to_vec();
    sorted.sort_unstable();
    assert!(sorted.into_iter().eq(0..first.num_rows() as u32));
    for (to_tree, to_first) in tree.scatter_indices().iter().zip(first.scatter_indices()) {
        assert_eq!(order[*to_tree as usize], *to_first);
    }
    let subtree_end = tree.subtree_end().unwrap();
    let parents = parents(tree);
    for q in 0..tree.num_rows() {
        for (kv, &end) in subtree_end.iter().enumerate() {
            let interval = kv <= q && q < end as usize;
            assert_eq!(interval, sees(&parents, q, kv), "row {q} sees row {kv}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn folds_match_the_oracle(batch in batches(), pad in 1..40usize) {
        let first = batch.fold(Layout::FirstOccurrence, pad);
        check_first_occurrence(&batch, &first);
        check_maps(&batch, &first, pad);
        let tree = batch.fold(Layout::DepthFirst, pad);
        check_maps(&batch, &tree, pad);
        check_depth_first(&first, &tree);
        prop_assert_eq!(first.draw(|ids| format!("{ids:?}")).lines().count() == 0,
            batch.input_ids.is_empty());
    }

    /// Positions that are not given are 0, 1, 2 and so on.
    #[test]
    fn counted_positions_are_those_of_their_sequences(batch in batches(), pad in 1..40usize) {
        let mut batch = batch;
        let lengths = batch.cu_seq_lengths.windows(2).map(|ends| ends[1] - ends[0]);
        batch.position_ids = lengths.flat_map(|length| 0..length).collect();
        for layout in [Layout::FirstOccurrence, Layout::DepthFirst] {
            let builder = Fold::counted(&batch.input_ids, &batch.cu_seq_lengths)
                .salts(&batch.salts)
                .layout(layout)
                .pad_multiple_of(pad);
            prop_assert_eq!(builder.build().unwrap(), batch.fold(layout, pad));
        }
    }

    #[test]
    fn ids_of_64_bits_fold_as_those_of_32(
        batch in batches(), pad in 1..40usize, counted: bool, salted: bool,
    ) {
        let ids = batch.wide_ids();
        let positions = (!counted).then_some(&batch.position_ids[..]);
        for layout in [Layout::FirstOccurrence, Layout::DepthFirst] {
            let folded = |ids| {
                let builder = FoldBuilder::new(ids, positions, &batch.cu_seq_lengths);
                let builder = if salted { builder.salts(&batch.salts) } else { builder };
                builder.layout(layout).pad_multiple_of(pad).build()
            };
            let wide = folded(TokenIds::I64(&ids)).unwrap();
            prop_assert_eq!(&wide, &folded(TokenIds::U32(&batch.input_ids)).unwrap());
        }
    }

    /// Some have the low halves of ids that are in range, maybe of their siblings.
    #[test]
    fn the_first_id_out_of_range_is_named(
        batch in batches(), counted: bool,
        strays in prop::collection::vec((any::<prop::sample::Index>(), 0..3i64, -2..2i64), 1..5),
    ) {
        prop_assume!(!batch.input_ids.is_empty());
        let mut ids = batch.wide_ids();
        for (place, low, high) in strays {
            *place.get_mut(&mut ids) = high << 32 | low;
        }
        let in_range = |id: &i64| u32::try_from(*id).is_ok();
        let stray = ids.iter().position(|id| !in_range(id));
        let expected = stray.map(|index| FoldError::TokenId { index, value: ids[index] });
        let positions = (!counted).then_some(&batch.position_ids[..]);
        for layout in [Layout::FirstOccurrence, Layout::DepthFirst] {
            let builder = FoldBuilder::new(TokenIds::I64(&ids), positions, &batch.cu_seq_lengths);
            let built = builder.salts(&batch.salts).layout(layout).build();
            prop_assert_eq!(built.err(), expected);
        }
    }

    /// Wide nodes find children by hash; splitting them hands the hashed children on.
    #[test]
    fn wide_nodes_match_the_oracle(
        suffixes in prop::collection::vec((0..40u32, 0..3u32), 20..200),
        cuts in prop::collection::vec(0..12usize, 200),
    ) {
        let prefix: Vec<(u32, u32)> = (0..10).map(|i| (7, i)).collect();
        let sequences = suffixes.iter().zip(cuts).map(|(&(id, next), cut)| {
            let mut tokens = prefix[..cut.min(10)].to_vec();
            tokens.extend([(id, 10), (next, 11)]);
            (0, tokens)
        });
        let batch = Batch::new(sequences.collect());
        check_first_occurrence(&batch, &batch.fold(Layout::FirstOccurrence, 1));
    }
}

/// Runs are compared 32 tokens at a time: one difference at any place must part them there.
#[test]
fn one_changed_token_parts_two_sequences() {
    let plain: Vec<(u32, u32)> = (0..100).map(|i| (7, i)).collect();
    for place in 0..100 {
        for (id, position) in [(8, place), (7, place + 1)] {
            let mut changed = plain.clone();
            changed[place as usize] = (id, position);
            let batch = Batch::new(vec![(0, plain.clone()), (0, changed)]);
            let fold = batch.fold(Layout::FirstOccurrence, 1);
            assert_eq!(fold.query_lengths(), Some(&[100, 100 - place][..]));
            check_first_occurrence(&batch, &fold);
        }
    }
}

/// A comb, the deepest trie with a branch at every row: a chain of `teeth` tokens with a leaf off
/// each. Every chain of it is a single row.
fn comb(teeth: u32) -> Batch {
    let sequence = |length: u32| {
        let mut tokens: Vec<(u32, u32)> = (0..length).map(|i| (1, i)).collect();
        tokens.push((2, length));
        (0, tokens)
    };
    Batch::new((0..teeth).map(sequence).collect())
}

#[test]
fn deep_and_branching_tries_fold() {
    let batch = comb(150);
    let first = batch.fold(Layout::FirstOccurrence, 1);
    check_first_occurrence(&batch, &first);
    let tree = batch.fold(Layout::DepthFirst, 1);
    check_depth_first(&first, &tree);
    for (query_block, key_block) in [(1, 1), (1, 7), (7, 7), (64, 16), (16, 64), (1000, 1000)] {
        check_block_mask(&tree, query_block, key_block);
    }
}

/// The groups of one file of real batches, each as sequences of bytes: what they share is what
/// their tokens share. Trees and trials, whose texts take a template to render, are left out.
fn real_groups(path: &Path) -> Vec<Vec<String>> {
    let group = |line: &str| -> Option<Vec<String>> {
        let record: Value = serde_json::from_str(line).unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let list = |key: &str| record[key].as_array().cloned();
        let prefixed = |prefix: &str, list: Vec<Value>| {
            let prefix = text(&record[prefix]);
            list.iter()
                .map(|item| prefix.clone() + &text(item))
                .collect()
        };
        if let Some(passages) = list("passages") {
            return Some(prefixed(
                "query",
                passages.iter().map(|p| p["text"].clone()).collect(),
            ));
        }
        let lists = [("prefix", "inputs"), ("prompt", "completions")];
        lists
            .iter()
            .find_map(|(prefix, key)| Some(prefixed(prefix, list(key)?)))
    };
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().take(4).filter_map(group).collect()
}

#[test]
fn real_batches_match_the_oracle() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let Ok(files) = std::fs::read_dir(&data) else {
        println!("skipped: no real batches at {}", data.display());
        return;
    };
    let mut folded = 0;
    for file in files.map(|file| file.unwrap().path()) {
        if file
            .extension()
            .is_none_or(|extension| extension != "jsonl")
        {
            continue;
        }
        for texts in real_groups(&file) {
            let tokens = |text: &String| (0, text.bytes().map(u32::from).zip(0..).collect());
            let batch = Batch::new(texts.iter().take(64).map(tokens).collect());
            let first = batch.fold(Layout::FirstOccurrence, 8);
            check_first_occurrence(&batch, &first);
            check_maps(&batch, &first, 8);
            let tree = batch.fold(Layout::DepthFirst, 8);
            check_maps(&batch, &tree, 8);
            check_intervals(&tree);
            assert!(
                first.compression() > 1.0,
                "{}: nothing shared",
                file.display()
            );
            folded += 1;
        }
    }
    assert!(folded > 0, "no batch in {}", data.display());
}

/// The intervals of a tree too large to look at every pair: children start within their parent's
/// subtree, right after it or after a sibling's, and a sequence's path ascends.
fn check_intervals(tree: &Fold) {
    let subtree_end = tree.subtree_end().unwrap();
    let parents = parents(tree);
    let mut covered = vec![0; tree.num_rows()];
    for (row, parent) in parents.iter().enumerate() {
        let size = subtree_end[row] as usize - row;
        if let Some(parent) = *parent {
            assert!((parent as usize) < row && subtree_end[row] <= subtree_end[parent as usize]);
            covered[parent as usize] += size;
        }
    }
    for (row, covered) in covered.into_iter().enumerate() {
        assert_eq!(subtree_end[row] as usize, row + 1 + covered, "row {row}");
    }
}
