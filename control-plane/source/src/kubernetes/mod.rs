//! The Kubernetes API as the source.
//!
//! ```text
//! watch of Services ───────┐
//! watch of EndpointSlices ─┼─> one channel ─> convert, track, batch what is ready ─> events
//! watch of Nodes ──────────┤
//! watch of ServiceCIDRs ───┘
//! ```
//!
//! The API server leaves out what is not for us: Services and slices labelled as headless or
//! as another proxy's, and headless Services. A Service that gets such a label therefore
//! arrives as a deletion.
//!
//! ServiceCIDRs are read where the API server has them and lets us: networking.k8s.io/v1 came with
//! Kubernetes 1.33. Where it has none or refuses them, everything else goes on at once. Where their
//! list fails or hangs, it goes on a few seconds after the other lists: a control plane that
//! starts again beside a list that is only slower would take the ServiceCIDRs off every node and
//! put them back. Whenever the list comes, it is taken in.

#[cfg(test)]
mod tests;
mod watch;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use lockstep_model::Interner;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use self::watch::{News, Signal, Watch};
use crate::Event;
use crate::convert::{self, Conversion, Outcome};
use crate::intake::{Batch, Object, Reading, Tracker};

pub use kube::Client;

/// The EndpointSlice controller's word on when the change happened that a slice shows.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const NOT_OURS: &str = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";
const NOT_HEADLESS: &str = "spec.clusterIP!=None";

/// Signals between the watches and the batch, and most of them in one batch.
const SIGNALS: usize = 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// [`Event::Alive`] is told at most this often.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// How long a list that the state is complete without is waited for, from when all others are there:
/// more than the longest backoff between two requests of it.
const OPTIONAL_PATIENCE: Duration = Duration::from_secs(8);
/// Names nobody uses any more are dropped after so many deletions.
const SHRINK_AFTER: u32 = 10_000;

/// Why there is no way to the API server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Neither `$KUBECONFIG`, nor `~/.kube/config`, nor a pod's service account can be used.
    #[error("configuration of the Kubernetes client: {0}")]
    Infer(#[source] Box<kube::config::InferConfigError>),
    /// The kubeconfig cannot be used.
    #[error("kubeconfig {path}: {source}")]
    Kubeconfig {
        /// The file.
        path: std::path::PathBuf,
        /// Why not.
        source: Box<kube::config::KubeconfigError>,
    },
    /// No client could be made from the configuration.
    #[error("Kubernetes client: {0}")]
    Client(#[source] Box<kube::Error>),
}

/// A client for the cluster of `kubeconfig` (its current context); `None` = what `$KUBECONFIG`,
/// `~/.kube/config` or the pod's service account say. Sends nothing yet.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ConnectError> {
    let config = match kubeconfig {
        None => kube::Config::infer().await.map_err(|error| ConnectError::Infer(Box::new(error)))?,
        Some(path) => {
            let wrong = |error| ConnectError::Kubeconfig { path: path.to_owned(), source: Box::new(error) };
            let file = kube::config::Kubeconfig::read_from(path).map_err(wrong)?;
            let options = kube::config::KubeConfigOptions::default();
            kube::Config::from_custom_kubeconfig(file, &options).await.map_err(wrong)?
        }
    };
    client(config)
}

/// The client's own retries are off: they would hide for minutes what is to be told at once,
/// and the watches have a backoff that knows when a list was complete.
fn client(mut config: kube::Config) -> Result<Client, ConnectError> {
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    Client::try_from(config).map_err(|error| ConnectError::Client(Box::new(error)))
}

/// Watches Services, EndpointSlices, Nodes and ServiceCIDRs until the receiver of `events` is gone, then
/// returns. Take a client from [`connect`]. An API server that cannot be reached is no error: it is tried again for ever,
/// and until the first lists are complete [`Event::NotSynced`] says why they are not.
///
/// Dropping the future ends everything it started.
pub async fn run(client: Client, events: mpsc::Sender<Event>) {
    run_with(client, events, OPTIONAL_PATIENCE).await;
}

async fn run_with(client: Client, events: mpsc::Sender<Event>, optional_patience: Duration) {
    let (out, mut signals) = mpsc::channel(SIGNALS);
    let mut watches = JoinSet::new();
    watches.spawn(
        Watch::<Service, _> {
            api: Api::all(client.clone()),
            which: Which::Services,
            labels: Some(NOT_OURS),
            fields: Some(NOT_HEADLESS),
            out: out.clone(),
            wrap: |object| Read::Service(Box::new(object)),
        }
        .run(),
    );
    watches.spawn(
        Watch::<EndpointSlice, _> {
            api: Api::all(client.clone()),
            which: Which::EndpointSlices,
            labels: Some(NOT_OURS),
            fields: None,
            out: out.clone(),
            wrap: |object| Read::EndpointSlice(Box::new(object)),
        }
        .run(),
    );
    watches.spawn(
        Watch::<convert::Node, _> {
            api: Api::all(client.clone()),
            which: Which::Nodes,
            labels: None,
            fields: None,
            out: out.clone(),
            wrap: |object| Read::Node(Box::new(object)),
        }
        .run(),
    );
    watches.spawn(
        Watch::<ServiceCIDR, _> {
            api: Api::all(client),
            which: Which::ServiceCidrs,
            labels: Some(NOT_OURS),
            fields: None,
            out,
            wrap: |object| Read::ServiceCidr(Box::new(object)),
        }
        .run(),
    );
    let mut intake = Intake::new(optional_patience);
    let mut ready = Vec::new();
    let Ok(()) = events.send(Event::NotSynced(intake.waiting_for())).await else { return };
    loop {
        tokio::select! {
            received = signals.recv_many(&mut ready, SIGNALS) => if received == 0 { return },
            () = intake.patience_ends() => {}
            () = events.closed() => return,
            // A watch ends by itself only where it panics, and the others alone are no source.
            Some(Err(ended)) = watches.join_next() => match ended.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => return,
            },
        }
        for event in intake.digest(ready.drain(..)) {
            let Ok(()) = events.send(event).await else { return };
        }
    }
}

/// The watched resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Which {
    Services,
    EndpointSlices,
    Nodes,
    ServiceCidrs,
}

impl Which {
    const ALL: [Which; 4] = [Which::Services, Which::EndpointSlices, Which::Nodes, Which::ServiceCidrs];

    /// The name in the API's paths.
    fn name(self) -> &'static str {
        match self {
            Which::Services => "services",
            Which::EndpointSlices => "endpointslices",
            Which::Nodes => "nodes",
            Which::ServiceCidrs => "servicecidrs",
        }
    }

    /// The state is complete also where the API server has no such thing, keeps it to itself or
    /// does not come up with it.
    fn is_optional(self) -> bool {
        self == Which::ServiceCidrs
    }
}

/// An object as it was read. Boxed, because hundreds may wait in the channel.
#[derive(Debug)]
enum Read {
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    Node(Box<convert::Node>),
    ServiceCidr(Box<ServiceCIDR>),
}

impl Read {
    fn metadata(&self) -> &ObjectMeta {
        match self {
            Read::Service(object) => &object.metadata,
            Read::EndpointSlice(object) => &object.metadata,
            Read::Node(object) => &object.metadata,
            Read::ServiceCidr(object) => &object.metadata,
        }
    }

    /// `namespace/name`, or the name alone where there is no namespace.
    fn name(&self) -> String {
        let metadata = self.metadata();
        let name = metadata.name.as_deref().unwrap_or_default();
        match metadata.namespace.as_deref() {
            Some(namespace) => format!("{namespace}/{name}"),
            None => name.to_owned(),
        }
    }

    fn convert(&self, names: &mut Interner) -> Conversion<Object> {
        fn resource<T: Into<lockstep_model::Resource>>(outcome: Outcome<T>) -> Outcome<Object> {
            match outcome {
                Outcome::Object(object) => Outcome::Object(Object::Resource(object.into())),
                Outcome::Skip(skip) => Outcome::Skip(skip),
            }
        }
        match self {
            Read::Service(object) => convert::service(object).map(resource),
            Read::EndpointSlice(object) => convert::endpoint_slice(object, names).map(resource),
            Read::Node(object) => {
                convert::node(object, names).map(|node| Outcome::Object(Object::Node(node)))
            }
            Read::ServiceCidr(object) => convert::service_cidr(object).map(resource),
        }
    }

    fn trigger(&self) -> Option<SystemTime> {
        let text = self.metadata().annotations.as_ref()?.get(TRIGGER_TIME)?;
        text.parse::<k8s_openapi::jiff::Timestamp>().ok().map(Into::into)
    }
}

/// Everything known, and what is still missing.
struct Intake {
    /// In the order of [`Which`].
    trackers: [Tracker; 4],
    names: Interner,
    deletions: u32,
    batch: Batch,
    /// Resources whose first list is waited for, each with what is wrong, if anything is.
    missing: BTreeMap<Which, Option<String>>,
    optional_patience: Duration,
    /// When it is over: known once only what is optional is missing.
    patience_ends: Option<Instant>,
    told_alive: Option<Instant>,
}

impl Intake {
    fn new(optional_patience: Duration) -> Self {
        Self {
            trackers: ["Service", "EndpointSlice", "Node", "ServiceCIDR"].map(Tracker::new),
            names: Interner::default(),
            deletions: 0,
            batch: Batch::default(),
            missing: Which::ALL.into_iter().map(|which| (which, None)).collect(),
            optional_patience,
            patience_ends: None,
            told_alive: None,
        }
    }

    /// Returns when what is missing is not waited for any longer; never where it is.
    async fn patience_ends(&self) {
        match self.patience_ends {
            Some(end) => tokio::time::sleep_until(end.into()).await,
            None => std::future::pending().await,
        }
    }

    /// Goes on without what is optional once everything else has been there for long enough.
    fn do_without(&mut self, now: Instant) {
        if self.missing.is_empty() || self.missing.keys().any(|which| !which.is_optional()) {
            self.patience_ends = None;
            return;
        }
        if now >= *self.patience_ends.get_or_insert_with(|| now + self.optional_patience) {
            tracing::warn!("going on without: {}", self.waiting_for());
            self.missing.clear();
            self.patience_ends = None;
        }
    }

    /// What is to be told because of these signals.
    fn digest(&mut self, signals: impl Iterator<Item = Signal<Read>>) -> Vec<Event> {
        let was_waiting = !self.missing.is_empty();
        let was_missing = self.missing.clone();
        let mut alive = false;
        for signal in signals {
            alive |= !matches!(signal.news, News::Failing(_) | News::Absent { .. });
            self.signal(signal);
        }
        self.do_without(Instant::now());
        alive &= self.told_alive.is_none_or(|told| told.elapsed() >= ALIVE_EVERY);
        let synced = was_waiting && self.missing.is_empty();
        let mut events = Vec::new();
        // Most updates of Nodes change nothing for us: their revisions wait for company.
        if alive || synced || !self.batch.is_empty() {
            events.extend(self.batch.finish().map(Event::Changes));
        }
        if synced {
            tracing::info!("every list that is waited for is complete");
            events.push(Event::Synced);
        } else if self.missing != was_missing {
            events.push(Event::NotSynced(self.waiting_for()));
        }
        if alive {
            self.told_alive = Some(Instant::now());
            events.push(Event::Alive);
        }
        events
    }

    fn signal(&mut self, signal: Signal<Read>) {
        let tracker = &mut self.trackers[signal.which as usize];
        match signal.news {
            News::ListBegan => tracker.begin_list(),
            News::ListDone(revision) => {
                tracker.end_list(&mut self.batch);
                self.batch.revision(signal.which.name(), revision);
                self.missing.remove(&signal.which);
            }
            // How long ago the change happened that a list shows says nothing about us.
            News::Listed(object) => self.take(signal.which, &object, None),
            News::Applied(object) => {
                let trigger = object.trigger();
                self.take(signal.which, &object, trigger);
            }
            News::Deleted(object) => {
                tracker.remove(&object.name(), &mut self.batch);
                self.deletions += 1;
                if self.deletions.is_multiple_of(SHRINK_AFTER) {
                    self.names.shrink();
                }
            }
            News::Revision(revision) => self.batch.revision(signal.which.name(), revision),
            News::Absent { known } => {
                self.missing.remove(&signal.which);
                if known {
                    tracker.begin_list();
                    tracker.end_list(&mut self.batch);
                }
            }
            News::Failing(reason) => {
                if let Some(wrong) = self.missing.get_mut(&signal.which) {
                    *wrong = Some(reason);
                }
            }
        }
    }

    fn take(&mut self, which: Which, object: &Read, trigger: Option<SystemTime>) {
        let conversion = object.convert(&mut self.names);
        let reading = Reading {
            name: &object.name(),
            uid: object.metadata().uid.as_deref(),
            conversion,
            note: None,
            trigger,
        };
        self.trackers[which as usize].take(reading, &mut self.batch);
    }

    fn waiting_for(&self) -> String {
        let parts = self.missing.iter().map(|(which, wrong)| match wrong {
            None => format!("waiting for the first list of {}", which.name()),
            Some(wrong) => format!("the first list of {} is not there: {wrong}", which.name()),
        });
        parts.collect::<Vec<_>>().join("; ")
    }
}
