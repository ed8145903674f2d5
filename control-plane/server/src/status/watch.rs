//! Answers that go on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use lockstep_model::ServiceKey;
use lockstep_store::{Level, Position};
use lockstep_wire::v1;
use tokio::sync::watch::Receiver;
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::{Responses, SAMPLE, nodes, service_key};
use crate::Hub;
use crate::convert;
use crate::hub::{Shared, invalid};

/// Shortest time between two looks at the nodes for one caller: a look is a walk over them.
const SHORTEST: Duration = Duration::from_millis(50);

/// Longest time that a caller can ask for between two looks.
const LONGEST: Duration = Duration::from_secs(3_600);

/// The same for a Wait, as the contract has it.
const WAIT_INTERVAL: Duration = Duration::from_millis(100);

pub(super) fn convergence(
    hub: Arc<Hub>,
    request: &v1::WatchConvergenceRequest,
) -> Responses<v1::WatchConvergenceResponse> {
    let asked = convert::optional_duration(request.min_interval).unwrap_or(Duration::from_secs(1));
    let looks = Looks::new(&hub, asked.clamp(SHORTEST, LONGEST));
    let last = None::<v1::WatchConvergenceResponse>;
    stream::unfold(Some((hub, looks, last)), |state| async move {
        let (hub, mut looks, mut last) = state?;
        loop {
            if let Err(closing) = looks.next().await {
                return Some((Err(closing), None));
            }
            let now = convergence_now(&hub.lock());
            if last.as_ref() != Some(&now) {
                last = Some(now.clone());
                return Some((Ok(now), Some((hub, looks, last))));
            }
        }
    })
    .boxed()
}

fn convergence_now(shared: &Shared) -> v1::WatchConvergenceResponse {
    let head = shared.store.head().seq;
    let counts = shared.nodes.counts(head);
    let laggards = shared.nodes.laggards(head, Instant::now(), SAMPLE);
    v1::WatchConvergenceResponse {
        head: Some(shared.position(head)),
        nodes_expected: counts.expected,
        nodes_received: counts.received,
        nodes_applied: counts.applied,
        nodes_verified: counts.verified,
        nodes_degraded: counts.degraded,
        nodes_disconnected: counts.disconnected,
        last_convergence: shared.nodes.convergence().map(|it| convert::duration(it.took)),
        laggards: laggards.iter().map(|name| name.to_string()).collect(),
    }
}

/// What a Wait waits for.
#[derive(Debug)]
struct Target {
    position: v1::Position,
    service: Option<ServiceKey>,
    level: Level,
}

/// When the caller loses its patience. The transport ends a call that has not begun to answer
/// then, but not one that goes on answering.
pub(super) fn deadline(metadata: &MetadataMap) -> Option<tokio::time::Instant> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let nanos: u64 = match unit {
        "n" => 1,
        "u" => 1_000,
        "m" => 1_000_000,
        "S" => 1_000_000_000,
        "M" => 60_000_000_000,
        "H" => 3_600_000_000_000,
        _ => return None,
    };
    let timeout = Duration::from_nanos(number.parse::<u64>().ok()?.saturating_mul(nanos));
    tokio::time::Instant::now().checked_add(timeout)
}

pub(super) fn wait(
    hub: Arc<Hub>,
    request: &v1::WaitRequest,
    deadline: Option<tokio::time::Instant>,
) -> Result<Responses<v1::WaitResponse>, Status> {
    let target = target(&hub.lock(), request)?;
    let looks = Looks::new(&hub, WAIT_INTERVAL);
    let last = None::<(u32, u32, Vec<String>)>;
    Ok(stream::unfold(Some((hub, looks, target, last)), move |state| async move {
        let (hub, mut looks, target, mut last) = state?;
        loop {
            let overdue = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                look = looks.next() => if let Err(closing) = look {
                    return Some((Err(closing), None));
                },
                () = overdue => return Some((Err(Status::deadline_exceeded("not every node is done")), None)),
            }
            let response = progress(&hub.lock(), &target);
            if response.done {
                return Some((Ok(response), None));
            }
            // Times in it always differ; what counts is who is done.
            let names = response.laggards.iter().map(|node| node.node_name.clone()).collect();
            let now = Some((response.nodes_expected, response.nodes_done, names));
            if last != now {
                last = now;
                return Some((Ok(response), Some((hub, looks, target, last))));
            }
        }
    })
    .boxed())
}

fn target(shared: &Shared, request: &v1::WaitRequest) -> Result<Target, Status> {
    shared.check_serving()?;
    let Position { epoch, seq: head, .. } = shared.store.head();
    if ![0, epoch].contains(&request.epoch) {
        let stated = request.epoch;
        return Err(Status::failed_precondition(format!(
            "epoch: {stated:016x} is not the epoch of this server, {epoch:016x}; was it restarted?"
        )));
    }
    let (seq, service) = match &request.target {
        None => return Err(invalid("target: is missing")),
        Some(v1::wait_request::Target::Seq(0)) => (head, None),
        Some(v1::wait_request::Target::Seq(seq)) if *seq > head => {
            return Err(Status::out_of_range(format!("seq: {seq} is newer than the head, {head}")));
        }
        Some(v1::wait_request::Target::Seq(seq)) => (*seq, None),
        Some(v1::wait_request::Target::Service(service)) => {
            let key = service_key(&service.namespace, &service.name)?;
            let changed = shared.store.last_changed(&key);
            let seq = changed.ok_or_else(|| {
                Status::not_found(format!("service {key}: not found, nor a removal of it that is remembered"))
            })?;
            (seq, Some(key))
        }
    };
    let level = match v1::AckLevel::try_from(request.level) {
        Ok(v1::AckLevel::Received) => Level::Received,
        Ok(v1::AckLevel::Applied) => Level::Applied,
        Ok(v1::AckLevel::Unspecified | v1::AckLevel::Verified) => Level::Verified,
        Err(_) => return Err(invalid(format!("level: {} is not a value this release knows", request.level))),
    };
    Ok(Target { position: shared.position(seq), service, level })
}

fn progress(shared: &Shared, target: &Target) -> v1::WaitResponse {
    let progress = shared.nodes.progress(target.position.seq, target.level, target.service.as_ref(), SAMPLE);
    v1::WaitResponse {
        target: Some(target.position.clone()),
        nodes_expected: progress.expected,
        nodes_done: progress.done,
        laggards: progress
            .laggards
            .iter()
            .map(|name| nodes::laggard(shared, name, target.service.as_ref()))
            .collect(),
        done: progress.done == progress.expected,
    }
}

/// Paces the looks of one caller: the first at once, then whenever something has happened, not
/// more often than the interval.
struct Looks {
    activity: Receiver<u64>,
    closing: Receiver<bool>,
    interval: Duration,
    last: Option<tokio::time::Instant>,
}

impl Looks {
    fn new(hub: &Hub, interval: Duration) -> Self {
        Self { activity: hub.activity(), closing: hub.closing(), interval, last: None }
    }

    /// Fails when the server goes: nothing that happens then is worth waiting for.
    async fn next(&mut self) -> Result<(), Status> {
        let closing = || Status::unavailable("the server is shutting down");
        if let Some(last) = self.last {
            let due = async {
                tokio::time::sleep_until(last + self.interval).await;
                self.activity.changed().await
            };
            tokio::select! {
                changed = due => changed.map_err(|_| closing())?,
                _ = self.closing.wait_for(|closing| *closing) => return Err(closing()),
            }
        }
        self.activity.borrow_and_update();
        self.last = Some(tokio::time::Instant::now());
        Ok(())
    }
}
