//! HTTP: the dashboard, the event streams and the API.

mod api;
mod error;
mod openapi;
mod page;
mod params;
mod server;
mod sse;
mod stall;
mod stream;
mod ws;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use rollcall_core::wire::{ApiError, ErrorCode};

pub use error::Failure;
pub use server::{CONNECTIONS_MAX, bind, serve, serve_waiting};

use crate::shared::Shared;

/// Longest a request other than an event stream may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// Every path that is served, but for the ones of the admin address.
pub const PATHS: [&str; 10] = [
    "/",
    "/events",
    "/ws",
    "/api/summary",
    "/api/agents",
    "/api/agents/{id}",
    "/api/executions",
    "/api/executions/{id}",
    "/api/events",
    "/api/openapi.json",
];

/// The whole site.
pub fn router(shared: &Arc<Shared>) -> Router {
    let model = Router::new()
        .route("/api/summary", get(api::summary))
        .route("/api/agents", get(api::agents))
        .route("/api/agents/{id}", get(api::agent))
        .route("/api/executions", get(api::executions))
        .route("/api/executions/{id}", get(api::execution))
        .route("/api/events", get(api::events))
        .route_layer(middleware::from_fn_with_state(shared.clone(), when_ready));
    let short = model
        .route("/", get(page::dashboard))
        .route("/api/openapi.json", get(openapi::document))
        .route_layer(middleware::from_fn(in_time));
    short
        .route("/events", get(sse::events))
        .route("/ws", any(ws::upgrade))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn(with_headers))
        .with_state(shared.clone())
}

/// What is served as long as there is no log to answer from.
fn waiting_router() -> Router {
    Router::new()
        .route("/", get(page::dashboard))
        .fallback(|| async {
            let mut response = Failure::from(ApiError::not_ready("waiting for NATS")).into_response();
            // The next request is for the real site.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            response
        })
        .layer(middleware::from_fn(with_headers))
}

async fn unknown_path(request: Request) -> Failure {
    let path: String = request.uri().path().chars().take(200).collect();
    Failure::from(ApiError::new(ErrorCode::NotFound, format!("there is nothing at {path:?}")))
}

async fn wrong_method(request: Request) -> Response {
    let error = ApiError::bad_request(format!("{} is not offered here, only GET", request.method()));
    let mut response = Failure::with_status(StatusCode::METHOD_NOT_ALLOWED, error).into_response();
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    response
}

async fn when_ready(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    if shared.is_ready() {
        return next.run(request).await;
    }
    let read = shared.feed.head();
    Failure::from(ApiError::not_ready(format!("still reading the log, at sequence {read}"))).into_response()
}

async fn in_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Failure::from(ApiError::unavailable("the log does not answer in time")).into_response(),
    }
}

/// Headers that every answer has: nothing is sniffed, framed or kept, and no other site is told anything.
async fn with_headers(request: Request, next: Next) -> Response {
    let head_or_get = matches!(*request.method(), Method::GET | Method::HEAD);
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    let fixed = [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    for (name, value) in fixed {
        headers.insert(name, HeaderValue::from_static(value));
    }
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    if !head_or_get {
        // Nothing here takes a body: one that comes is not waited for.
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
