//! Plans of batches against counting.

use std::collections::HashSet;

use proptest::prelude::*;
use radix_mlp::{Budget, plan_batches};

/// Distinct non-empty prefixes: the nodes of the trie, by definition.
fn unique_tokens(sequences: &[&Vec<u32>]) -> usize {
    let prefixes = sequences
        .iter()
        .flat_map(|tokens| (1..=tokens.len()).map(|len| &tokens[..len]));
    prefixes.collect::<HashSet<_>>().len()
}

fn sequences() -> impl Strategy<Value = Vec<Vec<u32>>> {
    prop::collection::vec(prop::collection::vec(0..3u32, 0..12), 0..40)
}

proptest! {
    #[test]
    fn every_sequence_is_in_one_batch_within_the_budget(
        sequences in sequences(),
        limit in 1..60usize,
        unique in any::<bool>(),
    ) {
        let budget = if unique { Budget::UniqueTokens(limit) } else { Budget::Tokens(limit) };
        let batches = plan_batches(&sequences, budget);
        let mut planned: Vec<usize> = batches.iter().flat_map(|b| b.sequences.clone()).collect();
        planned.sort_unstable();
        prop_assert!(planned.into_iter().eq(0..sequences.len()));
        for batch in &batches {
            let members: Vec<_> = batch.sequences.iter().map(|&s| &sequences[s]).collect();
            prop_assert_eq!(batch.tokens, members.iter().map(|s| s.len()).sum::<usize>());
            prop_assert_eq!(batch.unique_tokens, unique_tokens(&members));
            let counted = if unique { batch.unique_tokens } else { batch.tokens };
            prop_assert!(counted <= limit || members.len() == 1);
        }
    }

    /// With room for all, one batch shares everything that can be shared.
    #[test]
    fn a_large_budget_is_one_batch(sequences in sequences()) {
        let batches = plan_batches(&sequences, Budget::UniqueTokens(1000));
        prop_assert_eq!(batches.len(), usize::from(!sequences.is_empty()));
    }
}

#[test]
fn groups_that_arrive_interleaved_meet() {
    let pair = |group: u32, item: u32| vec![group; 8].into_iter().chain([item]).collect();
    let sequences: Vec<Vec<u32>> = (0..40).map(|i| pair(i % 4, i)).collect();
    let batches = plan_batches(&sequences, Budget::UniqueTokens(18));
    assert_eq!(batches.len(), 4);
    for batch in batches {
        assert!(
            batch
                .sequences
                .windows(2)
                .all(|pair| pair[0] % 4 == pair[1] % 4)
        );
    }
}
