//! Puts sequences that share prefixes in the same batch.

use crate::prefix::{common_prefix, lexicographic};

/// What a batch may hold at most, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// Nodes of the batch's trie: what is computed at the levels that fold everything.
    UniqueTokens(usize),
    /// All tokens, shared or not: what is computed, or expanded to, at the other levels.
    Tokens(usize),
}

impl Budget {
    pub(crate) fn limit(self) -> usize {
        match self {
            Self::UniqueTokens(limit) | Self::Tokens(limit) => limit,
        }
    }

    /// What a sequence adds to a batch that has the first `shared` of its tokens already.
    pub(crate) fn cost(self, tokens: &[u32], shared: usize) -> usize {
        match self {
            Self::UniqueTokens(_) => tokens.len() - shared,
            Self::Tokens(_) => tokens.len(),
        }
    }
}

/// One batch of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedBatch {
    /// Which of the sequences, in lexicographic order of their tokens.
    pub sequences: Vec<usize>,
    /// Number of tokens in them.
    pub tokens: usize,
    /// Number of nodes of their trie, where positions count from 0 in each sequence.
    pub unique_tokens: usize,
}

/// Splits `sequences` into batches within `budget`, so that those that share prefixes meet.
///
/// Sorting by tokens is the depth-first order of the trie of all sequences: neighbours share the
/// most, and a sequence adds to a batch just the tokens after what it shares with the one before
/// it. Batches are cut from that order greedily. A sequence longer than the budget is a batch of its
/// own. Every sequence, empty ones included, is in exactly one batch.
///
/// ```
/// use radix_mlp::{Budget, plan_batches};
///
/// let batches = plan_batches(&[vec![1, 2, 3], vec![9], vec![1, 2, 4]], Budget::UniqueTokens(4));
/// assert_eq!(batches[0].sequences, [0, 2]);
/// assert_eq!((batches[0].tokens, batches[0].unique_tokens), (6, 4));
/// assert_eq!(batches[1].sequences, [1]);
/// ```
pub fn plan_batches<S: AsRef<[u32]>>(sequences: &[S], budget: Budget) -> Vec<PlannedBatch> {
    let tokens = |index: usize| sequences[index].as_ref();
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by(|&a, &b| lexicographic(tokens(a), tokens(b)));

    let mut batches: Vec<PlannedBatch> = Vec::new();
    for index in order {
        let sequence = tokens(index);
        if let Some(batch) = batches.last_mut() {
            let before = batch.sequences.last().map_or(&[][..], |&last| tokens(last));
            let shared = common_prefix(before, sequence);
            let spent = match budget {
                Budget::UniqueTokens(_) => batch.unique_tokens,
                Budget::Tokens(_) => batch.tokens,
            };
            if spent + budget.cost(sequence, shared) <= budget.limit() {
                batch.sequences.push(index);
                batch.tokens += sequence.len();
                batch.unique_tokens += sequence.len() - shared;
                continue;
            }
        }
        batches.push(PlannedBatch {
            sequences: vec![index],
            tokens: sequence.len(),
            unique_tokens: sequence.len(),
        });
    }
    batches
}
