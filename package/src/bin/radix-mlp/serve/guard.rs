//! What stands between connections and routes: keys, room, time, and the form of errors.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::connection::PATIENCE;
use super::error::ApiError;
use super::telemetry;

/// Whom the server lets in.
pub struct Guard {
    pub api_key: Option<String>,
    pub requests: Arc<Semaphore>,
    /// One permit for each byte of a request in progress.
    pub bytes: Arc<Semaphore>,
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
        let given = given.and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        given.is_some_and(|given| given.ct_eq(key.as_bytes()).into())
    }
}

/// Lets requests with a valid key pass.
pub async fn authorize(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    match guard.knows(&request) {
        true => next.run(request).await,
        false => refuse(request, ApiError::unauthorized()).await,
    }
}

/// Answers before the request is used, but not before it is sent: a client that still sends would
/// find its connection closed, and no answer.
async fn refuse(request: Request, error: ApiError) -> Response {
    let mut body = request.into_body();
    let discard = async { while let Some(Ok(_)) = body.frame().await {} };
    // Whoever takes longer gets the answer now, and a closed connection.
    let _ = tokio::time::timeout(PATIENCE, discard).await;
    error.into_response()
}

/// Room that an answer takes until it is sent, handed over in the extensions of a response.
#[derive(Clone)]
pub struct Room(
    /// Held, never read.
    #[expect(dead_code)]
    Arc<OwnedSemaphorePermit>,
);

impl Room {
    pub fn new(permit: OwnedSemaphorePermit) -> Self {
        Self(Arc::new(permit))
    }
}

/// Lets as many requests pass as there is room for, each for a limited time.
pub async fn admit(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let (size, limit) = (request.body().size_hint(), guard.payload_limit);
    let least = size.lower();
    if least > u64::from(limit) {
        let message = format!("{least} bytes are more than the {limit} of --payload-limit");
        return refuse(request, ApiError::too_large(message)).await;
    }
    // A body that does not tell its size may have any.
    let bytes = size.exact().map_or(limit, |bytes| bytes as u32);
    let requests = guard.requests.clone().try_acquire_owned();
    let bytes = guard.bytes.clone().try_acquire_many_owned(bytes);
    let (Ok(request_permit), Ok(bytes_permit)) = (requests, bytes) else {
        return refuse(
            request,
            ApiError::overloaded("too many requests: try again"),
        )
        .await;
    };
    let answer = tokio::time::timeout(guard.timeout, next.run(request)).await;
    let mut response =
        answer.unwrap_or_else(|_| ApiError::timeout(guard.timeout.as_secs()).into_response());
    let mut rooms = vec![Room::new(request_permit), Room::new(bytes_permit)];
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
