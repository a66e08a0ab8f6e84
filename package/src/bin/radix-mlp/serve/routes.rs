//! What each route does with its request.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{FromRequest, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use metrics_exporter_prometheus::PrometheusHandle;
use radix_mlp::text::{Prompt, TextEncoder};
use tokio::sync::Semaphore;

use super::api::{
    EmbedRequest, EncodingFormat, Info, OpenAiEmbedding, OpenAiRequest, OpenAiResponse,
    OpenAiUsage, OpenAiVector, Rank, RerankRequest, TextInput, Token, TokenizeRequest,
    TruncationDirection,
};
use super::capacity::Capacity;
use super::directory::Prompts;
use super::error::{ApiError, ErrorBody};
use super::guard::Room;
use super::queue::{Answer, Queue, Want};
use super::telemetry;
use super::tokenize::{Tokenized, tokenized};

/// What an input takes beside its values, in as many values: its place in the queue, its ticket.
const LEAST_VALUES: usize = 64;

/// What all requests share.
pub struct App {
    pub queue: Arc<Queue>,
    pub encoder: TextEncoder,
    pub prompts: Prompts,
    /// What surrounds a reranker's pairs; `None` where the model cannot score.
    pub pair_prompt: Option<Prompt>,
    pub vocab_size: usize,
    /// What computes, as `x-compute-type` says it.
    pub compute_type: &'static str,
    pub info: Info,
    /// For token ids of requests in progress.
    pub tokens: Capacity,
    /// For the numbers of answers.
    pub values: Capacity,
    /// One permit for each byte that is tokenized: a tokenizer takes some 150 bytes for each.
    pub tokenizing: Arc<Semaphore>,
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
    room: Room,
}

impl Done {
    /// The values of each input, and what goes with them.
    fn into_parts(self) -> (Vec<Vec<f32>>, Reply) {
        let values = self.answers.into_iter().map(|answer| answer.values);
        (values.collect(), Reply(self.headers, self.room))
    }
}

/// The headers of an answer, and the room that it takes.
struct Reply(HeaderMap, Room);

impl Reply {
    fn with<T: serde::Serialize>(self, body: &T) -> Response {
        let mut response = (self.0, Json(body)).into_response();
        response.extensions_mut().insert(self.1);
        response
    }
}

impl App {
    /// Numbers of an embedding, where the model makes embeddings of so many.
    fn dimensions(&self, dimensions: Option<usize>) -> Result<usize, ApiError> {
        let Some(model) = &self.info.model_type.embedding else {
            let message = "the model makes no embeddings: see --task, and model_type of /info";
            return Err(ApiError::validation(message));
        };
        let most = model.dimensions;
        match dimensions {
            Some(wanted) if wanted == 0 || wanted > most => Err(ApiError::validation(format!(
                "dimensions must be between 1 and {most}, got {wanted}"
            ))),
            wanted => Ok(wanted.unwrap_or(most)),
        }
    }

    async fn compute(
        &self,
        start: Instant,
        tokenized: Tokenized,
        want: Want,
        values: usize,
    ) -> Result<Done, ApiError> {
        let count = tokenized.sequences.len();
        let room = self.values.take(count * values.max(LEAST_VALUES))?;
        let tokens = tokenized.sequences.iter().map(Vec::len).sum();
        let answers = self.queue.compute(tokenized.sequences, want).await?;
        drop(tokenized.room);
        let longest =
            |of: fn(&Answer) -> Duration| answers.iter().map(of).max().unwrap_or_default();
        let queued = longest(|answer| answer.queued);
        let inference = longest(|answer| answer.inference);
        telemetry::answered(start.elapsed(), tokenized.time, queued, inference);
        let milliseconds = |time: Duration| time.as_millis() as usize;
        let mut headers = headers([
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
        headers.insert(
            "x-compute-type",
            HeaderValue::from_static(self.compute_type),
        );
        Ok(Done {
            answers,
            tokens,
            headers,
            room: Room::from([room]),
        })
    }
}

fn headers<const N: usize>(values: [(&'static str, usize); N]) -> HeaderMap {
    values
        .into_iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from(value)))
        .collect()
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
))]
pub async fn embed(
    State(app): State<Arc<App>>,
    Extension(admitted): Extension<Room>,
    Body(request): Body<EmbedRequest>,
) -> Result<Response, ApiError> {
    let start = Instant::now();
    check_direction(request.truncation_direction)?;
    let values = app.dimensions(request.dimensions)?;
    let want = Want::Embedding {
        normalize: request.normalize,
        dimensions: request.dimensions,
    };
    let bytes = request.inputs.bytes();
    let tokenized = tokenized(app.clone(), bytes, admitted, move |app| {
        let max = app.max_length(request.truncate);
        app.tokenize(request.inputs, request.prompt_name.as_deref(), max)
    });
    let done = app.compute(start, tokenized.await?, want, values).await?;
    let (embeddings, reply) = done.into_parts();
    Ok(reply.with(&embeddings))
}

/// How well texts answer a query, best first
#[utoipa::path(post, path = "/rerank", request_body = RerankRequest, responses(
    (status = 200, description = "Texts by falling score", body = Vec<Rank>),
))]
pub async fn rerank(
    State(app): State<Arc<App>>,
    Extension(admitted): Extension<Room>,
    Body(request): Body<RerankRequest>,
) -> Result<Response, ApiError> {
    let start = Instant::now();
    check_direction(request.truncation_direction)?;
    let bytes = request.pair_bytes();
    let pairs = tokenized(app.clone(), bytes, admitted, |app| {
        Ok((app.tokenize_pairs(&request)?, request))
    });
    let (tokenized, mut request) = pairs.await?;
    let want = match request.raw_scores {
        true => Want::Logit,
        false => Want::Probability,
    };
    let done = app.compute(start, tokenized, want, 1).await?;
    let (scores, reply) = done.into_parts();
    let texts = std::mem::take(&mut request.texts);
    let rank = |(index, (score, text)): (usize, (Vec<f32>, String))| Rank {
        index,
        score: score[0],
        text: request.return_text.then_some(text),
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
))]
pub async fn openai_embeddings(
    State(app): State<Arc<App>>,
    Extension(admitted): Extension<Room>,
    Body(request): Body<OpenAiRequest>,
) -> Result<Response, ApiError> {
    let start = Instant::now();
    let values = app.dimensions(request.dimensions)?;
    let want = Want::Embedding {
        normalize: true,
        dimensions: request.dimensions,
    };
    let bytes = request.input.bytes();
    let tokenized = tokenized(app.clone(), bytes, admitted, |app| {
        app.tokenize(request.input, None, app.max_length(None))
    });
    let done = app.compute(start, tokenized.await?, want, values).await?;
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
))]
pub async fn tokenize(
    State(app): State<Arc<App>>,
    Extension(admitted): Extension<Room>,
    Body(request): Body<TokenizeRequest>,
) -> Result<Response, ApiError> {
    let texts = match request.inputs {
        TextInput::Text(text) => vec![text],
        TextInput::Texts(texts) => texts,
    };
    app.check_count(texts.len())?;
    let prompt = app.prompts.get(request.prompt_name.as_deref());
    let prompt = prompt.map_err(ApiError::validation)?.to_owned();
    let bytes = texts.iter().map(String::len).sum();
    let tokens = tokenized(app.clone(), bytes, admitted, move |app| {
        app.tokens_of(&prompt, texts, request.add_special_tokens, token)
    });
    let (tokens, room) = tokens.await?;
    Ok(Reply(HeaderMap::new(), Room::from([room])).with(&tokens))
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
