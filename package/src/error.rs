use core::fmt;

/// Why a batch cannot be folded. Each variant carries the offending values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FoldError {
    /// `input_ids` and `position_ids` differ in length.
    LengthMismatch {
        /// Length of `input_ids`.
        input_ids: usize,
        /// Length of `position_ids`.
        position_ids: usize,
    },
    /// An id is negative or does not fit in a `u32`.
    TokenId {
        /// Index of the first such id.
        index: usize,
        /// The id.
        value: i64,
    },
    /// The first entry of `cu_seq_lengths` is not 0.
    OffsetsStart {
        /// The first entry.
        first: u32,
    },
    /// An entry of `cu_seq_lengths` is smaller than the one before it.
    OffsetsDecrease {
        /// Index of the smaller entry.
        index: usize,
        /// The entry before it.
        previous: u32,
        /// The smaller entry.
        next: u32,
    },
    /// The last entry of `cu_seq_lengths` (0 where there is none) is not the number of tokens.
    OffsetsEnd {
        /// The last entry.
        last: u32,
        /// Number of tokens, N.
        tokens: usize,
    },
    /// More tokens, padding included, than a `u32` can index.
    TooManyTokens {
        /// Number of tokens asked for; `usize::MAX` where even that overflows.
        tokens: usize,
    },
    /// The rows should be padded to a multiple of 0.
    ZeroPadMultiple,
    /// The number of salts is not the number of sequences.
    SaltsLength {
        /// Number of salts.
        salts: usize,
        /// Number of sequences.
        sequences: usize,
    },
    /// A mask with blocks or a window of 0 rows was asked for.
    ZeroBlockSize,
    /// The operation reads the trie's intervals, which only
    /// [`Layout::DepthFirst`](crate::Layout::DepthFirst) has.
    NeedsDepthFirst,
    /// A slice to fold or unfold does not hold the rows that the fold maps.
    RowsMismatch {
        /// Number of elements in the slice.
        len: usize,
        /// Number of rows expected.
        rows: usize,
        /// Number of elements in each row.
        width: usize,
    },
}

impl fmt::Display for FoldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::LengthMismatch {
                input_ids,
                position_ids,
            } => write!(
                f,
                "input_ids and position_ids must have same length: {input_ids} != {position_ids}"
            ),
            Self::TokenId { index, value } => write!(
                f,
                "input_ids[{index}] is {value}, which is not in 0..={}",
                u32::MAX
            ),
            Self::OffsetsStart { first } => {
                write!(f, "cu_seq_lengths must start at 0, starts at {first}")
            }
            Self::OffsetsDecrease {
                index,
                previous,
                next,
            } => write!(
                f,
                "cu_seq_lengths must not decrease: entry {index} is {next} after {previous}"
            ),
            Self::OffsetsEnd { last, tokens } => write!(
                f,
                "cu_seq_lengths must end at the number of tokens, {tokens}, ends at {last}"
            ),
            Self::TooManyTokens { tokens } => write!(
                f,
                "a batch holds at most {} tokens, padding included, got {tokens}",
                u32::MAX
            ),
            Self::ZeroPadMultiple => write!(f, "rows cannot be padded to a multiple of 0"),
            Self::SaltsLength { salts, sequences } => {
                write!(f, "got {salts} salts for {sequences} sequences")
            }
            Self::ZeroBlockSize => {
                write!(f, "neither a mask's blocks nor its window can have 0 rows")
            }
            Self::NeedsDepthFirst => write!(
                f,
                "block masks need the depth-first layout, the fold is in first-occurrence layout"
            ),
            Self::RowsMismatch { len, rows, width } => write!(
                f,
                "expected {rows} rows of {width} elements, got {len} elements"
            ),
        }
    }
}

impl core::error::Error for FoldError {}
