//! What two sequences of tokens begin with.

use std::cmp::Ordering;

use crate::ids::Id;

/// Length of the longest common prefix.
pub(crate) fn common_prefix<I: Id>(a: &[I], b: &[I]) -> usize {
    /// Tokens compared without a branch: enough to fill vector registers.
    const LANES: usize = 32;
    let mut equal = 0;
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        let differ = |diff, (&a, &b)| diff | (a ^ b);
        if a.iter().zip(b).fold(I::default(), differ) != I::default() {
            break;
        }
        equal += LANES;
    }
    let rest = a[equal..].iter().zip(&b[equal..]);
    equal + rest.take_while(|(a, b)| a == b).count()
}

/// Lexicographic order, as that of slices, which compares one token at a time.
pub(crate) fn lexicographic(a: &[u32], b: &[u32]) -> Ordering {
    let shared = common_prefix(a, b);
    a.get(shared).cmp(&b.get(shared))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against one token at a time, on sequences that part anywhere or not at all.
        #[test]
        fn sequences_compare_as_slices(
            start in prop::collection::vec(0..2u32, 0..100),
            ends in prop::array::uniform2(prop::collection::vec(0..2u32, 0..70)),
        ) {
            let [a, b] = ends.map(|end| [&start[..], &end].concat());
            let shared = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
            prop_assert_eq!(common_prefix(&a, &b), shared);
            prop_assert_eq!(lexicographic(&a, &b), a.cmp(&b));
        }
    }
}
