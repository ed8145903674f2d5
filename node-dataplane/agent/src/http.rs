//! Health and metrics, served the way kube-proxy does.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::net::TcpListener;

use crate::metrics::Metrics;
use crate::status::{Snapshot, Status};

/// A port that is taken is tried again after this long.
const BIND_RETRY: Duration = Duration::from_secs(5);

const JSON: [(HeaderName, &str); 2] =
    [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];

/// What `/healthz` and `/livez` answer.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Health {
    /// Now where healthy, else when the kernel was last in sync.
    last_updated: String,
    current_time: String,
    healthy: bool,
    /// The state comes from the disk and no control plane has confirmed it.
    stale: bool,
    /// A control plane is connected. Not part of being healthy.
    connected: bool,
    /// The cluster has no Node object of this agent's name. Not part of being healthy either.
    node_unknown: bool,
    mode: &'static str,
}

/// Health: 200 from the first programming on, 503 before it and while work is stuck.
pub fn health_routes(status: Arc<Status>) -> Router {
    async fn answer(State(status): State<Arc<Status>>) -> Response {
        let (healthy, body) = health(&status.snapshot(), Instant::now(), SystemTime::now());
        let code = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        (code, JSON, body).into_response()
    }
    Router::new().route("/healthz", get(answer)).route("/livez", get(live)).with_state(status)
}

/// Alive means that the loop gets on, also before anything was programmed: a restart does not
/// help against a control plane that cannot be reached.
async fn live(State(status): State<Arc<Status>>) -> Response {
    let snapshot = status.snapshot();
    let now = Instant::now();
    let (_, body) = health(&snapshot, now, SystemTime::now());
    let code = if snapshot.stuck(now) { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (code, JSON, body).into_response()
}

fn health(snapshot: &Snapshot, now: Instant, wall: SystemTime) -> (bool, String) {
    let healthy = snapshot.healthy(now);
    let updated = if healthy { Some(wall) } else { snapshot.programmed };
    let health = Health {
        last_updated: updated.map(timestamp).unwrap_or_default(),
        current_time: timestamp(wall),
        healthy,
        stale: snapshot.stale,
        connected: snapshot.connected,
        node_unknown: snapshot.node_unknown,
        mode: snapshot.mode,
    };
    // Numbers, texts and flags always serialise.
    (healthy, serde_json::to_string(&health).unwrap_or_default())
}

/// `2026-11-21 04:00:00.000 +0000 UTC`, the form of kube-proxy's timestamps.
fn timestamp(at: SystemTime) -> String {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    let millis = since.subsec_millis();
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{millis:03} +0000 UTC")
}

/// Year, month and day of a day since 1970, in the proleptic Gregorian calendar: 400 years have
/// 146,097 days, and years are counted from March so that the leap day comes last.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// What the metrics routes share.
struct Exposition {
    registry: Registry,
    metrics: Metrics,
    status: Arc<Status>,
}

/// `/metrics` and `/proxyMode`.
pub fn metrics_routes(registry: Registry, metrics: Metrics, status: Arc<Status>) -> Router {
    async fn scrape(State(shared): State<Arc<Exposition>>) -> Response {
        shared.metrics.mirror(&shared.status.snapshot(), SystemTime::now());
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &shared.registry) {
            Ok(()) => {
                let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                ([(header::CONTENT_TYPE, kind)], text).into_response()
            }
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    }
    async fn proxy_mode(State(shared): State<Arc<Exposition>>) -> Response {
        let headers = [(header::CONTENT_TYPE, "text/plain"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
        (headers, shared.status.snapshot().mode).into_response()
    }
    Router::new()
        .route("/metrics", get(scrape))
        .route("/proxyMode", get(proxy_mode))
        .route("/healthz", get(|| async { "ok" }))
        .with_state(Arc::new(Exposition { registry, metrics, status }))
}

/// Serves until the process ends. A port that is taken is no reason to stop programming.
pub async fn serve(name: &'static str, address: SocketAddr, routes: Router) {
    let mut reported = false;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                if !std::mem::replace(&mut reported, true) {
                    tracing::error!(%address, %error, "cannot serve {name}, trying again every {} s", BIND_RETRY.as_secs());
                }
                tokio::time::sleep(BIND_RETRY).await;
            }
        }
    };
    tracing::info!(%address, "serving {name}");
    if let Err(error) = run(listener, routes).await {
        tracing::error!(%address, %error, "stopped serving {name}");
    }
}

fn run(listener: TcpListener, routes: Router) -> impl Future<Output = std::io::Result<()>> {
    let serving = axum::serve(listener, routes);
    async move { serving.await }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_calendar_dates() {
        let at = |seconds: u64, millis: u32| {
            timestamp(SystemTime::UNIX_EPOCH + Duration::new(seconds, millis * 1_000_000))
        };
        assert_eq!(at(0, 0), "1970-01-01 00:00:00.000 +0000 UTC");
        assert_eq!(at(951_782_400, 5), "2000-02-29 00:00:00.005 +0000 UTC");
        assert_eq!(at(1_795_233_600, 999), "2026-11-21 04:00:00.999 +0000 UTC");
        assert_eq!(at(4_107_542_399, 0), "2100-02-28 23:59:59.000 +0000 UTC");
        assert_eq!(at(4_107_542_400, 0), "2100-03-01 00:00:00.000 +0000 UTC");
    }

    #[test]
    fn the_health_document_says_what_kube_proxy_says_and_more() {
        let now = Instant::now();
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_233_600);
        let (healthy, body) = health(&Snapshot::default(), now, wall);
        assert!(!healthy && body.contains(r#""healthy":false"#) && body.contains(r#""lastUpdated":"""#));
        let programmed =
            Snapshot { programmed: Some(wall), stale: true, mode: "nftables", ..Snapshot::default() };
        let (healthy, body) = health(&programmed, now, wall);
        assert!(healthy, "losing the control plane does not flip it");
        assert_eq!(
            body,
            r#"{"lastUpdated":"2026-11-21 04:00:00.000 +0000 UTC","currentTime":"2026-11-21 04:00:00.000 +0000 UTC","healthy":true,"stale":true,"connected":false,"nodeUnknown":false,"mode":"nftables"}"#
        );
    }
}
