//! A hash of (node, token) that no input can flood.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;

/// Multiply-add-shift with random 128-bit coefficients: the upper 64 bits of
/// `c[0] + c[1] * node + c[2] * token` modulo 2^128. Strongly universal: any two keys that were
/// chosen without knowledge of the coefficients agree in `n` bits with probability 2^-n
/// (Dietzfelbinger, "Universal hashing and k-wise independent random variables via integer
/// arithmetic without primes", STACS 1996). Several times faster than the standard library's hash
/// of the same keys, which is what bounds batches of many short sequences.
#[derive(Clone, Copy)]
pub(crate) struct MultiplyAddShift {
    coefficients: [u128; 3],
}

impl MultiplyAddShift {
    /// The coefficients drawn for this process.
    pub(crate) fn new() -> Self {
        static DRAWN: OnceLock<[u128; 3]> = OnceLock::new();
        let draw = || {
            // The standard library's only source of randomness: a keyed hash, of a counter here.
            let random = RandomState::new();
            let word = |counter: u64| u128::from(random.hash_one(counter));
            [0, 2, 4].map(|counter| word(counter) << 64 | word(counter + 1))
        };
        Self {
            coefficients: *DRAWN.get_or_init(draw),
        }
    }
}

impl BuildHasher for MultiplyAddShift {
    type Hasher = State;

    fn build_hasher(&self) -> State {
        let [sum, of_node, of_token] = self.coefficients;
        State {
            sum,
            of_node,
            of_token,
        }
    }
}

/// The sum so far, and the coefficients of the two words of a `(u32, u64)` key.
pub(crate) struct State {
    sum: u128,
    of_node: u128,
    of_token: u128,
}

impl State {
    fn add(&mut self, coefficient: u128, word: u64) {
        let product = coefficient.wrapping_mul(u128::from(word));
        self.sum = self.sum.wrapping_add(product);
    }
}

impl Hasher for State {
    fn write_u32(&mut self, node: u32) {
        self.add(self.of_node, u64::from(node));
    }

    fn write_u64(&mut self, token: u64) {
        self.add(self.of_token, token);
    }

    /// No part of a `(u32, u64)` key; what the trait asks for.
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.sum = self.sum.wrapping_mul(self.of_token);
            self.add(1, u64::from(byte));
        }
    }

    fn finish(&self) -> u64 {
        (self.sum >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Coefficients without a pattern (digits of pi): with drawn ones a test could fail by chance.
    const HASH: MultiplyAddShift = MultiplyAddShift {
        coefficients: [
            0x243f_6a88_85a3_08d3_1319_8a2e_0370_7344,
            0xa409_3822_299f_31d0_082e_fa98_ec4e_6c89,
            0x4528_21e6_38d0_1377_be54_66cf_34e9_0c6c,
        ],
    };

    /// Keys that differ in few bits, or by multiples of powers of two, are what weak hashes
    /// collide on. Of 2^16 keys in 2^16 buckets a random function fills 1 - 1/e = 63 %.
    #[test]
    fn regular_keys_spread_over_low_and_high_bits() {
        for shift in [0, 8, 16, 32, 40, 48] {
            let hashes: Vec<u64> = (0..1u64 << 16)
                .map(|i| HASH.hash_one((3u32, i << shift)))
                .collect();
            for bits in [0, 48] {
                let buckets: HashSet<u64> = hashes.iter().map(|h| h >> bits & 0xFFFF).collect();
                assert!(buckets.len() > 1 << 13, "shift {shift}: {}", buckets.len());
            }
        }
    }

    #[test]
    fn coefficients_are_drawn_once() {
        let drawn = MultiplyAddShift::new().coefficients;
        assert_eq!(drawn, MultiplyAddShift::new().coefficients);
        assert_ne!(drawn[1] >> 64, drawn[1] & u128::from(u64::MAX));
        assert_ne!(drawn[1], drawn[2]);
    }

    #[test]
    fn node_and_token_both_count() {
        let of = |node: u32, token: u64| HASH.hash_one((node, token));
        assert_ne!(of(0, 1), of(1, 0));
        assert_ne!(of(0, 1), of(0, 2));
        assert_eq!(of(5, 6), of(5, 6));
    }
}
