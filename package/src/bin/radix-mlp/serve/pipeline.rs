//! The threads that compute batches. One takes them from the queue and prepares them, one has the model, one finishes what
//! the model gave and answers: between two batches the model waits for next to nothing that could be done before or after.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use radix_mlp::{Batch, Tokens};

use super::error::ApiError;
use super::queue::{Answer, Job, Shared, Want};
use super::telemetry;

/// The values of a batch, and what they cost.
pub struct Computed {
    /// For each sequence, those of each of its wants.
    pub values: Vec<Vec<Vec<f32>>>,
    /// Whether what the sequences share was computed once.
    pub folded: bool,
}

/// What the queue feeds. The methods run on different threads, one batch in each of them.
pub trait Compute: Send + Sync + 'static {
    /// A batch as the model takes it.
    type Prepared: Send + 'static;
    /// What the model gives.
    type Outputs: Send + 'static;

    /// Prepares different sequences, in lexicographic order, while the model may have another batch.
    fn prepare(&self, sequences: &[Tokens]) -> anyhow::Result<Self::Prepared>;

    /// Runs the model, for `wants[s]` of sequence s.
    fn run(&self, batch: Self::Prepared, wants: &[Vec<Want>]) -> anyhow::Result<Self::Outputs>;

    /// Makes values of what the model gave, while it may have another batch.
    fn finish(&self, outputs: Self::Outputs, wants: &[Vec<Want>]) -> anyhow::Result<Computed>;
}

/// A batch with those who wait for it.
pub struct Running {
    batch: Batch,
    /// Of each sequence.
    jobs: Vec<Vec<Job>>,
    wants: Vec<Vec<Want>>,
}

/// A batch that the model has computed.
struct Ran<O> {
    running: Running,
    outputs: O,
    begin: Instant,
    inference: Duration,
}

/// Starts the threads. They end when the queue is closed and empty, or one of them dies.
pub fn start<C: Compute>(shared: &Arc<Shared>, compute: C) -> std::io::Result<Vec<JoinHandle<()>>> {
    let compute = Arc::new(compute);
    // The queue gives no more than two batches to prepare before the model has one of them.
    let (prepared, to_run) = channel();
    // Bounded, as outputs take memory.
    let (ran, to_finish) = sync_channel(1);
    Ok(vec![
        spawn("batches", shared, &compute, move |shared, compute| {
            prepare(shared, compute, &prepared);
        })?,
        spawn("model", shared, &compute, move |shared, compute| {
            run(shared, compute, &to_run, &ran);
        })?,
        spawn("answers", shared, &compute, move |_, compute| {
            finish(compute, &to_finish);
        })?,
    ])
}

fn spawn<C: Compute>(
    name: &str,
    shared: &Arc<Shared>,
    compute: &Arc<C>,
    work: impl FnOnce(&Shared, &C) + Send + 'static,
) -> std::io::Result<JoinHandle<()>> {
    let (shared, compute) = (shared.clone(), compute.clone());
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(move || {
        let _ended = Ended(&shared);
        work(&shared, &compute);
    })
}

/// Refuses what waits and what comes when a thread ends, however it does.
struct Ended<'q>(&'q Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.refuse_all();
    }
}

fn prepare<C: Compute>(shared: &Shared, compute: &C, to: &Sender<(Running, C::Prepared)>) {
    while let Some(running) = shared.next_batch() {
        let sequences = running.batch.sequences.iter();
        let sequences: Vec<Tokens> = sequences.map(|s| s.tokens.clone()).collect();
        match attempt(|| compute.prepare(&sequences)) {
            Ok(batch) => {
                if to.send((running, batch)).is_err() {
                    return;
                }
            }
            Err(message) => {
                running.refuse(&message);
                shared.computed();
            }
        }
    }
}

fn run<C: Compute>(
    shared: &Shared,
    compute: &C,
    from: &Receiver<(Running, C::Prepared)>,
    to: &SyncSender<Ran<C::Outputs>>,
) {
    for (running, batch) in from {
        let begin = Instant::now();
        let outputs = attempt(|| compute.run(batch, &running.wants));
        let inference = begin.elapsed();
        shared.computed();
        match outputs {
            Ok(outputs) => {
                let ran = Ran {
                    running,
                    outputs,
                    begin,
                    inference,
                };
                if to.send(ran).is_err() {
                    return;
                }
            }
            Err(message) => running.refuse(&message),
        }
    }
}

fn finish<C: Compute>(compute: &C, from: &Receiver<Ran<C::Outputs>>) {
    for ran in from {
        match attempt(|| compute.finish(ran.outputs, &ran.running.wants)) {
            Ok(computed) => ran.running.answer(computed, ran.begin, ran.inference),
            Err(message) => ran.running.refuse(&message),
        }
    }
}

/// Why it failed, if it did. What a panic leaves behind is not looked at again: every batch starts from the weights.
fn attempt<T>(work: impl FnOnce() -> anyhow::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(made) => made.map_err(|error| format!("{error:#}")),
        Err(_) => Err("the model panicked".to_owned()),
    }
}

impl Running {
    pub fn new(batch: Batch, jobs: Vec<Vec<Job>>) -> Self {
        let wants = jobs.iter();
        let wants = wants.map(|jobs| jobs.iter().map(|job| job.want).collect());
        Self {
            wants: wants.collect(),
            batch,
            jobs,
        }
    }

    fn answer(self, computed: Computed, begin: Instant, inference: Duration) {
        telemetry::batch(&self.batch, computed.folded);
        let sequences = self.jobs.into_iter().zip(computed.values);
        for ((jobs, values), sequence) in sequences.zip(&self.batch.sequences) {
            let length = sequence.tokens.len();
            let mut folded = if computed.folded { sequence.shared } else { 0 };
            for (job, values) in jobs.into_iter().zip(values) {
                let answer = Answer {
                    values,
                    folded,
                    queued: begin - job.since,
                    inference,
                };
                // Nobody to answer any more is nobody's loss.
                let _ = job.reply.send(Ok(answer));
                // Whoever asked for the same tokens gets them for nothing.
                folded = length;
            }
        }
    }

    fn refuse(self, message: &str) {
        tracing::error!("a batch failed: {message}");
        for job in self.jobs.into_iter().flatten() {
            let _ = job.reply.send(Err(ApiError::backend(message)));
        }
    }
}
