//! Runs arrivals through the scheduler and through first-come batching, for
//! `benchmark/scheduler/simulate.py`.
//!
//! Reads one JSON object from standard input: `sequences` (token ids), `seconds` (when each
//! arrives, ascending), `budget` (tokens of a batch), `window` (seconds), and the cost of a batch,
//! `batch_seconds + token_seconds × rows computed`. Writes one JSON object: for each policy how long
//! each sequence waited for its answer, and what was computed in how many batches. No clock is read.

use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::time::Duration;

use radix_mlp::{Budget, Next, Scheduler, plan_batches};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct Trace {
    sequences: Vec<Vec<u32>>,
    seconds: Vec<f64>,
    budget: usize,
    window: f64,
    batch_seconds: f64,
    token_seconds: f64,
}

/// What a policy computes at a time.
struct Batch {
    members: Vec<usize>,
    rows: usize,
}

/// A queue that is asked for a batch whenever the machine is idle.
trait Policy {
    fn push(&mut self, index: usize, tokens: &[u32], now: f64);
    /// The next batch, or when to ask again.
    fn next(&mut self, now: f64) -> Result<Batch, f64>;
}

/// The oldest sequences, as many as fit; with `fold` their shared tokens count once.
struct FirstCome<'t> {
    trace: &'t Trace,
    fold: bool,
    waiting: VecDeque<usize>,
}

impl FirstCome<'_> {
    fn rows(&self, members: &[usize]) -> usize {
        let sequences: Vec<&[u32]> = members
            .iter()
            .map(|&index| &self.trace.sequences[index][..])
            .collect();
        match self.fold {
            true => plan_batches(&sequences, Budget::UniqueTokens(usize::MAX))[0].unique_tokens,
            false => sequences.iter().map(|sequence| sequence.len()).sum(),
        }
    }
}

impl Policy for FirstCome<'_> {
    fn push(&mut self, index: usize, _: &[u32], _: f64) {
        self.waiting.push_back(index);
    }

    fn next(&mut self, _: f64) -> Result<Batch, f64> {
        let Some(first) = self.waiting.pop_front() else {
            return Err(f64::INFINITY);
        };
        let mut members = vec![first];
        while let Some(&index) = self.waiting.front() {
            members.push(index);
            if self.rows(&members) > self.trace.budget {
                members.pop();
                break;
            }
            self.waiting.pop_front();
        }
        let rows = self.rows(&members);
        Ok(Batch { members, rows })
    }
}

/// The scheduler of this crate.
struct Shared {
    scheduler: Scheduler,
    indices: HashMap<radix_mlp::Ticket, usize>,
}

impl Policy for Shared {
    fn push(&mut self, index: usize, tokens: &[u32], now: f64) {
        let ticket = self
            .scheduler
            .push(tokens.into(), Duration::from_secs_f64(now));
        self.indices.insert(ticket, index);
    }

    fn next(&mut self, now: f64) -> Result<Batch, f64> {
        match self.scheduler.next(Duration::from_secs_f64(now)) {
            Next::Idle => Err(f64::INFINITY),
            // A nanosecond is what rounding to a Duration may lose.
            Next::WaitUntil(due) => Err(due.as_secs_f64() + 1e-9),
            Next::Run(batch) => {
                let tickets = batch
                    .sequences
                    .iter()
                    .flat_map(|sequence| &sequence.tickets);
                Ok(Batch {
                    members: tickets.map(|ticket| self.indices[ticket]).collect(),
                    rows: batch.unique_tokens,
                })
            }
        }
    }
}

#[derive(Serialize)]
struct Outcome {
    /// Seconds from arrival to answer, of each sequence.
    waits: Vec<f64>,
    /// When the last answer was there.
    end: f64,
    batches: usize,
    computed_tokens: usize,
}

fn simulate(trace: &Trace, policy: &mut dyn Policy) -> Outcome {
    let mut outcome = Outcome {
        waits: vec![0.0; trace.sequences.len()],
        end: 0.0,
        batches: 0,
        computed_tokens: 0,
    };
    let (mut arrived, mut answered, mut now) = (0, 0, 0.0);
    while answered < trace.sequences.len() {
        while arrived < trace.seconds.len() && trace.seconds[arrived] <= now {
            policy.push(arrived, &trace.sequences[arrived], trace.seconds[arrived]);
            arrived += 1;
        }
        match policy.next(now) {
            Err(later) => {
                let arrival = trace.seconds.get(arrived).copied().unwrap_or(f64::INFINITY);
                now = later.min(arrival);
            }
            Ok(batch) => {
                now += trace.batch_seconds + trace.token_seconds * batch.rows as f64;
                for &index in &batch.members {
                    outcome.waits[index] = now - trace.seconds[index];
                }
                answered += batch.members.len();
                outcome.batches += 1;
                outcome.computed_tokens += batch.rows;
            }
        }
    }
    outcome.end = now;
    outcome
}

fn main() -> Result<(), Box<dyn Error>> {
    let trace: Trace = serde_json::from_reader(std::io::stdin().lock())?;
    let first_come = |fold| FirstCome {
        trace: &trace,
        fold,
        waiting: VecDeque::new(),
    };
    let window = Duration::from_secs_f64(trace.window);
    let mut shared = Shared {
        scheduler: Scheduler::new(Budget::UniqueTokens(trace.budget), window),
        indices: HashMap::new(),
    };
    let outcomes = HashMap::from([
        ("first-come", simulate(&trace, &mut first_come(false))),
        (
            "first-come, folded",
            simulate(&trace, &mut first_come(true)),
        ),
        ("scheduler", simulate(&trace, &mut shared)),
    ]);
    serde_json::to_writer(std::io::stdout().lock(), &outcomes)?;
    Ok(())
}
