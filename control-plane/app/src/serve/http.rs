//! Probes and metrics over plain HTTP.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use lockstep_server::Hub;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use super::metrics;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves until the process ends.
pub(super) async fn serve(listener: TcpListener, hub: Arc<Hub>) {
    if let Err(error) = axum::serve(listener, router(hub)).await {
        tracing::error!(%error, "health and metrics are not served any more");
    }
}

fn router(hub: Arc<Hub>) -> Router {
    let registry = Arc::new(metrics::registry(hub.clone()));
    // Alive is whoever answers. Ready is who serves: not before the source was read once, and
    // not while it goes away. A control plane whose API server is gone goes on serving.
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready).with_state(hub))
        .route("/metrics", get(expose).with_state(registry))
}

async fn ready(State(hub): State<Arc<Hub>>) -> impl IntoResponse {
    match hub.overview().not_serving {
        None => (StatusCode::OK, "ok\n".into()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not serving: {reason}\n")),
    }
}

async fn expose(State(registry): State<Arc<Registry>>) -> impl IntoResponse {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &registry) {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, OPEN_METRICS)], text),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], error.to_string())
        }
    }
}
