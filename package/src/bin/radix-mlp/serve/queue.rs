//! The sequences that wait, and the batches that they become.

use std::collections::HashMap;
use std::mem::take;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use radix_mlp::{Batch, Next, Scheduler, Ticket};
use tokio::sync::oneshot;

use super::error::ApiError;
use super::pipeline::{self, Compute, Running};
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

/// A sequence's embedding or its score, and how it came about.
#[derive(Clone, Debug)]
pub struct Answer {
    pub values: Vec<f32>,
    /// Tokens of the sequence that were computed for another one.
    pub folded: usize,
    pub queued: Duration,
    pub inference: Duration,
}

/// Somebody who waits for a sequence.
pub struct Job {
    pub want: Want,
    pub since: Instant,
    pub reply: oneshot::Sender<Result<Answer, ApiError>>,
}

struct State {
    scheduler: Scheduler,
    jobs: HashMap<Ticket, Job>,
    /// Batches that were taken, and that the model has not computed yet.
    taken: usize,
    closed: bool,
}

/// What waits, and the news of it for the thread that makes batches.
pub struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    start: Instant,
}

/// Where requests put their sequences.
pub struct Queue {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Queue {
    pub fn start(scheduler: Scheduler, compute: impl Compute) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                scheduler,
                jobs: HashMap::new(),
                taken: 0,
                closed: false,
            }),
            changed: Condvar::new(),
            start: Instant::now(),
        });
        let threads = Mutex::new(pipeline::start(&shared, compute)?);
        Ok(Self { shared, threads })
    }

    /// Whether sequences are still computed.
    pub fn is_alive(&self) -> bool {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        !threads.is_empty() && threads.iter().all(|thread| !thread.is_finished())
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
            // A thread that dies drops the senders of all that it has not answered.
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
        self.shared.changed.notify_one();
        Ok((pending, replies))
    }

    /// Computes what waits, and ends. Nothing is taken from now on.
    pub fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_one();
        // The lock is free again while they end: whoever asks whether they live has an answer.
        let threads = take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // One that panicked has nothing left to say.
            let _ = thread.join();
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

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a batch; `None` when the queue is closed and empty. While the model has one, there is another only where
    /// as much waits as it takes: of what comes meanwhile, little could have joined it.
    pub fn next_batch(&self) -> Option<Running> {
        let mut state = self.lock();
        loop {
            if state.closed && state.scheduler.is_empty() {
                return None;
            }
            let now = self.start.elapsed();
            let next = match state.taken {
                0 => state.scheduler.next(now),
                1 => state.scheduler.next_full().map_or(Next::Idle, Next::Run),
                _ => Next::Idle,
            };
            state = match next {
                Next::Run(batch) => return Some(state.take(batch)),
                Next::Idle => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Next::WaitUntil(due) => {
                    let waited = self.changed.wait_timeout(state, due.saturating_sub(now));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// A batch has left the model, or never came to it.
    pub fn computed(&self) {
        self.lock().taken -= 1;
        self.changed.notify_one();
    }

    /// Nothing is computed any more.
    pub fn refuse_all(&self) {
        let mut state = self.lock();
        state.closed = true;
        for ticket in take(&mut state.jobs).into_keys() {
            state.scheduler.cancel(ticket);
        }
        telemetry::queue_length(0);
        drop(state);
        self.changed.notify_one();
    }
}

impl State {
    /// The batch with those who wait for it.
    fn take(&mut self, batch: Batch) -> Running {
        let mut jobs =
            |tickets: &[Ticket]| tickets.iter().filter_map(|t| self.jobs.remove(t)).collect();
        let jobs = batch.sequences.iter().map(|s| jobs(&s.tickets)).collect();
        telemetry::queue_length(self.jobs.len());
        self.taken += 1;
        Running::new(batch, jobs)
    }
}
