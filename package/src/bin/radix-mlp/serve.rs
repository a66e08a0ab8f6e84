//! `radix-mlp serve`: embeddings and reranking over HTTP, with what clients share computed once.

mod api;
mod capacity;
mod connection;
mod directory;
mod error;
mod guard;
mod model;
mod openapi;
mod pipeline;
mod queue;
mod routes;
mod telemetry;
#[cfg(test)]
mod tests;
mod tokenize;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::IntoResponse;
use axum::{Router, routing};
use clap::builder::{BoolishValueParser, NonEmptyStringValueParser};
use radix_mlp::qwen3::Qwen3Model;
use radix_mlp::text::{TextEncoder, reranker};
use radix_mlp::{Budget, Scheduler};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::trace::TraceLayer;
use tracing_subscriber::EnvFilter;
use utoipa::OpenApi;
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;

use super::embed::PoolingChoice;
use super::engine::{DeviceChoice, FoldChoice, ModelArgs, positive};
use capacity::Capacity;
use directory::{Prompts, Task};
use error::ApiError;
use guard::Guard;
use model::{FoldRule, ServedModel, YesNo};
use queue::Queue;
use routes::App;

/// Inputs of one request.
const MAX_INPUTS: usize = 1 << 16;
/// Bytes of requests in progress.
const MAX_BYTES: u32 = 1 << 27;
/// Tokens of requests in progress: some 30 bytes each in the queue and in a batch's fold.
const MAX_TOKENS: usize = 1 << 24;
/// Numbers in answers: four bytes each, and some 12 as JSON.
const MAX_VALUES: usize = 1 << 25;
/// Tokens of a batch, shared or not, for each of `--max-batch-tokens`: what a shared token takes is
/// 30 bytes and a nanosecond of its fold, next to nothing beside a token that is computed.
const TOKENS_PER_BATCH_TOKEN: usize = 128;
/// Connections for each request that is computed: some are idle.
const CONNECTIONS_PER_REQUEST: usize = 2;

/// Serve embeddings and reranking scores over HTTP
#[derive(clap::Args)]
#[command(after_help = "\
Routes, with the JSON of text-embeddings-inference and OpenAI:
  POST /embed           {\"inputs\": \"…\" or [\"…\", …]} → [[…], …]
  POST /rerank          {\"query\": \"…\", \"texts\": [\"…\", …]} → [{\"index\": 1, \"score\": 0.98}, …]
  POST /v1/embeddings   {\"input\": \"…\" or [\"…\", …]} as OpenAI's clients send it
  POST /tokenize        GET /info /health /metrics /docs

Texts that arrive together and start alike, whoever sends them, are put into one batch, where what
they share is computed once. Answers do not depend on it.

Every option is an environment variable too: --port is RADIX_MLP_PORT. The log follows RUST_LOG.

Examples:
  radix-mlp serve -m Qwen3-Embedding-0.6B
  curl localhost:3000/embed -H 'content-type: application/json' -d '{\"inputs\": \"a text\"}'")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1", env = "RADIX_MLP_HOST")]
    host: IpAddr,

    /// Port to listen on, 0 for any that is free
    #[arg(long, default_value_t = 3000, env = "RADIX_MLP_PORT")]
    port: u16,

    /// Most tokens computed in one batch
    #[arg(long, value_name = "N", default_value_t = 16384, value_parser = positive,
        env = "RADIX_MLP_MAX_BATCH_TOKENS")]
    max_batch_tokens: usize,

    /// Requests in progress; more are answered with 429
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive,
        env = "RADIX_MLP_MAX_CONCURRENT_REQUESTS")]
    max_concurrent_requests: usize,

    /// Most inputs of one request, which may be computed in several batches
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = client_batch,
        env = "RADIX_MLP_MAX_CLIENT_BATCH_SIZE")]
    max_client_batch_size: usize,

    /// Cut texts that are longer than the model's context where a request does not say
    #[arg(long, env = "RADIX_MLP_AUTO_TRUNCATE", value_parser = BoolishValueParser::new())]
    auto_truncate: bool,

    /// How the states of a text's tokens become its embedding [default: what the model's directory
    /// says, or last-token]
    #[arg(long, value_enum, env = "RADIX_MLP_POOLING")]
    pooling: Option<PoolingChoice>,

    /// What the model is served for [default: what its directory says, or any]
    #[arg(long, value_enum, env = "RADIX_MLP_TASK")]
    task: Option<Task>,

    /// Key that clients must send: authorization: Bearer KEY. The environment hides it from `ps`
    #[arg(
        long,
        value_name = "KEY",
        env = "RADIX_MLP_API_KEY",
        value_parser = NonEmptyStringValueParser::new(),
        hide_env_values = true
    )]
    api_key: Option<String>,

    /// What is computed once for every shared prefix
    #[arg(long, value_enum, default_value_t = FoldChoice::Auto, env = "RADIX_MLP_FOLD")]
    fold: FoldChoice,

    /// Fold batches whose unique tokens are at most this part of all: 0 none, 1 all [default: those
    /// that are measured to gain]
    #[arg(long, value_name = "PART", value_parser = part, conflicts_with = "fold",
        env = "RADIX_MLP_THRESHOLD")]
    radix_mlp_threshold: Option<f64>,

    /// Milliseconds that a text waits for others to share its batch, where less than a batch waits
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 2,
        env = "RADIX_MLP_BATCH_WINDOW"
    )]
    batch_window: u64,

    /// Most bytes of a request; larger ones are answered with 413
    #[arg(long, value_name = "BYTES", default_value_t = 2_000_000,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_BYTES)),
        env = "RADIX_MLP_PAYLOAD_LIMIT")]
    payload_limit: u32,

    /// Seconds after which a request that is not answered gets 504
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..),
        env = "RADIX_MLP_REQUEST_TIMEOUT")]
    request_timeout: u64,
}

fn client_batch(text: &str) -> Result<usize, String> {
    match positive(text)? {
        size if size > MAX_INPUTS => Err(format!("must be at most {MAX_INPUTS}")),
        size => Ok(size),
    }
}

fn part(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(part) if (0.0..=1.0).contains(&part) => Ok(part),
        Ok(part) => Err(format!("must be between 0 and 1, got {part}")),
        Err(error) => Err(format!("{error}")),
    }
}

/// All routes behind their guard.
fn router(app: Arc<App>, guard: &Arc<Guard>) -> Router {
    let computing = OpenApiRouter::new()
        .routes(routes!(routes::embed))
        .routes(routes!(routes::rerank))
        .routes(routes!(routes::openai_embeddings))
        .routes(routes!(routes::tokenize))
        // Where clients of Hugging Face's inference API post to.
        .route("/", routing::post(routes::embed))
        // The guard has its own.
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn_with_state(guard.clone(), guard::admit))
        .layer(from_fn_with_state(guard.clone(), guard::authorize))
        .layer(from_fn(guard::count));
    let described = OpenApiRouter::new()
        .routes(routes!(routes::info))
        .layer(from_fn_with_state(guard.clone(), guard::authorize));
    let (router, mut api) = OpenApiRouter::with_openapi(openapi::Api::openapi())
        .merge(computing)
        .merge(described)
        .routes(routes!(routes::health))
        .routes(routes!(routes::metrics))
        .split_for_parts();
    openapi::complete(&mut api);
    let failed =
        |_: Box<dyn std::any::Any + Send>| ApiError::backend("internal error").into_response();
    router
        .with_state(app)
        .merge(SwaggerUi::new("/docs").url("/api-doc/openapi.json", api))
        .layer(CatchPanicLayer::custom(failed))
        .layer(from_fn(guard::shape_errors))
        .layer(TraceLayer::new_for_http())
}

impl Args {
    fn budget(&self) -> Budget {
        match self.radix_mlp_threshold {
            Some(0.0) => Budget::Tokens(self.max_batch_tokens),
            Some(_) => Budget::UniqueTokens(self.max_batch_tokens),
            None => self.fold.budget(self.max_batch_tokens),
        }
    }

    fn rule(&self) -> FoldRule {
        match self.radix_mlp_threshold {
            Some(threshold) => FoldRule::Threshold(threshold),
            None => FoldRule::Choice(self.fold),
        }
    }

    fn guard(&self) -> Guard {
        Guard {
            api_key: self.api_key.clone(),
            requests: Arc::new(Semaphore::new(self.max_concurrent_requests)),
            timeout: Duration::from_secs(self.request_timeout),
            bytes: Capacity::new(MAX_BYTES as usize, "bytes"),
            payload_limit: self.payload_limit,
        }
    }

    fn limits(&self) -> connection::Limits {
        connection::Limits {
            connections: self
                .max_concurrent_requests
                .saturating_mul(CONNECTIONS_PER_REQUEST),
            drain: Duration::from_secs(self.request_timeout),
        }
    }

    fn info(&self, model: &ServedModel, task: Task) -> api::Info {
        let (model_id, model_sha) = directory::name(&self.model.model);
        let config = model.model.config();
        let embedding = api::EmbeddingModel {
            pooling: directory::pooling_name(model.pooling),
            dimensions: config.hidden_size,
        };
        api::Info {
            model_id,
            model_sha,
            model_dtype: self.model.dtype().name(),
            model_type: api::ModelType {
                embedding: (task != Task::Rerank).then_some(embedding),
                reranker: model.answers.map(|_| api::RerankerModel {
                    id2label: [("0".to_owned(), "yes".to_owned())].into(),
                    label2id: [("yes".to_owned(), 0)].into(),
                }),
            },
            max_concurrent_requests: self.max_concurrent_requests,
            max_input_length: config.max_position_embeddings,
            max_batch_tokens: self.max_batch_tokens,
            max_batch_requests: None,
            max_client_batch_size: self.max_client_batch_size,
            auto_truncate: self.auto_truncate,
            tokenization_workers: rayon::current_num_threads(),
            version: env!("CARGO_PKG_VERSION"),
        }
    }

    /// Which routes make sense, and the tokens that score where pairs do.
    fn task(
        &self,
        model: &Qwen3Model,
        encoder: &TextEncoder,
    ) -> anyhow::Result<(Task, Option<YesNo>)> {
        let directory = &self.model.model;
        let task = self.task.map_or_else(|| directory::task(directory), Ok)?;
        let answers = answers(encoder).filter(|_| model.has_head());
        match (task, answers) {
            (Task::Embed, _) => Ok((task, None)),
            (Task::Rerank, None) => bail!(
                "{} is no reranker: it has no LM head or no \"yes\" and \"no\"",
                directory.display()
            ),
            (Task::Any, Some(_)) if self.task.is_none() => {
                tracing::warn!(
                    "the model's directory does not say what it was trained for: it is served for \
                     embeddings and for reranking, one of which is likely to mean nothing (--task)"
                );
                Ok((task, answers))
            }
            _ => Ok((task, answers)),
        }
    }

    fn scheduler(&self) -> Scheduler {
        let tokens = self.max_batch_tokens.saturating_mul(TOKENS_PER_BATCH_TOKEN);
        Scheduler::new(self.budget(), Duration::from_millis(self.batch_window))
            .with_max_tokens(tokens)
    }

    /// Loads the model and starts to compute what is put into the queue.
    fn app(&self) -> anyhow::Result<App> {
        let (model, encoder) = self.model.load()?;
        let prompts = Prompts::load(&self.model.model)?;
        let (task, answers) = self.task(&model, &encoder)?;
        let pooling = match self.pooling {
            Some(pooling) => pooling.into(),
            None => directory::pooling(&self.model.model)?,
        };
        let pair_prompt = answers.map(|_| encoder.prompt(reranker::BEFORE, reranker::AFTER));
        let model = ServedModel {
            model,
            rule: self.rule(),
            batch_tokens: self.max_batch_tokens,
            pooling,
            answers,
        };
        // On a CPU it would take seconds, and memory comes as it is touched.
        let tokens = match self.model.device {
            DeviceChoice::Cpu => 1,
            DeviceChoice::Cuda(_) => self.max_batch_tokens,
        };
        let warm_up = model.warm_up(tokens);
        warm_up
            .with_context(|| format!("the model does not run with a batch of {tokens} tokens"))?;
        let (info, vocab_size) = (self.info(&model, task), model.model.config().vocab_size);
        Ok(App {
            queue: Arc::new(Queue::start(self.scheduler(), model)?),
            encoder,
            prompts,
            pair_prompt: pair_prompt.transpose()?,
            vocab_size,
            compute_type: self.model.device.compute_type(),
            info,
            tokens: Capacity::new(MAX_TOKENS, "tokens"),
            values: Capacity::new(MAX_VALUES, "numbers of answers"),
            tokenizing: Arc::new(Semaphore::new(self.payload_limit as usize)),
            tokenizing_bytes: self.payload_limit as usize,
            metrics: telemetry::install()?,
        })
    }
}

/// The tokens of a reranker's answers, where the vocabulary has them.
fn answers(encoder: &TextEncoder) -> Option<YesNo> {
    let [yes, no] = ["yes", "no"].map(|token| encoder.token_id(token).ok());
    Some(YesNo { yes: yes?, no: no? })
}

/// Ready at the first SIGTERM or Ctrl-C; another one ends the process at once.
fn ended() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            std::process::exit(130);
        });
    })
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let app = Arc::new(args.app()?);
    let guard = Arc::new(args.guard());
    let router = router(app.clone(), &guard);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Connections wait rather than compute, and tokenizers run in parallel by themselves.
        .worker_threads(2)
        .max_blocking_threads(4)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let address = (args.host, args.port);
        let listener = TcpListener::bind(address).await;
        let listener =
            listener.with_context(|| format!("cannot listen on {}:{}", address.0, address.1))?;
        let stop = ended()?;
        println!("listening on http://{}", listener.local_addr()?);
        connection::serve(listener, router, args.limits(), stop).await;
        anyhow::Ok(())
    })?;
    app.queue.close();
    Ok(())
}
