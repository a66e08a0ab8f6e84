//! What stands between connections and routes: keys, room, time, and the form of errors.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::StatusCode;
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::capacity::Capacity;
use super::connection::PATIENCE;
use super::error::ApiError;
use super::telemetry;

/// Whom the server lets in.
pub struct Guard {
    pub api_key: Option<String>,
    pub requests: Arc<Semaphore>,
    /// For the bytes of bodies, from when they come until their requests are answered.
    pub bytes: Capacity,
    pub timeout: Duration,
    /// Most bytes of a body.
    pub payload_limit: u32,
}

impl Guard {
    fn knows(&self, request: &Request) -> bool {
        let Some(key) = &self.api_key else {
            return true;
        };
        let given = request.headers().get(AUTHORIZATION);
        let Some((scheme, given)) = given.and_then(|value| value.to_str().ok()?.split_once(' '))
        else {
            return false;
        };
        let given = given.trim_start().as_bytes();
        scheme.eq_ignore_ascii_case("Bearer") && given.ct_eq(key.as_bytes()).into()
    }

    /// A request's body, within limits of size and time.
    async fn read(&self, body: &mut Body) -> Result<(Vec<u8>, OwnedSemaphorePermit), ApiError> {
        let size = body.size_hint().lower();
        self.check_size(size)?;
        let mut room = self.bytes.take(0)?;
        let mut read = Vec::new();
        loop {
            let frame = tokio::time::timeout(PATIENCE, body.frame()).await;
            let frame = match frame.map_err(|_| ApiError::slow(PATIENCE))? {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Err(ApiError::validation(error.to_string())),
                None => return Ok((read, room)),
            };
            if let Ok(data) = frame.into_data() {
                self.check_size((read.len() + data.len()) as u64)?;
                self.bytes.extend(&mut room, data.len())?;
                read.extend_from_slice(&data);
            }
        }
    }

    fn check_size(&self, size: u64) -> Result<(), ApiError> {
        let limit = self.payload_limit;
        match size > u64::from(limit) {
            true => Err(ApiError::too_large(format!(
                "{size} bytes are more than the {limit} of --payload-limit"
            ))),
            false => Ok(()),
        }
    }
}

/// Lets requests with a valid key pass.
pub async fn authorize(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    match guard.knows(&request) {
        true => next.run(request).await,
        false => refuse(request.into_body(), ApiError::unauthorized()).await,
    }
}

/// Answers before the request is used, but not before it is sent: a client that still sends would
/// find its connection closed, and no answer.
async fn refuse(mut body: Body, error: ApiError) -> Response {
    let discard = async { while let Some(Ok(_)) = body.frame().await {} };
    // Whoever takes longer gets the answer now, and a closed connection.
    let _ = tokio::time::timeout(PATIENCE, discard).await;
    error.into_response()
}

/// Room that a request or its answer takes, held where either goes: in the extensions of both, and
/// by what is computed for it.
#[derive(Clone)]
pub struct Room(
    #[expect(dead_code, reason = "held until it is dropped")] Arc<[OwnedSemaphorePermit]>,
);

impl<const N: usize> From<[OwnedSemaphorePermit; N]> for Room {
    fn from(permits: [OwnedSemaphorePermit; N]) -> Self {
        Self(Arc::new(permits))
    }
}

/// Lets as many requests pass as there is room for, each for a limited time. Only requests that have
/// come whole take part: one that is slow to come is in nobody's way.
pub async fn admit(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let (parts, mut body) = request.into_parts();
    let read = tokio::time::timeout(guard.timeout, guard.read(&mut body)).await;
    let (bytes, bytes_room) = match read.unwrap_or_else(|_| Err(ApiError::slow(guard.timeout))) {
        Ok(read) => read,
        Err(error) if error.status() == StatusCode::REQUEST_TIMEOUT => {
            return error.into_response();
        }
        Err(error) => return refuse(body, error).await,
    };
    let Ok(request_room) = guard.requests.clone().try_acquire_owned() else {
        return ApiError::overloaded("too many requests: try again").into_response();
    };
    let room = Room::from([request_room, bytes_room]);
    let mut request = Request::from_parts(parts, Body::from(bytes));
    request.extensions_mut().insert(room.clone());
    let answer = tokio::time::timeout(guard.timeout, next.run(request)).await;
    let mut response = answer.unwrap_or_else(|_| ApiError::timeout(guard.timeout).into_response());
    let mut rooms = vec![room];
    rooms.extend(response.extensions_mut().remove::<Room>());
    response.map(|body| {
        Body::new(Held {
            body,
            rest: Bytes::new(),
            rooms,
        })
    })
}

/// Bytes of an answer that are handed to the connection at once.
const CHUNK: usize = 1 << 16;

/// A body that keeps its room until its client has read it, but for what the connection buffers, or
/// is gone.
struct Held {
    body: Body,
    /// What the body has given and the connection has not taken.
    rest: Bytes,
    #[expect(dead_code, reason = "held until it is dropped")]
    rooms: Vec<Room>,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(context))
                .map(|f| f.map(Frame::into_data))
            {
                Some(Ok(Ok(data))) => self.rest = data,
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        let length = self.rest.len().min(CHUNK);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // Asked for before the first frame, when nothing is left over.
        self.body.size_hint()
    }
}

/// Counts requests, however they are answered.
pub async fn count(path: MatchedPath, request: Request, next: Next) -> Response {
    telemetry::request(match path.as_str() {
        "/v1/embeddings" => "openai",
        "/rerank" => "rerank",
        "/tokenize" => "tokenize",
        _ => "embed",
    });
    next.run(request).await
}

/// Counts errors, and gives those on OpenAI's routes the form that its clients read.
pub async fn shape_errors(request: Request, next: Next) -> Response {
    let openai = request.uri().path().starts_with("/v1/");
    let mut response = next.run(request).await;
    if response.status().is_client_error() || response.status().is_server_error() {
        telemetry::failure(response.status().as_u16());
    }
    match response.extensions_mut().remove::<ApiError>() {
        Some(error) if openai => error.into_openai(),
        _ => response,
    }
}
