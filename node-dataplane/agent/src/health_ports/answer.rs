//! What a health-check node port answers, whatever the path and the method.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use lockstep_model::ServiceKey;
use serde::Serialize;
use tokio::sync::oneshot;

use crate::status::Status;

const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// Endpoints of a Service on this node.
#[derive(Debug)]
pub(super) struct Count {
    service: ServiceKey,
    local: AtomicUsize,
}

impl Count {
    pub(super) fn new(service: &ServiceKey) -> Self {
        Self { service: service.clone(), local: AtomicUsize::new(0) }
    }

    pub(super) fn set(&self, local: usize) {
        self.local.store(local, Ordering::Relaxed);
    }
}

/// The document, in kube-proxy's words.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    service: Name<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Debug, Serialize)]
struct Name<'a> {
    namespace: &'a str,
    name: &'a str,
}

/// Answers at one socket until `closed`; connections that are open then are ended in order.
pub(super) async fn serve(
    listener: TcpListener,
    count: Arc<Count>,
    status: Arc<Status>,
    closed: oneshot::Receiver<()>,
) {
    let at = listener.local_addr();
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(service = %count.service, %error, "a health-check node port cannot be served");
            return;
        }
    };
    let service = count.service.clone();
    let routes = Router::new().fallback(answer).with_state((count, status));
    let ended = async move {
        // It is closed by being dropped.
        let _ = closed.await;
    };
    if let Err(error) = axum::serve(listener, routes).with_graceful_shutdown(ended).await {
        tracing::error!(%service, ?at, %error, "stopped serving a health-check node port");
    }
}

async fn answer(State((count, status)): State<(Arc<Count>, Arc<Status>)>) -> Response {
    let local = count.local.load(Ordering::Relaxed);
    let healthy = status.snapshot().healthy(Instant::now());
    let code = if healthy && local > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let document = Document {
        service: Name { namespace: &count.service.namespace, name: &count.service.name },
        local_endpoints: local,
        service_proxy_healthy: healthy,
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (WEIGHT, HeaderValue::from(local)),
    ];
    // Numbers, texts and flags always serialise.
    (code, headers, serde_json::to_string(&document).unwrap_or_default()).into_response()
}
