//! The queue over a model that fails, panics or is slow.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use radix_mlp::{Budget, Scheduler, Tokens};

use super::queue::{Compute, Computed, Queue, Want};

const PANICS: u32 = 1;
const FAILS: u32 = 2;

/// A value of a sequence is its first token; each batch waits until it is let go.
struct Scripted {
    batches: Arc<Mutex<Vec<Vec<Tokens>>>>,
    go: Receiver<()>,
}

impl Compute for Scripted {
    fn compute(&self, sequences: &[Tokens], wants: &[Vec<Want>]) -> anyhow::Result<Computed> {
        self.batches.lock().unwrap().push(sequences.to_vec());
        self.go.recv().unwrap();
        let has = |token| sequences.iter().any(|tokens| tokens[0] == token);
        assert!(!has(PANICS), "told to panic");
        anyhow::ensure!(!has(FAILS), "told to fail");
        let values = sequences.iter().zip(wants);
        let values = values.map(|(tokens, wants)| vec![vec![tokens[0] as f32]; wants.len()]);
        Ok(Computed {
            values: values.collect(),
            folded: true,
        })
    }
}

struct Bench {
    queue: Arc<Queue>,
    batches: Arc<Mutex<Vec<Vec<Tokens>>>>,
    go: Sender<()>,
}

fn bench() -> Bench {
    let (go, wait) = channel();
    let batches = Arc::default();
    let model = Scripted {
        batches: Arc::clone(&batches),
        go: wait,
    };
    let scheduler = Scheduler::new(Budget::UniqueTokens(100), Duration::ZERO);
    Bench {
        queue: Arc::new(Queue::start(scheduler, model).unwrap()),
        batches,
        go,
    }
}

impl Bench {
    /// Status or value of a sequence of one token.
    fn ask(&self, token: u32) -> tokio::task::JoinHandle<Result<f32, u16>> {
        let queue = self.queue.clone();
        tokio::spawn(async move {
            let answers = queue.compute(vec![vec![token]], Want::Score).await;
            answers
                .map(|answers| answers[0].values[0])
                .map_err(|error| error.status().as_u16())
        })
    }

    async fn until_batches(&self, count: usize) {
        while self.batches.lock().unwrap().len() < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

#[tokio::test]
async fn a_batch_that_panics_or_fails_is_answered_and_the_next_one_runs() {
    let bench = bench();
    for (token, answer) in [(PANICS, Err(424)), (FAILS, Err(424)), (7, Ok(7.0))] {
        let asked = bench.ask(token);
        bench.go.send(()).unwrap();
        assert_eq!(asked.await.unwrap(), answer);
        assert!(bench.queue.is_alive());
    }
}

#[tokio::test]
async fn what_arrives_during_a_batch_is_the_next_one() {
    let bench = bench();
    let mut asked = vec![bench.ask(10)];
    bench.until_batches(1).await;
    asked.extend([20, 21, 22, 21].map(|token| bench.ask(token)));
    tokio::time::sleep(Duration::from_millis(20)).await;
    let left = asked.remove(2);
    left.abort();
    assert!(left.await.unwrap_err().is_cancelled());
    bench.go.send(()).unwrap();
    bench.go.send(()).unwrap();
    for (asked, value) in asked.into_iter().zip([10.0, 20.0, 22.0, 21.0]) {
        assert_eq!(asked.await.unwrap(), Ok(value));
    }
    let batches = bench.batches.lock().unwrap();
    let [first, second] = &batches[..] else {
        panic!("{batches:?}")
    };
    assert_eq!(first.len(), 1);
    // 21 was asked for twice, and one of the two left.
    assert_eq!(
        second.iter().map(|tokens| tokens[0]).collect::<Vec<_>>(),
        [20, 21, 22]
    );
}

#[tokio::test]
async fn a_closed_queue_answers_what_it_has_and_takes_no_more() {
    let bench = bench();
    let asked = bench.ask(5);
    bench.until_batches(1).await;
    let waiting = bench.ask(6);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let closing = std::thread::spawn({
        let queue = bench.queue.clone();
        move || queue.close()
    });
    bench.go.send(()).unwrap();
    bench.go.send(()).unwrap();
    assert_eq!(asked.await.unwrap(), Ok(5.0));
    assert_eq!(waiting.await.unwrap(), Ok(6.0));
    closing.join().unwrap();
    assert!(!bench.queue.is_alive());
    assert_eq!(bench.ask(7).await.unwrap(), Err(503));
}
