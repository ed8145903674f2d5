//! Health and metrics, served the way kube-proxy does.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use lockstep_model::Family;
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::net::TcpListener;

use crate::metrics::Metrics;
use crate::status::{Snapshot, Status};

/// A port that is taken is tried again after this long.
const BIND_RETRY: Duration = Duration::from_secs(5);

const JSON: [(HeaderName, &str); 2] =
    [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];

/// What `/healthz` and `/livez` answer: kube-proxy's document, and what is ours.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Health {
    #[serde(flatten)]
    overall: Freshness,
    current_time: String,
    /// Load balancers may use this node; `/healthz` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    /// By family. They are programmed in one pass, so they agree.
    status: BTreeMap<&'static str, Freshness>,
    /// The state comes from the disk and no control plane has confirmed it.
    stale: bool,
    /// A control plane is connected. Not part of being healthy.
    connected: bool,
    /// The cluster has no Node object of this agent's name.
    node_unknown: bool,
    mode: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct Freshness {
    /// Now where healthy, else when the kernel was last in sync.
    last_updated: String,
    healthy: bool,
}

/// Which question is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probe {
    /// May load balancers send here? 200 from the first programming on, 503 before it, while
    /// work is stuck, and while the node is on its way out.
    Healthz,
    /// Would a restart help? 503 while work is stuck. Not before the first programming: a
    /// restart does not help against a control plane that cannot be reached.
    Livez,
}

/// Health of an agent that programs `families`.
pub fn health_routes(status: Arc<Status>, families: &[Family]) -> Router {
    let families: Arc<[Family]> = families.into();
    let answer = move |probe: Probe| {
        let (status, families) = (status.clone(), families.clone());
        get(move || async move {
            let (good, body) =
                health(probe, &status.snapshot(), &families, Instant::now(), SystemTime::now());
            let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            (code, JSON, body).into_response()
        })
    };
    Router::new().route("/healthz", answer(Probe::Healthz)).route("/livez", answer(Probe::Livez))
}

fn health(
    probe: Probe,
    snapshot: &Snapshot,
    families: &[Family],
    now: Instant,
    wall: SystemTime,
) -> (bool, String) {
    let healthy = snapshot.healthy(now);
    let good = match probe {
        Probe::Healthz => healthy && snapshot.eligible,
        Probe::Livez => !snapshot.stuck(now),
    };
    let updated = if healthy { Some(wall) } else { snapshot.programmed };
    let overall = Freshness { last_updated: updated.map(timestamp).unwrap_or_default(), healthy };
    let word = |family: &Family| match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    let health = Health {
        current_time: timestamp(wall),
        node_eligible: (probe == Probe::Healthz).then_some(snapshot.eligible),
        status: families.iter().map(|family| (word(family), overall.clone())).collect(),
        overall,
        stale: snapshot.stale,
        connected: snapshot.connected,
        node_unknown: snapshot.node_unknown,
        mode: snapshot.mode,
    };
    // Numbers, texts and flags always serialise.
    (good, serde_json::to_string(&health).unwrap_or_default())
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

    fn wall() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_233_600)
    }

    fn programmed() -> Snapshot {
        Snapshot { programmed: Some(wall()), eligible: true, mode: "nftables", ..Snapshot::default() }
    }

    #[test]
    fn the_health_document_says_what_kube_proxy_says_and_more() {
        let (now, both) = (Instant::now(), Family::ALL);
        let (good, body) = health(Probe::Healthz, &Snapshot::default(), &both, now, wall());
        assert!(!good && body.contains(r#""healthy":false"#) && body.contains(r#""lastUpdated":"""#));
        let stale = Snapshot { stale: true, ..programmed() };
        let (good, body) = health(Probe::Healthz, &stale, &both, now, wall());
        assert!(good, "losing the control plane does not flip it");
        let of = r#""lastUpdated":"2026-11-21 04:00:00.000 +0000 UTC","healthy":true"#;
        let expected = format!(
            r#"{{{of},"currentTime":"2026-11-21 04:00:00.000 +0000 UTC","nodeEligible":true,"status":{{"IPv4":{{{of}}},"IPv6":{{{of}}}}},"stale":true,"connected":false,"nodeUnknown":false,"mode":"nftables"}}"#
        );
        assert_eq!(body, expected);
        let (_, body) = health(Probe::Livez, &stale, &[Family::V4], now, wall());
        assert!(!body.contains("nodeEligible") && !body.contains("IPv6"), "{body}");
    }

    #[test]
    fn a_node_on_its_way_out_is_alive_and_not_for_load_balancers() {
        let now = Instant::now();
        let leaving = Snapshot { eligible: false, ..programmed() };
        let (good, body) = health(Probe::Healthz, &leaving, &[Family::V4], now, wall());
        assert!(
            !good && body.contains(r#""nodeEligible":false"#) && body.contains(r#""healthy":true"#),
            "{body}"
        );
        assert!(health(Probe::Livez, &leaving, &[Family::V4], now, wall()).0);
        let stuck = Snapshot { pending_since: Some(now), ..programmed() };
        let later = now + crate::status::STUCK + Duration::from_millis(1);
        for probe in [Probe::Healthz, Probe::Livez] {
            assert!(health(probe, &stuck, &[Family::V4], now, wall()).0);
            assert!(!health(probe, &stuck, &[Family::V4], later, wall()).0);
        }
    }
}
