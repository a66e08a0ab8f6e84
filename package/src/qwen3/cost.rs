//! What a forward pass costs, to choose whether to fold it.

use super::attention::AttentionPlan;
use super::config::Qwen3Config;
use super::model::FoldLevel;
use crate::Fold;

/// Nanoseconds, as `benchmark/cpu_forward/run.py` fits them to its measurements; only their ratio
/// matters. Its third term, for every range of keys that is read, comes out as zero.
const NS_PER_PROJECTED_FLOP: f64 = 3.44e-3;
const NS_PER_ATTENTION_FLOP: f64 = 4.13e-3;

pub(super) fn choose_level(config: &Qwen3Config, fold: &Fold) -> FoldLevel {
    let cost = |level, rows| nanoseconds(config, &AttentionPlan::new(fold, level), rows);
    let none = cost(FoldLevel::None, fold.num_tokens());
    let full = cost(FoldLevel::Full, fold.num_nodes());
    if full < none {
        FoldLevel::Full
    } else {
        FoldLevel::None
    }
}

/// One layer, whose number is the same at every level.
fn nanoseconds(config: &Qwen3Config, plan: &AttentionPlan, rows: usize) -> f64 {
    let widths = config.qkv_width() + config.attention_width() + 3 * config.intermediate_size;
    let projected = 2.0 * rows as f64 * (widths * config.hidden_size) as f64;
    // Scores and weighted values: two products of head_dim for every pair and query head.
    let attention = 4.0 * plan.pairs() as f64 * config.attention_width() as f64;
    projected * NS_PER_PROJECTED_FLOP + attention * NS_PER_ATTENTION_FLOP
}
