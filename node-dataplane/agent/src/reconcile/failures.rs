//! What is not in force, since when, and when it is tried again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lockstep_client::session::Now;
use lockstep_client::{Failure, FailureReason, InForce};
use lockstep_model::{Key, ServiceKey, State};
use lockstep_view::backend::{FailureKind, ServiceFailure};
use lockstep_view::{Conflict, ForwardingPlan, Surface};

use crate::follow_up::{Complaint, ComplaintKind};

/// The first retry of a Service comes after this long, each further one after twice as long.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(300);
/// A pass names so many Services in the log at most, of each kind.
const LOGGED: usize = 5;

/// Every Service that is not in force as it should be.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// As the backend tells them.
    backend: BTreeMap<ServiceKey, Entry<ServiceFailure>>,
    /// As the plan tells them: parts that another Service has.
    conflicts: BTreeMap<ServiceKey, Entry<Vec<Conflict>>>,
    /// As each of those tells them that follow passes: parts that are not rules.
    complaints: Vec<BTreeMap<ServiceKey, Entry<Complaint>>>,
}

#[derive(Debug)]
struct Entry<T> {
    what: T,
    since: Now,
    attempts: u32,
    /// `None` = no retry would help.
    retry_at: Option<Instant>,
}

impl Failures {
    pub(super) fn len(&self) -> usize {
        let complaints = self.complaints.iter().map(BTreeMap::len);
        self.backend.len() + self.conflicts.len() + complaints.sum::<usize>()
    }

    /// True where the backend does not have the Service in force as planned.
    pub(super) fn has(&self, service: &ServiceKey) -> bool {
        self.backend.contains_key(service)
    }

    /// Takes over the complete list of the `of`th that follows passes. True where the list is
    /// another than before.
    pub(super) fn complained(&mut self, of: usize, complaints: Vec<Complaint>, now: Now) -> bool {
        if self.complaints.len() <= of {
            self.complaints.resize_with(of + 1, BTreeMap::new);
        }
        let mut before = std::mem::take(&mut self.complaints[of]);
        let mut news = 0_usize;
        for what in complaints {
            let known = before.remove(&what.service);
            if known.as_ref().is_none_or(|known| known.what != what) && count(&mut news) {
                tracing::warn!(service = %what.service, cause = what.message, "a part of a Service is not as it should be");
            }
            let (since, attempts) = known.map_or((now, 1), |known| (known.since, known.attempts + 1));
            let key = what.service.clone();
            self.complaints[of].insert(key, Entry { what, since, attempts, retry_at: None });
        }
        if news > LOGGED {
            tracing::warn!(failed = news, "more Services than the log names; every ack does");
        }
        news + before.len() > 0
    }

    /// Takes over the complete list that a pass returned. `tried` tells which Services the pass
    /// was about. True where the list is another than before.
    pub(super) fn passed(
        &mut self,
        failures: Vec<ServiceFailure>,
        tried: impl Fn(&ServiceKey) -> bool,
        now: Now,
    ) -> bool {
        if failures.is_empty() && self.backend.is_empty() {
            return false;
        }
        let (mut news, mut over) = (0_usize, 0_usize);
        let mut before = std::mem::take(&mut self.backend);
        for failure in failures {
            let key = failure.service.clone();
            let entry = match before.remove(&key) {
                Some(known) if !tried(&key) => Entry { what: failure, ..known },
                Some(known) => Entry::tried(failure, known.since, known.attempts + 1, now),
                None => {
                    if count(&mut news) {
                        tracing::warn!(service = %key, kind = ?failure.kind, cause = failure.message, "a Service is not in force as it should be");
                    }
                    Entry::tried(failure, now, 1, now)
                }
            };
            self.backend.insert(key, entry);
        }
        for key in before.keys() {
            if count(&mut over) {
                tracing::info!(service = %key, "a Service that failed is in force");
            }
        }
        if news.max(over) > LOGGED {
            tracing::warn!(failed = news, mended = over, "more Services than the log names; every ack does");
        }
        news + over > 0
    }

    /// Looks at the plan of the Services that changed.
    pub(super) fn planned(&mut self, plan: &ForwardingPlan, changed: &[ServiceKey], now: Now) {
        let (mut news, mut over) = (0_usize, 0_usize);
        for key in changed {
            let conflicts = plan.services.get(key).map(|service| &service.conflicts[..]).unwrap_or_default();
            if conflicts.is_empty() {
                if !self.conflicts.is_empty() && self.conflicts.remove(key).is_some() && count(&mut over) {
                    tracing::info!(service = %key, "the conflict of a Service is over");
                }
                continue;
            }
            let known = self.conflicts.get(key).filter(|entry| entry.what == conflicts);
            if known.is_none() {
                if count(&mut news) {
                    tracing::warn!(service = %key, conflicts = describe(conflicts), "part of a Service belongs to another");
                }
                let entry = Entry { what: conflicts.to_vec(), since: now, attempts: 1, retry_at: None };
                self.conflicts.insert(key.clone(), entry);
            }
        }
        if news.max(over) > LOGGED {
            tracing::warn!(conflicts = news, over, "more conflicts than the log names; every ack does");
        }
    }

    /// Services whose time for a retry has come.
    pub(super) fn due(&self, now: Instant) -> Vec<ServiceKey> {
        let due = |entry: &Entry<ServiceFailure>| entry.retry_at.is_some_and(|at| at <= now);
        self.backend.iter().filter(|(_, entry)| due(entry)).map(|(key, _)| key.clone()).collect()
    }

    /// For an Ack.
    pub(super) fn report(&self, state: &State) -> Vec<Failure> {
        let version = |key: &Key| state.get(key).map(|(version, _)| version);
        let backend = self.backend.iter().map(|(service, entry)| {
            let key = Key::Service(service.clone());
            let (version, failure) = (version(&key), &entry.what);
            Failure {
                version,
                key: Some(key),
                in_force: if failure.previous_in_force { InForce::Previous } else { InForce::Nothing },
                reason: match failure.kind {
                    FailureKind::Unsupported => FailureReason::Unsupported,
                    FailureKind::Kernel => FailureReason::Kernel,
                    FailureKind::Resources => FailureReason::Resources,
                },
                message: failure.message.clone(),
                retrying: entry.retry_at.is_some(),
                attempts: entry.attempts,
                first_seen: entry.since.wall,
            }
        });
        let conflicts = self.conflicts.iter().map(|(service, entry)| {
            let key = Key::Service(service.clone());
            Failure {
                version: version(&key),
                key: Some(key),
                in_force: InForce::Part,
                reason: FailureReason::Conflict,
                message: describe(&entry.what),
                retrying: false,
                attempts: entry.attempts,
                first_seen: entry.since.wall,
            }
        });
        let complaints = self.complaints.iter().flatten().map(|(service, entry)| {
            let key = Key::Service(service.clone());
            Failure {
                version: version(&key),
                key: Some(key),
                in_force: InForce::Part,
                reason: match entry.what.kind {
                    ComplaintKind::Conflict => FailureReason::Conflict,
                    ComplaintKind::Kernel => FailureReason::Kernel,
                },
                message: entry.what.message.clone(),
                retrying: true,
                attempts: entry.attempts,
                first_seen: entry.since.wall,
            }
        });
        backend.chain(conflicts).chain(complaints).collect()
    }
}

impl Entry<ServiceFailure> {
    fn tried(what: ServiceFailure, since: Now, attempts: u32, now: Now) -> Self {
        let wait = FIRST_RETRY.saturating_mul(2u32.saturating_pow(attempts - 1)).min(LAST_RETRY);
        let retry_at = (what.kind != FailureKind::Unsupported).then(|| now.monotonic + wait);
        Self { what, since, attempts, retry_at }
    }
}

/// Counts one more; true while it is to be logged.
fn count(so_far: &mut usize) -> bool {
    *so_far += 1;
    *so_far <= LOGGED
}

/// `10.0.0.1:80/TCP belongs to shop/cart`, for each.
fn describe(conflicts: &[Conflict]) -> String {
    let texts = conflicts.iter().map(|conflict| {
        let place = match conflict.surface {
            Surface::NodePort => {
                format!("node port {}/{} ({:?})", conflict.port, conflict.protocol, conflict.family)
            }
            Surface::ClusterIp(ip) | Surface::ExternalIp(ip) | Surface::LoadBalancerIp(ip) => {
                format!("{}/{}", std::net::SocketAddr::new(ip, conflict.port.get()), conflict.protocol)
            }
        };
        format!("{place} belongs to {}", conflict.owner)
    });
    texts.collect::<Vec<_>>().join("; ")
}
