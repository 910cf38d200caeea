//! `/healthz`, `/readyz` and `/metrics`.

use std::io;
use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::health::{Loops, Readiness};

/// What the admin pages show.
#[derive(Clone)]
pub struct AdminState {
    /// Conditions of `/readyz`.
    pub readiness: Readiness,
    /// Loops of `/healthz`.
    pub loops: Loops,
    /// `/metrics`; nothing there without it.
    pub metrics: Option<PrometheusHandle>,
}

/// The address is taken or not ours.
#[derive(Debug, thiserror::Error)]
#[error("can't listen on {address} (ROLLCALL_ADMIN_ADDR)")]
pub struct BindError {
    /// Where.
    pub address: SocketAddr,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// Takes the address.
///
/// # Errors
/// See [`BindError`].
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, source })
}

/// Serves until `stop`.
pub async fn serve(listener: TcpListener, state: AdminState, stop: CancellationToken) -> io::Result<()> {
    let router = router(state);
    axum::serve(listener, router).with_graceful_shutdown(async move { stop.cancelled().await }).await
}

/// The pages, for a service that serves them on its own listener too.
pub fn router(state: AdminState) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_page))
        .with_state(state)
}

async fn healthz(State(state): State<AdminState>) -> Response {
    let wedged = state.loops.wedged();
    if wedged.is_empty() {
        return (StatusCode::OK, Json(json!({ "healthy": true }))).into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "healthy": false, "wedged": wedged }))).into_response()
}

async fn readyz(State(state): State<AdminState>) -> Response {
    let waiting_for = state.readiness.waiting_for();
    if waiting_for.is_empty() {
        return (StatusCode::OK, Json(json!({ "ready": true }))).into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false, "waiting_for": waiting_for })))
        .into_response()
}

async fn metrics_page(State(state): State<AdminState>) -> Response {
    match state.metrics {
        Some(metrics) => {
            ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render())
                .into_response()
        }
        None => StatusCode::NOT_FOUND.into_response(),
    }
}
