//! Named batches with the arrays that they fold to, and the errors of what is no batch.

use radix_mlp::{Fold, FoldBuilder, FoldError, Layout, TokenIds, compute_fold_and_scatter};

struct Case {
    name: &'static str,
    input_ids: &'static [u32],
    position_ids: &'static [u32],
    cu_seq_lengths: &'static [u32],
    pad_multiple_of: Option<usize>,
    compact_input_ids: &'static [u32],
    compact_position_ids: &'static [u32],
    scatter_indices: &'static [u32],
    fold_gather: &'static [u32],
    query_lengths: &'static [u32],
    /// Of the depth-first layout.
    row_order: &'static [u32],
    subtree_end: &'static [u32],
}

const CASES: &[Case] = &[
    Case {
        name: "no tokens, no offsets",
        input_ids: &[],
        position_ids: &[],
        cu_seq_lengths: &[],
        pad_multiple_of: Some(4),
        compact_input_ids: &[],
        compact_position_ids: &[],
        scatter_indices: &[],
        fold_gather: &[],
        query_lengths: &[],
        row_order: &[],
        subtree_end: &[],
    },
    Case {
        name: "only empty sequences",
        input_ids: &[],
        position_ids: &[],
        cu_seq_lengths: &[0, 0, 0],
        pad_multiple_of: None,
        compact_input_ids: &[],
        compact_position_ids: &[],
        scatter_indices: &[],
        fold_gather: &[],
        query_lengths: &[0, 0],
        row_order: &[],
        subtree_end: &[],
    },
    Case {
        name: "one sequence, padded",
        input_ids: &[5, 6, 7],
        position_ids: &[0, 1, 2],
        cu_seq_lengths: &[0, 3],
        pad_multiple_of: Some(4),
        compact_input_ids: &[5, 6, 7, 0],
        compact_position_ids: &[0, 1, 2, 0],
        scatter_indices: &[0, 1, 2],
        fold_gather: &[0, 1, 2, 0],
        query_lengths: &[3],
        row_order: &[0, 1, 2, 3],
        subtree_end: &[3, 3, 3, 4],
    },
    Case {
        name: "shared prefix, an empty sequence between",
        input_ids: &[5, 6, 7, 5, 6, 8],
        position_ids: &[0, 1, 2, 0, 1, 2],
        cu_seq_lengths: &[0, 3, 3, 6],
        pad_multiple_of: None,
        compact_input_ids: &[5, 6, 7, 8],
        compact_position_ids: &[0, 1, 2, 2],
        scatter_indices: &[0, 1, 2, 0, 1, 3],
        fold_gather: &[0, 1, 2, 5],
        query_lengths: &[3, 0, 1],
        row_order: &[0, 1, 2, 3],
        subtree_end: &[4, 4, 3, 4],
    },
    Case {
        name: "identical sequences",
        input_ids: &[5, 6, 5, 6],
        position_ids: &[0, 1, 0, 1],
        cu_seq_lengths: &[0, 2, 4],
        pad_multiple_of: None,
        compact_input_ids: &[5, 6],
        compact_position_ids: &[0, 1],
        scatter_indices: &[0, 1, 0, 1],
        fold_gather: &[0, 1],
        query_lengths: &[2, 0],
        row_order: &[0, 1],
        subtree_end: &[2, 2],
    },
    Case {
        name: "equal tokens at other positions share nothing",
        input_ids: &[5, 6, 5, 6],
        position_ids: &[0, 1, 1, 2],
        cu_seq_lengths: &[0, 2, 4],
        pad_multiple_of: None,
        compact_input_ids: &[5, 6, 5, 6],
        compact_position_ids: &[0, 1, 1, 2],
        scatter_indices: &[0, 1, 2, 3],
        fold_gather: &[0, 1, 2, 3],
        query_lengths: &[2, 2],
        row_order: &[0, 1, 2, 3],
        subtree_end: &[2, 2, 4, 4],
    },
    Case {
        name: "a sequence that is another's prefix, before and after it",
        input_ids: &[5, 5, 6, 7, 5, 6],
        position_ids: &[0, 0, 1, 2, 0, 1],
        cu_seq_lengths: &[0, 1, 4, 6],
        pad_multiple_of: None,
        compact_input_ids: &[5, 6, 7],
        compact_position_ids: &[0, 1, 2],
        scatter_indices: &[0, 0, 1, 2, 0, 1],
        fold_gather: &[0, 2, 3],
        query_lengths: &[1, 2, 0],
        row_order: &[0, 1, 2],
        subtree_end: &[3, 3, 3],
    },
    Case {
        // 1 ─┬─ 2 ─┬─ 3
        //    │     └─ 5      the third sequence, depth-first before the second
        //    └─ 4
        name: "layouts differ where a later sequence shares more",
        input_ids: &[1, 2, 3, 1, 4, 1, 2, 5],
        position_ids: &[0, 1, 2, 0, 1, 0, 1, 2],
        cu_seq_lengths: &[0, 3, 5, 8],
        pad_multiple_of: None,
        compact_input_ids: &[1, 2, 3, 4, 5],
        compact_position_ids: &[0, 1, 2, 1, 2],
        scatter_indices: &[0, 1, 2, 0, 3, 0, 1, 4],
        fold_gather: &[0, 1, 2, 4, 7],
        query_lengths: &[3, 1, 1],
        row_order: &[0, 1, 2, 4, 3],
        subtree_end: &[5, 4, 3, 4, 5],
    },
];

#[test]
fn named_cases_fold_as_written() {
    for case in CASES {
        let folded = compute_fold_and_scatter(
            case.input_ids,
            case.position_ids,
            case.cu_seq_lengths,
            case.pad_multiple_of,
        );
        assert_eq!(folded.0, case.compact_input_ids, "{}", case.name);
        assert_eq!(folded.1, case.compact_position_ids, "{}", case.name);
        assert_eq!(folded.2, case.scatter_indices, "{}", case.name);
        assert_eq!(folded.3, case.fold_gather, "{}", case.name);

        let builder = Fold::builder(case.input_ids, case.position_ids, case.cu_seq_lengths)
            .pad_multiple_of(case.pad_multiple_of.unwrap_or(1));
        let fold = builder.build().unwrap();
        assert_eq!(fold.layout(), Layout::FirstOccurrence);
        assert_eq!(
            fold.query_lengths(),
            Some(case.query_lengths),
            "{}",
            case.name
        );
        assert_eq!((fold.subtree_end(), fold.row_order()), (None, None));

        let tree = builder.layout(Layout::DepthFirst).build().unwrap();
        assert_eq!(tree.layout(), Layout::DepthFirst);
        assert_eq!(tree.row_order(), Some(case.row_order), "{}", case.name);
        assert_eq!(tree.subtree_end(), Some(case.subtree_end), "{}", case.name);
        assert_eq!(tree.query_lengths(), None);
    }
}

fn error(ids: &[u32], positions: &[u32], offsets: &[u32]) -> FoldError {
    Fold::builder(ids, positions, offsets).build().unwrap_err()
}

#[test]
fn what_is_no_batch_is_an_error_with_its_values() {
    assert_eq!(
        error(&[1, 2], &[0], &[0, 2]),
        FoldError::LengthMismatch {
            input_ids: 2,
            position_ids: 1
        }
    );
    assert_eq!(
        error(&[1, 2], &[0, 1], &[1, 2]),
        FoldError::OffsetsStart { first: 1 }
    );
    assert_eq!(
        error(&[1, 2], &[0, 1], &[0, 2, 1, 2]),
        FoldError::OffsetsDecrease {
            index: 2,
            previous: 2,
            next: 1
        }
    );
    for (offsets, last) in [(&[0, 1][..], 1), (&[0, 3], 3), (&[0], 0), (&[], 0)] {
        let tokens = 2;
        assert_eq!(
            error(&[1, 2], &[0, 1], offsets),
            FoldError::OffsetsEnd { last, tokens }
        );
    }
    let batch = Fold::builder(&[1, 2], &[0, 1], &[0, 2]);
    assert_eq!(
        batch.pad_multiple_of(0).build(),
        Err(FoldError::ZeroPadMultiple)
    );
    assert_eq!(
        batch.pad_multiple_of(usize::MAX).build(),
        Err(FoldError::TooManyTokens { tokens: usize::MAX })
    );
    assert_eq!(
        batch.salts(&[1, 2]).build(),
        Err(FoldError::SaltsLength {
            salts: 2,
            sequences: 1
        })
    );
    let fold = batch.build().unwrap();
    assert_eq!(fold.block_mask(64, 64), Err(FoldError::NeedsDepthFirst));
    assert_eq!(
        fold.path_mask(64, 64, None),
        Err(FoldError::NeedsDepthFirst)
    );
    assert_eq!(
        fold.unfold(&[1, 2, 3], 2),
        Err(FoldError::RowsMismatch {
            len: 3,
            rows: 2,
            width: 2
        })
    );
    assert_eq!(
        fold.fold(&[0.5], usize::MAX),
        Err(FoldError::RowsMismatch {
            len: 1,
            rows: 2,
            width: usize::MAX
        })
    );
    let tree = batch.layout(Layout::DepthFirst).build().unwrap();
    assert_eq!(tree.block_mask(0, 64), Err(FoldError::ZeroBlockSize));
    for (query_block, key_block, window) in [(0, 64, None), (64, 0, None), (64, 64, Some(0))] {
        let refused = tree.path_mask(query_block, key_block, window);
        assert_eq!(refused, Err(FoldError::ZeroBlockSize));
    }
}

/// Every place of a batch: first tokens, within a shared run, where it is split, within leaves, and
/// among more siblings than are found without hashing.
#[test]
fn an_id_out_of_range_is_found_wherever_it_stands() {
    let sequences: Vec<[i64; 5]> = (0..12).map(|i| [5, 6, 7 + i / 9, 10 + i, i % 3]).collect();
    let valid = sequences.concat();
    let offsets: Vec<u32> = (0..=12).map(|sequence| sequence * 5).collect();
    let positions: Vec<u32> = (0..60).map(|token| token % 5).collect();
    for index in 0..valid.len() {
        let low = valid[index];
        let others = [-1, i64::MIN, i64::MAX, 1 << 32, 1 << 32 | 10, 1 << 32 | 11];
        for value in [1 << 32 | low, -1 << 32 | low].into_iter().chain(others) {
            let mut ids = valid.clone();
            ids[index] = value;
            for (positions, layout) in [
                (Some(&positions[..]), Layout::FirstOccurrence),
                (None, Layout::DepthFirst),
            ] {
                let builder = FoldBuilder::new(TokenIds::I64(&ids), positions, &offsets);
                let error = FoldError::TokenId { index, value };
                assert_eq!(builder.layout(layout).build(), Err(error));
            }
        }
    }
    let ends = TokenIds::I64(&[0, u32::MAX.into()]);
    let fold = FoldBuilder::new(ends, None, &[0, 2]).build().unwrap();
    assert_eq!(fold.input_ids(), [0, u32::MAX]);
}

#[test]
fn errors_read_as_sentences_with_their_values() {
    let token_id = FoldError::TokenId {
        index: 3,
        value: -1,
    };
    assert_eq!(
        token_id.to_string(),
        "input_ids[3] is -1, which is not in 0..=4294967295"
    );
    let message = error(&[1, 2], &[0, 1], &[0, 2, 1, 2]).to_string();
    assert_eq!(
        message,
        "cu_seq_lengths must not decrease: entry 2 is 1 after 2"
    );
}

#[test]
#[should_panic(expected = "cu_seq_lengths must end at the number of tokens, 2, ends at 1")]
fn compatible_function_panics_with_the_error() {
    compute_fold_and_scatter(&[1, 2], &[0, 1], &[0, 1], None);
}

#[test]
fn more_tokens_than_a_u32_counts_are_refused() {
    let tokens = u32::MAX as usize + 1;
    if Vec::<u32>::new().try_reserve_exact(tokens).is_err() {
        println!("skipped: no 16 GiB of address space on this machine");
        return;
    }
    // Zeroed pages that nobody touches: the length is checked before a token is read.
    let zeros = vec![0u32; tokens];
    assert_eq!(
        error(&zeros, &zeros, &[0]),
        FoldError::TooManyTokens { tokens }
    );
}

#[test]
fn picture_shows_runs_sharing_and_ends() {
    let fold = Fold::builder(
        &[1, 2, 3, 1, 4, 1, 2, 5, 1, 2],
        &[0, 1, 2, 0, 1, 0, 1, 2, 0, 1],
        &[0, 3, 5, 8, 10],
    );
    let expected = "\
[1] · 1 token × 4 sequences
├─ [2] · 1 token × 3 sequences → sequence 3
│  ├─ [3] · 1 token → sequence 0
│  └─ [5] · 1 token → sequence 2
└─ [4] · 1 token → sequence 1
";
    for layout in [Layout::FirstOccurrence, Layout::DepthFirst] {
        let fold = fold.layout(layout).build().unwrap();
        assert_eq!(fold.draw(|ids| format!("{ids:?}")), expected);
    }
}
