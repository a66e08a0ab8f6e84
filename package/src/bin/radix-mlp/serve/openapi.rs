//! What the routes' descriptions have in common: refusals, headers, keys.

use axum::http::StatusCode;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::Operation;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ContentBuilder, Header, OpenApi, Ref, RefOr, Response, ResponseBuilder};

use super::error::{ErrorBody, OpenAiErrorBody};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "radix-mlp",
        description = "Embeddings and reranking with shared prefixes computed once.",
        license(name = "MIT", identifier = "MIT")
    ),
    components(schemas(ErrorBody, OpenAiErrorBody))
)]
pub struct Api;

const KEY: &str = "key";
const NO_KEY: (StatusCode, &str) = (StatusCode::UNAUTHORIZED, "No API key, or another one");

/// How a route that computes may refuse.
const REFUSALS: [(StatusCode, &str); 10] = [
    (StatusCode::BAD_REQUEST, "Nothing to compute"),
    NO_KEY,
    (StatusCode::REQUEST_TIMEOUT, "The body did not come in time"),
    (
        StatusCode::PAYLOAD_TOO_LARGE,
        "More bytes, inputs or tokens than are taken at once",
    ),
    (
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "A body that is not declared as JSON",
    ),
    (
        StatusCode::UNPROCESSABLE_ENTITY,
        "Not a valid request, or a text too long",
    ),
    (StatusCode::FAILED_DEPENDENCY, "The model failed"),
    (StatusCode::TOO_MANY_REQUESTS, "Too many requests"),
    (StatusCode::SERVICE_UNAVAILABLE, "The model is not running"),
    (StatusCode::GATEWAY_TIMEOUT, "Not done in time"),
];

/// What an answer tells of itself.
const HEADERS: [(&str, Type, &str); 9] = [
    ("x-compute-type", Type::String, "What computed it"),
    (
        "x-compute-characters",
        Type::Integer,
        "Characters of the inputs",
    ),
    ("x-compute-tokens", Type::Integer, "Tokens of the inputs"),
    (
        "x-folded-tokens",
        Type::Integer,
        "Those of them that were computed for another input",
    ),
    (
        "x-total-time",
        Type::Integer,
        "Milliseconds from request to answer",
    ),
    (
        "x-compute-time",
        Type::Integer,
        "The same, as other servers call it",
    ),
    (
        "x-tokenization-time",
        Type::Integer,
        "Milliseconds to make tokens",
    ),
    (
        "x-queue-time",
        Type::Integer,
        "Milliseconds that the request waited",
    ),
    (
        "x-inference-time",
        Type::Integer,
        "Milliseconds that its batch took",
    ),
];

/// Adds to the routes' own descriptions what they share.
pub fn complete(api: &mut OpenApi) {
    let components = api.components.get_or_insert_default();
    let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    components.add_security_scheme(KEY, scheme);
    for (path, item) in &mut api.paths.paths {
        let error = match path.starts_with("/v1/") {
            true => "OpenAiErrorBody",
            false => "ErrorBody",
        };
        if let Some(operation) = &mut item.post {
            guard(operation, &REFUSALS, error);
            if path != "/tokenize"
                && let Some(RefOr::T(answer)) = operation.responses.responses.get_mut("200")
            {
                let headers = HEADERS.map(|(name, kind, text)| (name, header(kind, text)));
                answer
                    .headers
                    .extend(headers.map(|(name, header)| (name.to_owned(), header)));
            }
        }
        if path == "/info"
            && let Some(operation) = &mut item.get
        {
            guard(operation, &[NO_KEY], error);
        }
    }
}

/// Declares a key and refusals.
fn guard(operation: &mut Operation, refusals: &[(StatusCode, &str)], error: &str) {
    operation.security = Some(vec![SecurityRequirement::new(KEY, [""; 0])]);
    let responses = refusals.iter().map(|&(status, text)| {
        let response = RefOr::T(refusal(status, text, error));
        (status.as_str().to_owned(), response)
    });
    operation.responses.responses.extend(responses);
}

fn refusal(status: StatusCode, text: &str, error: &str) -> Response {
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(error)));
    let mut response = ResponseBuilder::new()
        .description(text)
        .content("application/json", content.build())
        .build();
    if status == StatusCode::TOO_MANY_REQUESTS {
        let after = header(Type::Integer, "Seconds after which to try again");
        response.headers.insert("retry-after".to_owned(), after);
    }
    response
}

fn header(kind: Type, text: &str) -> RefOr<Header> {
    let schema = ObjectBuilder::new().schema_type(kind).build();
    let header = HeaderBuilder::new()
        .schema(Some(schema))
        .description(Some(text));
    RefOr::T(header.build())
}
