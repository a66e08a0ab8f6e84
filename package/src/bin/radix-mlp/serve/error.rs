//! What a client is told when a request fails, in the forms of text-embeddings-inference and OpenAI.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use radix_mlp::text::TextError;
use serde::Serialize;
use utoipa::ToSchema;

/// Kinds of errors, by the names that text-embeddings-inference gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub enum ErrorType {
    /// The server cannot answer at all.
    Unhealthy,
    /// The model failed on the batch.
    Backend,
    /// Too much is being computed, or it took too long.
    Overloaded,
    /// The request is not what the route takes.
    Validation,
    /// A text cannot become tokens.
    Tokenizer,
    /// There is nothing to compute.
    Empty,
    /// No API key, or another one.
    Unauthorized,
}

/// An answer that is none.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    status: StatusCode,
    kind: ErrorType,
    message: String,
}

impl ApiError {
    fn new(status: StatusCode, kind: ErrorType, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            status,
            kind,
            message,
        }
    }

    pub fn empty(what: &str) -> Self {
        let message = format!("{what} must not be empty");
        Self::new(StatusCode::BAD_REQUEST, ErrorType::Empty, message)
    }

    pub fn validation(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            ErrorType::Validation,
            message,
        )
    }

    /// More bytes or more inputs than the server takes at once.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            ErrorType::Validation,
            message,
        )
    }

    pub fn overloaded(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            ErrorType::Overloaded,
            message,
        )
    }

    pub fn timeout(time: Duration) -> Self {
        let message = format!("not done within {} s", time.as_secs());
        Self::new(StatusCode::GATEWAY_TIMEOUT, ErrorType::Overloaded, message)
    }

    /// A body that its client does not send.
    pub fn slow(time: Duration) -> Self {
        let message = format!("the body did not come within {} s", time.as_secs());
        Self::new(StatusCode::REQUEST_TIMEOUT, ErrorType::Overloaded, message)
    }

    pub fn backend(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FAILED_DEPENDENCY, ErrorType::Backend, message)
    }

    pub fn unhealthy() -> Self {
        let message = "the model is not running";
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            ErrorType::Unhealthy,
            message,
        )
    }

    pub fn unauthorized() -> Self {
        let message = "a valid API key is needed: authorization: Bearer KEY";
        Self::new(StatusCode::UNAUTHORIZED, ErrorType::Unauthorized, message)
    }

    pub fn of_text(error: &TextError) -> Self {
        match error {
            TextError::Empty => Self::empty("inputs"),
            TextError::TooLong { .. } | TextError::NoRoom { .. } => {
                Self::validation(format!("{error}: shorten it, or set truncate"))
            }
            other => {
                let status = StatusCode::UNPROCESSABLE_ENTITY;
                Self::new(status, ErrorType::Tokenizer, other.to_string())
            }
        }
    }

    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The same error as OpenAI's clients read it.
    pub fn into_openai(self) -> Response {
        let body = OpenAiErrorBody {
            message: self.message,
            code: self.status.as_u16(),
            kind: self.kind,
        };
        answer(self.status, body)
    }
}

/// Seconds after which a client may try again: most requests take less.
const RETRY_AFTER_SECONDS: u16 = 1;

fn answer(status: StatusCode, body: impl Serialize) -> Response {
    let mut response = (status, Json(body)).into_response();
    if status == StatusCode::TOO_MANY_REQUESTS {
        let value = HeaderValue::from(RETRY_AFTER_SECONDS);
        response.headers_mut().insert(RETRY_AFTER, value);
    }
    response
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        let status = match &rejection {
            JsonRejection::JsonSyntaxError(_) => StatusCode::UNPROCESSABLE_ENTITY,
            other => other.status(),
        };
        Self::new(status, ErrorType::Validation, rejection.body_text())
    }
}

/// Errors on the routes of text-embeddings-inference.
#[derive(Serialize, ToSchema)]
pub struct ErrorBody {
    error: String,
    error_type: ErrorType,
}

/// Errors on the routes of OpenAI.
#[derive(Serialize, ToSchema)]
pub struct OpenAiErrorBody {
    message: String,
    code: u16,
    #[serde(rename = "type")]
    kind: ErrorType,
}

impl IntoResponse for ApiError {
    /// Leaves itself in the extensions, from which the routes of OpenAI make their own form.
    fn into_response(self) -> Response {
        let body = ErrorBody {
            error: self.message.clone(),
            error_type: self.kind,
        };
        let mut response = answer(self.status, body);
        response.extensions_mut().insert(self);
        response
    }
}
