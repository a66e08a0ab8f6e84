//! What each route does with its request.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{FromRequest, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use metrics_exporter_prometheus::PrometheusHandle;
use radix_mlp::text::{Prompt, TextEncoder};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::api::{
    EmbedRequest, EncodingFormat, Info, OpenAiEmbedding, OpenAiRequest, OpenAiResponse,
    OpenAiUsage, OpenAiVector, Rank, RerankRequest, TextInput, Token, TokenizeRequest,
    TruncationDirection,
};
use super::error::{ApiError, ErrorBody, OpenAiErrorBody};
use super::guard::Room;
use super::model::Prompts;
use super::queue::{Answer, Queue, Want};
use super::telemetry;
use super::tokenize::{Tokenized, tokenized};

/// What all requests share.
pub struct App {
    pub queue: Arc<Queue>,
    pub encoder: TextEncoder,
    pub prompts: Prompts,
    /// What surrounds a reranker's pairs; `None` where the model cannot score.
    pub pair_prompt: Option<Prompt>,
    pub vocab_size: usize,
    pub info: Info,
    /// One permit for each input whose answer is in memory.
    pub inputs: Arc<Semaphore>,
    /// One permit for each byte that is tokenized: a tokenizer takes some 150 bytes for each.
    pub tokenizing: Semaphore,
    pub tokenizing_bytes: usize,
    pub metrics: PrometheusHandle,
}

/// JSON whose rejection is an [`ApiError`].
#[derive(FromRequest)]
#[from_request(via(Json), rejection(ApiError))]
pub struct Body<T>(T);

/// Answers in the order of the request's inputs.
struct Done {
    answers: Vec<Answer>,
    tokens: usize,
    headers: HeaderMap,
    /// Held until the answer is sent.
    permit: OwnedSemaphorePermit,
}

impl Done {
    /// The values of each input, and what goes with them.
    fn into_parts(self) -> (Vec<Vec<f32>>, Reply) {
        let values = self.answers.into_iter().map(|answer| answer.values);
        (values.collect(), Reply(self.headers, self.permit))
    }
}

/// The headers of an answer, and the room that it takes.
struct Reply(HeaderMap, OwnedSemaphorePermit);

impl Reply {
    fn with<T: serde::Serialize>(self, body: &T) -> Response {
        let mut response = (self.0, Json(body)).into_response();
        response.extensions_mut().insert(Room::new(self.1));
        response
    }
}

impl App {
    fn check_dimensions(&self, dimensions: Option<usize>) -> Result<(), ApiError> {
        let most = self.info.model_type.embedding.dimensions;
        match dimensions {
            Some(wanted) if wanted == 0 || wanted > most => Err(ApiError::validation(format!(
                "dimensions must be between 1 and {most}, got {wanted}"
            ))),
            _ => Ok(()),
        }
    }

    async fn compute(
        &self,
        start: Instant,
        tokenized: Tokenized,
        want: Want,
    ) -> Result<Done, ApiError> {
        let count = tokenized.sequences.len();
        let permit = self.inputs.clone().try_acquire_many_owned(count as u32);
        let permit = permit.map_err(|_| {
            ApiError::overloaded(format!(
                "there is no room for {count} more inputs: try again"
            ))
        })?;
        let tokens = tokenized.sequences.iter().map(Vec::len).sum();
        let answers = self.queue.compute(tokenized.sequences, want).await?;
        let longest =
            |of: fn(&Answer) -> Duration| answers.iter().map(of).max().unwrap_or_default();
        let queued = longest(|answer| answer.queued);
        let inference = longest(|answer| answer.inference);
        telemetry::answered(start.elapsed(), tokenized.time, queued, inference);
        let milliseconds = |time: Duration| time.as_millis() as usize;
        let headers = headers([
            ("x-total-time", milliseconds(start.elapsed())),
            ("x-compute-time", milliseconds(start.elapsed())),
            ("x-compute-characters", tokenized.characters),
            ("x-compute-tokens", tokens),
            (
                "x-folded-tokens",
                answers.iter().map(|answer| answer.folded).sum(),
            ),
            ("x-tokenization-time", milliseconds(tokenized.time)),
            ("x-queue-time", milliseconds(queued)),
            ("x-inference-time", milliseconds(inference)),
        ]);
        Ok(Done {
            answers,
            tokens,
            headers,
            permit,
        })
    }
}

fn headers<const N: usize>(values: [(&'static str, usize); N]) -> HeaderMap {
    let mut headers: HeaderMap = values
        .into_iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from(value)))
        .collect();
    headers.insert("x-compute-type", HeaderValue::from_static("cpu"));
    headers
}

fn check_direction(direction: TruncationDirection) -> Result<(), ApiError> {
    match direction {
        TruncationDirection::Right => Ok(()),
        TruncationDirection::Left => Err(ApiError::validation(
            "truncation_direction \"left\" is not supported: texts are cut at their end",
        )),
    }
}

/// Embeddings of one or several inputs
#[utoipa::path(post, path = "/embed", request_body = EmbedRequest, responses(
    (status = 200, description = "Embeddings, in the order of the inputs", body = Vec<Vec<f32>>),
    (status = 400, description = "Nothing to embed", body = ErrorBody),
    (status = 413, description = "More bytes or inputs than are taken at once", body = ErrorBody),
    (status = 422, description = "Not a valid request, or a text too long", body = ErrorBody),
    (status = 424, description = "The model failed", body = ErrorBody),
    (status = 429, description = "Too many requests", body = ErrorBody),
))]
pub async fn embed(
    State(app): State<Arc<App>>,
    Body(request): Body<EmbedRequest>,
) -> Result<Response, ApiError> {
    let start = Instant::now();
    telemetry::request("embed");
    check_direction(request.truncation_direction)?;
    app.check_dimensions(request.dimensions)?;
    let want = Want::Embedding {
        normalize: request.normalize,
        dimensions: request.dimensions,
    };
    let bytes = request.inputs.bytes();
    let tokenized = tokenized(app.clone(), bytes, move |app| {
        let max = app.max_length(request.truncate);
        app.tokenize(request.inputs, request.prompt_name.as_deref(), max)
    });
    let done = app.compute(start, tokenized.await?, want).await?;
    let (embeddings, reply) = done.into_parts();
    Ok(reply.with(&embeddings))
}

/// How well texts answer a query, best first
#[utoipa::path(post, path = "/rerank", request_body = RerankRequest, responses(
    (status = 200, description = "Texts by falling score", body = Vec<Rank>),
    (status = 400, description = "No texts", body = ErrorBody),
    (status = 413, description = "More bytes or texts than are taken at once", body = ErrorBody),
    (status = 422, description = "Not a valid request, or a pair too long", body = ErrorBody),
    (status = 424, description = "The model failed", body = ErrorBody),
    (status = 429, description = "Too many requests", body = ErrorBody),
))]
pub async fn rerank(
    State(app): State<Arc<App>>,
    Body(request): Body<RerankRequest>,
) -> Result<Response, ApiError> {
    let start = Instant::now();
    telemetry::request("rerank");
    check_direction(request.truncation_direction)?;
    let texts = request.texts.iter().map(String::len);
    let bytes = texts.sum::<usize>() + request.query.len() * request.texts.len();
    let pairs = tokenized(app.clone(), bytes, |app| {
        Ok((app.tokenize_pairs(&request)?, request))
    });
    let (tokenized, mut request) = pairs.await?;
    let done = app.compute(start, tokenized, Want::Score).await?;
    let (scores, reply) = done.into_parts();
    let texts = std::mem::take(&mut request.texts);
    let rank = |(index, (score, text)): (usize, (Vec<f32>, String))| {
        let logit = score[0];
        Rank {
            index,
            score: if request.raw_scores {
                logit
            } else {
                (1.0 + (-logit).exp()).recip()
            },
            text: request.return_text.then_some(text),
        }
    };
    let mut ranks: Vec<Rank> = scores
        .into_iter()
        .zip(texts)
        .enumerate()
        .map(rank)
        .collect();
    ranks.sort_by(|a, b| b.score.total_cmp(&a.score));
    Ok(reply.with(&ranks))
}

/// Embeddings for clients of OpenAI
#[utoipa::path(post, path = "/v1/embeddings", request_body = OpenAiRequest, responses(
    (status = 200, description = "Embeddings, in the order of the inputs", body = OpenAiResponse),
    (status = 400, description = "Nothing to embed", body = OpenAiErrorBody),
    (status = 413, description = "More bytes or inputs than are taken at once", body = OpenAiErrorBody),
    (status = 422, description = "Not a valid request, or a text too long", body = OpenAiErrorBody),
    (status = 424, description = "The model failed", body = OpenAiErrorBody),
    (status = 429, description = "Too many requests", body = OpenAiErrorBody),
))]
pub async fn openai_embeddings(
    State(app): State<Arc<App>>,
    Body(request): Body<OpenAiRequest>,
) -> Result<Response, ApiError> {
    let start = Instant::now();
    telemetry::request("openai");
    app.check_dimensions(request.dimensions)?;
    let want = Want::Embedding {
        normalize: true,
        dimensions: request.dimensions,
    };
    let bytes = request.input.bytes();
    let tokenized = tokenized(app.clone(), bytes, |app| {
        app.tokenize(request.input, None, app.max_length(None))
    });
    let done = app.compute(start, tokenized.await?, want).await?;
    let tokens = done.tokens;
    let (embeddings, reply) = done.into_parts();
    let embedding = |(index, vector): (usize, Vec<f32>)| OpenAiEmbedding {
        object: "embedding",
        embedding: match request.encoding_format {
            EncodingFormat::Float => OpenAiVector::Float(vector),
            EncodingFormat::Base64 => OpenAiVector::Base64(base64(&vector)),
        },
        index,
    };
    Ok(reply.with(&OpenAiResponse {
        object: "list",
        data: embeddings.into_iter().enumerate().map(embedding).collect(),
        model: request.model.unwrap_or_else(|| app.info.model_id.clone()),
        usage: OpenAiUsage {
            prompt_tokens: tokens,
            total_tokens: tokens,
        },
    }))
}

fn base64(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

/// The tokens of texts
#[utoipa::path(post, path = "/tokenize", request_body = TokenizeRequest, responses(
    (status = 200, description = "Tokens of each text", body = Vec<Vec<Token>>),
    (status = 422, description = "Not a valid request", body = ErrorBody),
))]
pub async fn tokenize(
    State(app): State<Arc<App>>,
    Body(request): Body<TokenizeRequest>,
) -> Result<Json<Vec<Vec<Token>>>, ApiError> {
    telemetry::request("tokenize");
    let texts = match request.inputs {
        TextInput::Text(text) => vec![text],
        TextInput::Texts(texts) => texts,
    };
    app.check_count(texts.len())?;
    let prompt = app.prompts.get(request.prompt_name.as_deref());
    let prompt = prompt.map_err(ApiError::validation)?.to_owned();
    let bytes = texts.iter().map(String::len).sum();
    let tokens = tokenized(app.clone(), bytes, move |app| {
        let tokens = |text: String| {
            let tokens = app
                .encoder
                .tokens(&(prompt.clone() + &text), request.add_special_tokens);
            tokens.map(|tokens| tokens.into_iter().map(token).collect())
        };
        let tokens = texts.into_iter().map(tokens).collect::<Result<_, _>>();
        tokens.map_err(|error| ApiError::of_text(&error))
    });
    Ok(Json(tokens.await?))
}

fn token(token: radix_mlp::text::TextToken) -> Token {
    // Special tokens stand for none of the text.
    let place = |place: usize| (!token.special).then_some(place);
    Token {
        start: place(token.characters.start),
        stop: place(token.characters.end),
        id: token.id,
        special: token.special,
        text: token.token,
    }
}

/// What the server runs, and its limits
#[utoipa::path(get, path = "/info", responses((status = 200, body = Info)))]
pub async fn info(State(app): State<Arc<App>>) -> Json<Info> {
    Json(app.info.clone())
}

/// Whether the model answers
#[utoipa::path(get, path = "/health", responses(
    (status = 200, description = "It does"),
    (status = 503, description = "It does not", body = ErrorBody),
))]
pub async fn health(State(app): State<Arc<App>>) -> Result<StatusCode, ApiError> {
    match app.queue.is_alive() {
        true => Ok(StatusCode::OK),
        false => Err(ApiError::unhealthy()),
    }
}

/// Counters, gauges and histograms for Prometheus
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String)))]
pub async fn metrics(State(app): State<Arc<App>>) -> String {
    app.metrics.run_upkeep();
    app.metrics.render()
}
