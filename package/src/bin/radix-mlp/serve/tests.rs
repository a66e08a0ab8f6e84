//! The queue, and the server over it, with a model that fails, panics or is slow.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusBuilder;
use radix_mlp::text::TextEncoder;
use radix_mlp::{Budget, Scheduler, Tokens};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::api::{EmbeddingModel, Info, Input, ModelType};
use super::capacity::Capacity;
use super::connection::{self, Limits};
use super::directory::Prompts;
use super::guard::{Guard, Room};
use super::model::strangers;
use super::pipeline::{Compute, Computed};
use super::queue::{Queue, Want};
use super::routes::App;
use super::tokenize::tokenized;

/// What a test waits for at most.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a token tells the first stage to do; those that tell the next to are as many more.
const PANICS: u32 = 1;
const FAILS: u32 = 2;
const KILLS: u32 = 3;
const STAGES: u32 = 3;
/// Unique tokens of a batch.
const BATCH: u32 = 100;

/// What kills the worker, which makes a message of it outside of all care for panics.
#[derive(Debug)]
struct Deadly;

impl std::fmt::Display for Deadly {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        panic!("no message")
    }
}

impl std::error::Error for Deadly {}

/// A value of a sequence is its first token; each batch waits in the model until it is let go.
struct Scripted {
    prepared: Batches,
    batches: Batches,
    go: Mutex<Receiver<()>>,
}

type Batches = Arc<Mutex<Vec<Vec<Tokens>>>>;

impl Compute for Scripted {
    type Prepared = Vec<Tokens>;
    type Outputs = Vec<Tokens>;

    fn prepare(&self, sequences: &[Tokens]) -> anyhow::Result<Vec<Tokens>> {
        self.prepared.lock().unwrap().push(sequences.to_vec());
        obey(sequences, 0)?;
        Ok(sequences.to_vec())
    }

    fn run(&self, batch: Vec<Tokens>, _: &[Vec<Want>]) -> anyhow::Result<Vec<Tokens>> {
        self.batches.lock().unwrap().push(batch.clone());
        self.go.lock().unwrap().recv().unwrap();
        obey(&batch, 1)?;
        Ok(batch)
    }

    fn finish(&self, outputs: Vec<Tokens>, wants: &[Vec<Want>]) -> anyhow::Result<Computed> {
        obey(&outputs, 2)?;
        let values = outputs.iter().zip(wants);
        let values = values.map(|(tokens, wants)| vec![vec![tokens[0] as f32]; wants.len()]);
        Ok(Computed {
            values: values.collect(),
            folded: true,
        })
    }
}

/// Does what a sequence's first token tells this stage to.
fn obey(sequences: &[Tokens], stage: u32) -> anyhow::Result<()> {
    let told = |what: u32| {
        sequences
            .iter()
            .any(|tokens| tokens[0] == STAGES * stage + what)
    };
    assert!(!told(PANICS), "told to panic");
    anyhow::ensure!(!told(FAILS), "told to fail");
    anyhow::ensure!(!told(KILLS), Deadly);
    Ok(())
}

struct Bench {
    queue: Arc<Queue>,
    prepared: Batches,
    /// Those that the model has had.
    batches: Batches,
    go: Sender<()>,
}

fn bench() -> Bench {
    let (go, wait) = channel();
    let (prepared, batches) = (Batches::default(), Batches::default());
    let model = Scripted {
        prepared: prepared.clone(),
        batches: batches.clone(),
        go: Mutex::new(wait),
    };
    let scheduler = Scheduler::new(Budget::UniqueTokens(BATCH as usize), Duration::ZERO);
    Bench {
        queue: Arc::new(Queue::start(scheduler, model).unwrap()),
        prepared,
        batches,
        go,
    }
}

impl Bench {
    /// Status or value of a sequence of one token.
    fn ask(&self, token: u32) -> tokio::task::JoinHandle<Result<f32, u16>> {
        self.ask_for(vec![vec![token]])
    }

    /// That of the first sequence.
    fn ask_for(&self, sequences: Vec<Vec<u32>>) -> tokio::task::JoinHandle<Result<f32, u16>> {
        let queue = self.queue.clone();
        tokio::spawn(async move {
            let answers = queue.compute(sequences, Want::Logit).await;
            answers
                .map(|answers| answers[0].values[0])
                .map_err(|error| error.status().as_u16())
        })
    }

    /// Until the model has had so many batches.
    async fn until_batches(&self, count: usize) {
        until(&self.batches, count).await;
    }
}

async fn until(batches: &Batches, count: usize) {
    let enough = async {
        while batches.lock().unwrap().len() < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(DEADLINE, enough).await.unwrap();
}

#[tokio::test]
async fn a_batch_that_panics_or_fails_is_answered_and_the_next_one_runs() {
    let bench = bench();
    for stage in 0..STAGES {
        for (told, answer) in [(PANICS, Err(424)), (FAILS, Err(424))] {
            let asked = bench.ask(STAGES * stage + told);
            if stage > 0 {
                bench.go.send(()).unwrap();
            }
            assert_eq!(asked.await.unwrap(), answer);
            assert!(bench.queue.is_alive());
        }
        let asked = bench.ask(17);
        bench.go.send(()).unwrap();
        assert_eq!(asked.await.unwrap(), Ok(17.0));
    }
}

/// What requests share, over the scripted model.
fn app(bench: &Bench) -> App {
    let directory = tempfile::tempdir().unwrap();
    let tokenizer = directory.path().join("tokenizer.json");
    let words = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": null, "padding": null, "truncation": null,
        "model": {"type": "WordLevel", "vocab": {"a": 7}, "unk_token": "a"}}"#;
    std::fs::write(&tokenizer, words).unwrap();
    App {
        queue: bench.queue.clone(),
        encoder: TextEncoder::from_file(&tokenizer).unwrap(),
        prompts: Prompts::default(),
        pair_prompt: None,
        vocab_size: 100,
        compute_type: "cpu",
        info: Info {
            model_id: String::new(),
            model_sha: None,
            model_dtype: "float32",
            model_type: ModelType {
                embedding: Some(EmbeddingModel {
                    pooling: "mean",
                    dimensions: 1,
                }),
                reranker: None,
            },
            max_concurrent_requests: 9,
            max_input_length: 9,
            max_batch_tokens: 9,
            max_batch_requests: None,
            tokenization_workers: 1,
            max_client_batch_size: 9,
            auto_truncate: false,
            version: "",
        },
        tokens: Capacity::new(20, "tokens"),
        values: Capacity::new(9 * 64, "numbers of answers"),
        tokenizing: Arc::new(Semaphore::new(9)),
        tokenizing_bytes: 9,
        metrics: PrometheusBuilder::new().build_recorder().handle(),
    }
}

/// A server on the loopback interface over the scripted model.
async fn serve(bench: &Bench) -> String {
    let guard = Arc::new(Guard {
        api_key: None,
        requests: Arc::new(Semaphore::new(9)),
        bytes: Capacity::new(1000, "bytes"),
        timeout: Duration::from_secs(60),
        payload_limit: 100,
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let limits = Limits {
        connections: 9,
        drain: Duration::from_secs(60),
    };
    let router = super::router(Arc::new(app(bench)), &guard);
    tokio::spawn(connection::serve(
        listener,
        router,
        limits,
        std::future::pending::<()>(),
    ));
    url
}

/// Status and body of an answer; with `ids`, to a request for their embedding.
async fn answer(url: String, ids: Option<u32>) -> (u16, String) {
    let blocking = move || {
        let config = ureq::Agent::config_builder().http_status_as_error(false);
        let agent: ureq::Agent = config.build().into();
        let mut response = match ids {
            Some(id) => agent
                .post(url)
                .send_json(serde_json::json!({"inputs": [[id]]}))
                .unwrap(),
            None => agent.get(url).call().unwrap(),
        };
        (
            response.status().as_u16(),
            response.body_mut().read_to_string().unwrap(),
        )
    };
    tokio::task::spawn_blocking(blocking).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_a_batch_that_panics_get_424_and_others_are_served() {
    let bench = bench();
    let url = serve(&bench).await;
    let embed = |id| answer(format!("{url}/embed"), Some(id));
    let health = || answer(format!("{url}/health"), None);
    for _ in 0..3 {
        bench.go.send(()).unwrap();
    }
    let (status, body) = embed(STAGES + PANICS).await;
    assert_eq!(
        (status, &body[..]),
        (
            424,
            r#"{"error":"the model panicked","error_type":"Backend"}"#
        )
    );
    let (status, body) = embed(STAGES + FAILS).await;
    assert_eq!(
        (status, &body[..]),
        (424, r#"{"error":"told to fail","error_type":"Backend"}"#)
    );
    assert_eq!(embed(17).await, (200, "[[17.0]]".to_owned()));
    assert_eq!(health().await.0, 200);
    bench.queue.close();
    assert_eq!(health().await.0, 503);
    let (status, body) = embed(17).await;
    assert_eq!(status, 503);
    assert!(body.contains(r#""error_type":"Unhealthy""#));
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

/// Different sequences of as many tokens as a batch takes, which share none.
fn full(first: u32) -> Vec<Vec<u32>> {
    (0..2)
        .map(|own| vec![first + own; BATCH as usize / 2])
        .collect()
}

#[tokio::test]
async fn a_full_batch_is_prepared_while_another_is_computed() {
    let bench = bench();
    let mut asked = vec![bench.ask(50)];
    bench.until_batches(1).await;
    // Less than a batch waits for company.
    asked.push(bench.ask(60));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(bench.prepared.lock().unwrap().len(), 1);
    asked.push(bench.ask_for(full(70)));
    until(&bench.prepared, 2).await;
    // Only one.
    asked.push(bench.ask_for(full(80)));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(bench.prepared.lock().unwrap().len(), 2);
    assert_eq!(bench.batches.lock().unwrap().len(), 1);
    for _ in 0..9 {
        bench.go.send(()).unwrap();
    }
    for (asked, value) in asked.into_iter().zip([50.0, 60.0, 70.0, 80.0]) {
        assert_eq!(asked.await.unwrap(), Ok(value));
    }
}

#[tokio::test]
async fn when_a_thread_dies_nobody_waits_for_it() {
    for stage in 0..STAGES {
        let bench = bench();
        let busy = bench.ask(50);
        bench.until_batches(1).await;
        // Full, so that it is prepared while the model is busy.
        let mut deadly = full(70);
        deadly.insert(0, vec![STAGES * stage + KILLS]);
        let killer = bench.ask_for(deadly);
        until(&bench.prepared, 2).await;
        let waiting = bench.ask(15);
        tokio::time::sleep(Duration::from_millis(20)).await;
        for _ in 0..9 {
            // The model may have ended.
            let _ = bench.go.send(());
        }
        let within = |asked| tokio::time::timeout(DEADLINE, asked);
        assert_eq!(within(busy).await.unwrap().unwrap(), Ok(50.0));
        for asked in [killer, waiting] {
            assert_eq!(within(asked).await.unwrap().unwrap(), Err(503));
        }
        let dead = async {
            while bench.queue.is_alive() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(DEADLINE, dead).await.unwrap();
        assert_eq!(within(bench.ask(16)).await.unwrap().unwrap(), Err(503));
        bench.queue.close();
    }
}

#[tokio::test]
async fn a_queue_that_closes_does_not_hold_up_who_asks_for_its_health() {
    let bench = bench();
    let asked = bench.ask(15);
    bench.until_batches(1).await;
    let (queue, closing) = (bench.queue.clone(), bench.queue.clone());
    let closing = std::thread::spawn(move || closing.close());
    tokio::time::sleep(Duration::from_millis(20)).await;
    let health = tokio::task::spawn_blocking(move || queue.is_alive());
    let health = tokio::time::timeout(DEADLINE, health).await;
    bench.go.send(()).unwrap();
    assert!(!health.expect("it waits for the batch").unwrap());
    assert_eq!(asked.await.unwrap(), Ok(15.0));
    closing.join().unwrap();
}

#[test]
fn strangers_are_as_many_tokens_and_share_none() {
    for (tokens, longest, lengths) in [
        (1, 512, vec![1]),
        (512, 512, vec![512]),
        (1100, 512, vec![512, 512, 76]),
    ] {
        let found = strangers(tokens, longest, 1000);
        assert_eq!(found.iter().map(|s| s.len()).collect::<Vec<_>>(), lengths);
        let mut scheduler = Scheduler::new(Budget::UniqueTokens(tokens), Duration::ZERO);
        for sequence in found {
            scheduler.push(sequence, Duration::ZERO);
        }
        let batch = scheduler.next_full().unwrap();
        assert_eq!((batch.tokens, batch.unique_tokens), (tokens, tokens));
    }
    assert_eq!(strangers(100, 10, 3).len(), 3);
}

#[tokio::test]
async fn token_ids_in_progress_are_bounded() {
    let app = app(&bench());
    let max = app.max_length(None);
    let ids = |sequences| Input::IdLists(vec![vec![1; 8]; sequences]);
    let status = |sequences| {
        let tokenized = app.tokenize(ids(sequences), None, max);
        tokenized
            .map(|_| ())
            .map_err(|error| error.status().as_u16())
    };
    assert_eq!(status(3), Err(413));
    let held = app.tokenize(ids(2), None, max).unwrap();
    assert_eq!(status(1), Err(429));
    drop(held);
    assert_eq!(status(2), Ok(()));
}

#[tokio::test]
async fn numbers_of_answers_are_bounded() {
    let app = Capacity::new(100, "numbers of answers");
    let status = |count| app.take(count).map_err(|error| error.status().as_u16());
    assert_eq!(status(101).unwrap_err(), 413);
    let held = status(60).unwrap();
    assert_eq!(status(41).unwrap_err(), 429);
    drop(held);
    assert!(status(100).is_ok());
}

#[tokio::test]
async fn texts_that_nobody_waits_for_keep_their_room_until_they_are_tokens() {
    let app = Arc::new(app(&bench()));
    let requests = Arc::new(Semaphore::new(1));
    let admitted = Room::from([requests.clone().try_acquire_owned().unwrap()]);
    let ((start, started), (go, wait)) = (channel(), channel::<()>());
    let work = move |_: &App| {
        start.send(()).unwrap();
        wait.recv().unwrap();
        Ok(())
    };
    let asked = tokio::spawn(tokenized(app.clone(), 9, admitted, work));
    tokio::task::spawn_blocking(move || started.recv_timeout(DEADLINE).unwrap())
        .await
        .unwrap();
    asked.abort();
    assert!(asked.await.unwrap_err().is_cancelled());
    assert_eq!(requests.available_permits(), 0);
    assert_eq!(app.tokenizing.available_permits(), 0);
    go.send(()).unwrap();
    let free = tokio::time::timeout(DEADLINE, app.tokenizing.acquire_many(9)).await;
    assert_eq!(free.unwrap().unwrap().num_permits(), 9);
    let free = tokio::time::timeout(DEADLINE, requests.acquire()).await;
    assert!(free.unwrap().is_ok());
}

#[tokio::test]
async fn a_closed_queue_answers_what_it_has_and_takes_no_more() {
    let bench = bench();
    let asked = bench.ask(15);
    bench.until_batches(1).await;
    let waiting = bench.ask(16);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let closing = std::thread::spawn({
        let queue = bench.queue.clone();
        move || queue.close()
    });
    bench.go.send(()).unwrap();
    bench.go.send(()).unwrap();
    assert_eq!(asked.await.unwrap(), Ok(15.0));
    assert_eq!(waiting.await.unwrap(), Ok(16.0));
    closing.join().unwrap();
    assert!(!bench.queue.is_alive());
    assert_eq!(bench.ask(17).await.unwrap(), Err(503));
}
