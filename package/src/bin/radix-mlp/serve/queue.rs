//! The sequences that wait, and the thread that computes them batch by batch.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use radix_mlp::{Batch, Next, Scheduler, Ticket, Tokens};
use tokio::sync::oneshot;

use super::error::ApiError;
use super::telemetry;

/// What becomes of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Want {
    Embedding {
        normalize: bool,
        dimensions: Option<usize>,
    },
    /// By how much its logit of "yes" exceeds that of "no".
    Logit,
    /// The probability of "yes" against "no".
    Probability,
}

/// The values of a batch, and what they cost.
pub struct Computed {
    /// For each sequence, those of each of its wants.
    pub values: Vec<Vec<Vec<f32>>>,
    /// Whether what the sequences share was computed once.
    pub folded: bool,
}

/// What the queue feeds.
pub trait Compute: Send + 'static {
    /// Computes different sequences, in lexicographic order, `wants[s]` of sequence s.
    fn compute(&self, sequences: &[Tokens], wants: &[Vec<Want>]) -> anyhow::Result<Computed>;
}

/// A sequence's embedding or its score, and how it came about.
#[derive(Clone, Debug)]
pub struct Answer {
    pub values: Vec<f32>,
    /// Tokens of the sequence that were computed for another one.
    pub folded: usize,
    pub queued: Duration,
    pub inference: Duration,
}

struct Job {
    want: Want,
    since: Instant,
    reply: oneshot::Sender<Result<Answer, ApiError>>,
}

struct State {
    scheduler: Scheduler,
    jobs: HashMap<Ticket, Job>,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    arrived: Condvar,
    start: Instant,
}

/// Where requests put their sequences.
pub struct Queue {
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl Queue {
    pub fn start(scheduler: Scheduler, compute: impl Compute) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                scheduler,
                jobs: HashMap::new(),
                closed: false,
            }),
            arrived: Condvar::new(),
            start: Instant::now(),
        });
        let worker = std::thread::Builder::new()
            .name("model".to_owned())
            .spawn({
                let shared = shared.clone();
                move || {
                    let _ended = Ended(&shared);
                    while let Some(running) = shared.next_batch() {
                        running.compute(&compute);
                    }
                }
            })?;
        Ok(Self {
            shared,
            worker: Mutex::new(Some(worker)),
        })
    }

    /// Whether sequences are still computed.
    pub fn is_alive(&self) -> bool {
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        worker.as_ref().is_some_and(|worker| !worker.is_finished())
    }

    /// Waits for the values of `sequences`, in their order. Dropped before, it takes those that still
    /// wait out of the queue.
    pub async fn compute(
        &self,
        sequences: Vec<Vec<u32>>,
        want: Want,
    ) -> Result<Vec<Answer>, ApiError> {
        let (pending, replies) = self.submit(sequences, want)?;
        let mut answers = Vec::with_capacity(replies.len());
        for reply in replies {
            // A worker that ends drops the senders of all that it has not answered.
            answers.push(reply.await.map_err(|_| ApiError::unhealthy())??);
        }
        drop(pending);
        Ok(answers)
    }

    /// Puts all sequences into the queue at once, so that none is computed before the others came.
    fn submit(
        &self,
        sequences: Vec<Vec<u32>>,
        want: Want,
    ) -> Result<(Pending<'_>, Vec<Reply>), ApiError> {
        let mut pending = Pending {
            shared: &self.shared,
            tickets: Vec::with_capacity(sequences.len()),
        };
        let mut replies = Vec::with_capacity(sequences.len());
        let mut state = self.shared.lock();
        if state.closed {
            return Err(ApiError::unhealthy());
        }
        let (since, now) = (Instant::now(), self.shared.start.elapsed());
        for tokens in sequences {
            let ticket = state.scheduler.push(tokens.into(), now);
            let (reply, answer) = oneshot::channel();
            state.jobs.insert(ticket, Job { want, since, reply });
            pending.tickets.push(ticket);
            replies.push(answer);
        }
        telemetry::queue_length(state.jobs.len());
        drop(state);
        self.shared.arrived.notify_one();
        Ok((pending, replies))
    }

    /// Computes what waits, and ends. Nothing is taken from now on.
    pub fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.arrived.notify_one();
        let worker = self
            .worker
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(worker) = worker {
            // A worker that panicked has nothing left to say.
            let _ = worker.join();
        }
    }
}

type Reply = oneshot::Receiver<Result<Answer, ApiError>>;

/// The sequences of a request that may still wait; dropped, they don't.
struct Pending<'q> {
    shared: &'q Shared,
    tickets: Vec<Ticket>,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        for &ticket in &self.tickets {
            if state.jobs.remove(&ticket).is_some() {
                state.scheduler.cancel(ticket);
            }
        }
        telemetry::queue_length(state.jobs.len());
    }
}

/// Refuses what waits and what comes when the worker ends, however it does.
struct Ended<'q>(&'q Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed = true;
        state.jobs.clear();
        telemetry::queue_length(0);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a batch; `None` when the queue is closed and empty.
    fn next_batch(&self) -> Option<Running> {
        let mut state = self.lock();
        loop {
            let now = self.start.elapsed();
            state = match state.scheduler.next(now) {
                Next::Run(batch) => return Some(state.take(batch)),
                Next::Idle if state.closed => return None,
                Next::Idle => self
                    .arrived
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Next::WaitUntil(due) => {
                    let waited = self.arrived.wait_timeout(state, due.saturating_sub(now));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl State {
    /// The batch with those who wait for it.
    fn take(&mut self, batch: Batch) -> Running {
        let mut jobs =
            |tickets: &[Ticket]| tickets.iter().filter_map(|t| self.jobs.remove(t)).collect();
        let jobs = batch.sequences.iter().map(|s| jobs(&s.tickets)).collect();
        telemetry::queue_length(self.jobs.len());
        Running { batch, jobs }
    }
}

struct Running {
    batch: Batch,
    jobs: Vec<Vec<Job>>,
}

impl Running {
    /// Answers everybody, with an error where the model fails or panics.
    fn compute(self, compute: &impl Compute) {
        let Self { batch, jobs } = self;
        let sequences: Vec<Tokens> = batch.sequences.iter().map(|s| s.tokens.clone()).collect();
        let wants: Vec<Vec<Want>> = jobs
            .iter()
            .map(|jobs| jobs.iter().map(|job| job.want).collect())
            .collect();
        let begin = Instant::now();
        // What a panic leaves behind is not looked at again: every batch starts from the weights.
        let computed = catch_unwind(AssertUnwindSafe(|| compute.compute(&sequences, &wants)));
        let inference = begin.elapsed();
        let computed = match computed {
            Ok(Ok(computed)) => computed,
            Ok(Err(error)) => return refuse(jobs, &format!("{error:#}")),
            Err(_) => return refuse(jobs, "the model panicked"),
        };
        telemetry::batch(&batch, computed.folded);
        let sequences = jobs.into_iter().zip(computed.values).zip(&batch.sequences);
        for ((jobs, values), sequence) in sequences {
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
}

fn refuse(jobs: Vec<Vec<Job>>, message: &str) {
    tracing::error!("a batch failed: {message}");
    for job in jobs.into_iter().flatten() {
        let _ = job.reply.send(Err(ApiError::backend(message)));
    }
}
