//! Token ids, in the integers in which people have them.

use std::ops::{BitOr, BitXor};

/// The token ids of a batch, \[N\], folded where they lie.
#[derive(Clone, Copy, Debug)]
pub enum TokenIds<'a> {
    /// Every value is an id.
    U32(&'a [u32]),
    /// As torch and NumPy have integers: the ids are those in `0..=u32::MAX`.
    I64(&'a [i64]),
}

/// An integer that holds a token's id, or its position.
pub(crate) trait Id:
    Copy + Default + PartialEq + BitOr<Output = Self> + BitXor<Output = Self> + Into<i64> + TryInto<u32>
{
    /// Appends `ids` to `to`; None where one is out of range.
    fn copy(ids: &[Self], to: &mut Vec<u32>) -> Option<()>;
}

impl Id for u32 {
    fn copy(ids: &[Self], to: &mut Vec<u32>) -> Option<()> {
        to.extend_from_slice(ids);
        Some(())
    }
}

impl Id for i64 {
    fn copy(ids: &[Self], to: &mut Vec<u32>) -> Option<()> {
        // All bits of `u32::MAX` are set: ids are in range if and only if all of their bits together are.
        let mut bits = 0;
        to.extend(ids.iter().map(|&id| {
            bits |= id;
            id as u32
        }));
        u32::try_from(bits).is_ok().then_some(())
    }
}
