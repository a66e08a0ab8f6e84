//! The `radix-mlp` command as its users call it, on tiny models that the tests write.
#![cfg(feature = "cli")]

mod embed;
mod fixtures;
mod rerank;
#[cfg(feature = "server")]
mod serve;
mod stats_and_demo;
mod tokenizer;
