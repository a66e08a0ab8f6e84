//! Masks of tree attention against all pairs of rows.

use proptest::prelude::*;
use radix_mlp::{Csr, Fold, Layout};

use crate::batch::{batches, parents, sees};

/// Blocks of the mask by looking at every pair of rows.
pub fn check_block_mask(tree: &Fold, query_block: usize, key_block: usize) {
    let mask = tree.block_mask(query_block, key_block).unwrap();
    let rows = tree.num_rows();
    let parents = parents(tree);
    let block = |b: usize, size: usize| b * size..rows.min((b + 1) * size);
    assert_eq!(
        (mask.query_block(), mask.key_block()),
        (query_block, key_block)
    );
    assert_eq!(mask.num_blocks(), rows.div_ceil(query_block));
    for q in 0..mask.num_blocks() {
        let (mut full, mut partial) = (Vec::new(), Vec::new());
        for kv in 0..rows.div_ceil(key_block) {
            let keys = block(kv, key_block);
            let pairs = block(q, query_block).flat_map(|q| keys.clone().map(move |kv| (q, kv)));
            let seen: Vec<bool> = pairs.map(|(q, kv)| sees(&parents, q, kv)).collect();
            if keys.len() == key_block && seen.iter().all(|&seen| seen) {
                full.push(kv as u32);
            } else if seen.iter().any(|&seen| seen) {
                partial.push(kv as u32);
            }
        }
        assert_eq!(mask.full().row(q), full, "full blocks of {q}");
        assert_eq!(mask.partial().row(q), partial, "partial blocks of {q}");
    }
}

/// Each row's path, from the root to it, by walking up; padding rows are one path.
fn paths(fold: &Fold) -> Vec<Vec<u32>> {
    let parents = parents(fold);
    let path = |row: usize| {
        if row >= fold.num_nodes() {
            return (fold.num_nodes() as u32..=row as u32).collect();
        }
        let upwards = std::iter::successors(Some(row as u32), |&row| parents[row as usize]);
        let mut path: Vec<u32> = upwards.collect();
        path.reverse();
        path
    };
    (0..fold.num_rows()).map(path).collect()
}

/// That the blocks that query blocks list are their rows' paths, cut at multiples of the block size.
fn check_path_mask(tree: &Fold, query_block: usize, key_block: usize, window: Option<u32>) {
    let mask = tree.path_mask(query_block, key_block, window).unwrap();
    let paths = paths(tree);
    let depths: Vec<u32> = paths.iter().map(|path| path.len() as u32 - 1).collect();
    assert_eq!(mask.depth(), depths);
    let level = |block: u32| mask.blocks()[block as usize][2] as usize / key_block;
    // What a row sees of a block: its keys' places in the path, and their rows.
    let seen = |row: usize, block: u32| -> Vec<(usize, u32)> {
        let [first, end, depth, above] = mask.blocks()[block as usize];
        let shared = depth as usize % key_block;
        let rows = &mask.above()[above as usize..][..shared];
        let rows = rows.iter().copied().chain(first..).take(key_block);
        let own = |key: u32| (first..end).contains(&(row as u32)) && key <= row as u32;
        let places = (level(block) * key_block..).zip(rows);
        places.filter(|&(_, key)| own(key)).collect()
    };
    for (tile, start) in (0..tree.num_rows()).step_by(query_block).enumerate() {
        let queries = start..tree.num_rows().min(start + query_block);
        let [partial, full] = [mask.partial().row(tile), mask.full().row(tile)];
        let listed = [partial, full].concat();
        assert!(listed.is_sorted_by(|&a, &b| level(a) >= level(b)));
        for row in queries.clone() {
            let path = &paths[row];
            let mut found: Vec<_> = listed.iter().flat_map(|&block| seen(row, block)).collect();
            found.sort_unstable();
            let nearest = window.map_or(0, |window| path.len().saturating_sub(window as usize));
            let expected = path.iter().enumerate().map(|(at, &row)| (at, row));
            // Blocks that begin before the window stand there as a whole.
            let beyond = found.partition_point(|&(place, _)| place < nearest);
            assert!(
                expected.skip(nearest).eq(found[beyond..].iter().copied()),
                "row {row}"
            );
            for &block in full {
                assert_eq!(seen(row, block).len(), key_block, "row {row}");
            }
        }
        for &block in partial {
            assert!(
                queries
                    .clone()
                    .any(|row| seen(row, block).len() < key_block)
            );
        }
        for &block in &listed {
            let last = (level(block) + 1) * key_block;
            let near = |row: usize| window.is_none_or(|w| paths[row].len() < last + w as usize);
            assert!(
                queries.clone().any(near),
                "block {block} is beyond the window"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn path_masks_are_the_rows_paths(
        batch in batches(), pad in 1..9usize, query_block in 1..20usize, key_block in 1..20usize,
        window in prop::option::of(1..30u32),
    ) {
        check_path_mask(&batch.fold(Layout::DepthFirst, pad), query_block, key_block, window);
    }

    #[test]
    fn block_masks_match_all_pairs(
        batch in batches(), pad in 1..9usize, query_block in 1..20usize, key_block in 1..20usize,
    ) {
        check_block_mask(&batch.fold(Layout::DepthFirst, pad), query_block, key_block);
    }
}

#[test]
fn block_mask_of_a_plain_sequence_is_causal() {
    let rows = 1 << 20;
    let tokens: Vec<u32> = (0..rows).collect();
    let tree = Fold::builder(&tokens, &tokens, &[0, rows])
        .layout(Layout::DepthFirst)
        .build()
        .unwrap();
    // Looking at every pair of rows would take 10^12 steps.
    let mask = tree.block_mask(1 << 12, 1 << 12).unwrap();
    let Csr { offsets, indices } = mask.full();
    assert_eq!(indices.len(), 256 * 255 / 2);
    assert_eq!(offsets[256], indices.len());
    assert!((0..256).all(|block| mask.partial().row(block) == [block as u32]));
}
