//! A bar on a terminal, nothing in a pipe.

use std::time::Instant;

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use super::input::Records;

/// What a run has done so far.
#[derive(Clone, Copy, Default)]
pub struct Totals {
    pub texts: u64,
    pub tokens: u64,
    pub computed: u64,
}

pub struct Progress {
    bar: ProgressBar,
    start: Instant,
}

impl Progress {
    pub fn new(records: &Records) -> anyhow::Result<Self> {
        let template = match records.bytes() {
            Some(_) => "{bar:30} {percent:>3}% {binary_bytes}/{binary_total_bytes} {msg} {eta}",
            None => "{spinner} {binary_bytes} {msg} {elapsed}",
        };
        let bar = match records.bytes() {
            Some(bytes) => ProgressBar::new(bytes),
            None => ProgressBar::new_spinner(),
        };
        bar.set_style(ProgressStyle::with_template(template)?);
        Ok(Self {
            bar,
            start: Instant::now(),
        })
    }

    pub fn update(&self, records: &Records, totals: Totals) {
        self.bar.set_position(records.bytes_read());
        let tokens = HumanCount(totals.tokens);
        let computed = HumanCount(totals.computed);
        self.bar
            .set_message(format!("{tokens} tokens, {computed} computed"));
    }

    /// Clears the bar and says on standard error what was done.
    pub fn finish(&self, done: &str, totals: Totals) {
        self.bar.finish_and_clear();
        let Totals {
            texts,
            tokens,
            computed,
        } = totals;
        let compression = tokens as f64 / computed.max(1) as f64;
        eprintln!(
            "{done} {} texts: {} tokens, {} computed ({compression:.2}×), {:.1} s",
            HumanCount(texts),
            HumanCount(tokens),
            HumanCount(computed),
            self.start.elapsed().as_secs_f64()
        );
    }
}
