//! A control plane in this process, an agent without its command line, and a namespace for both.
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lockstep_backend_ipvs::Options;
use lockstep_client::cache::Cache;
use lockstep_client::session::{Identity, Now};
use lockstep_client::transport::{self, Security, Servers};
use lockstep_kernel::netns;
use lockstep_model::{
    Conditions, Endpoint, EndpointPort, EndpointSet, EndpointSetKey, Family, NodeContext, Port, Protocol,
    Service, ServiceKey, ServicePort, ServiceType, TrafficPolicy,
};
use lockstep_node::config::{IptablesFlavour, Mode};
use lockstep_node::metrics::Metrics;
use lockstep_node::mode::{self, LeaveIpvs};
use lockstep_node::reconcile::{Event, Parts, Reconciler};
use lockstep_node::status::Status;
use lockstep_server::{Config, Hub, Input, NodeInput, run_intake, serve};
use lockstep_store::Changes;
use lockstep_view::{DetectLocal, ViewConfig};
use lockstep_wire::v1;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

const NODE: &str = "node-a";
const LEAVE_IPVS: LeaveIpvs = LeaveIpvs { exclude: Vec::new(), drain: None };
/// Nothing here takes this long unless it is broken.
const PATIENCE: Duration = Duration::from_secs(60);
/// As the agent's own.
const TICK: Duration = Duration::from_millis(200);

/// Runs a test where it can do no harm.
pub(crate) fn in_namespace(test: impl FnOnce() + Send) {
    netns::run_in_new(|| {
        sh("ip link set lo up");
        test();
    })
    .expect("these tests make network namespaces and need root");
}

pub(crate) fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Waits for something that must come.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A hub and its server, fed by hand.
pub(crate) struct ControlPlane {
    hub: Arc<Hub>,
    inputs: mpsc::Sender<Input>,
    pub(crate) address: SocketAddr,
    _tasks: Tasks,
}

impl ControlPlane {
    /// One that has not read its source yet.
    pub(crate) fn start() -> Self {
        let tasks = Tasks::new();
        let hub = Arc::new(Hub::new(Config::default()));
        let (inputs, queue) = mpsc::channel(16);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        tasks.handle.spawn(run_intake(hub.clone(), queue));
        let serving = hub.clone();
        tasks.handle.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            serve(serving, listener, None, std::future::pending()).await.unwrap();
        });
        let this = Self { hub, inputs, address, _tasks: tasks };
        let node = NodeContext {
            uid: Some("uid".into()),
            addresses: vec![Ipv4Addr::new(192, 0, 2, 1).into()],
            ..NodeContext::unknown(NODE)
        };
        this.say(Changes::default(), vec![NodeInput::Upsert(node)]);
        this
    }

    fn say(&self, changes: Changes, nodes: Vec<NodeInput>) {
        self.inputs.blocking_send(Input::Changes { changes, nodes, quarantine: Vec::new() }).unwrap();
    }

    pub(crate) fn synced(&self) {
        self.inputs.blocking_send(Input::Synced).unwrap();
        until("the first state", || self.seq() > 0);
    }

    /// The newest transaction.
    pub(crate) fn seq(&self) -> u64 {
        self.hub.overview().head.seq
    }

    /// A Service with these endpoints, new or changed, as one transaction.
    pub(crate) fn service(&self, index: u8, hosts: &[u8]) {
        let before = self.seq();
        let key = ServiceKey::new("shop", format!("cart-{index}"));
        let mut changes = Changes::default();
        changes.upsert(service(&key, index));
        changes.upsert(endpoints(&key, index, hosts));
        self.say(changes, Vec::new());
        if before > 0 {
            until("the transaction", || self.seq() > before);
        }
    }
}

fn service(key: &ServiceKey, index: u8) -> Service {
    Service {
        key: key.clone(),
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![Ipv4Addr::new(10, 96, 0, index).into()],
        external_ips: Vec::new(),
        load_balancer_ingress: Vec::new(),
        ports: vec![ServicePort {
            protocol: Protocol::Tcp,
            port: Port::new(80).unwrap(),
            name: "http".into(),
            node_port: None,
            app_protocol: None,
        }],
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Cluster,
        traffic_distribution: None,
        client_ip_affinity_seconds: None,
        load_balancer_source_ranges: Vec::new(),
        health_check_node_port: None,
        publish_not_ready_addresses: false,
    }
}

fn endpoints(service: &ServiceKey, index: u8, hosts: &[u8]) -> EndpointSet {
    let endpoint = |host: &u8| Endpoint {
        address: Ipv4Addr::new(10, 244, index, *host).into(),
        node_name: Some("elsewhere".into()),
        zone: None,
        conditions: Conditions::READY,
        hints: None,
    };
    let mut set = EndpointSet {
        key: EndpointSetKey::new(service.clone(), "slice"),
        family: Family::V4,
        ports: vec![EndpointPort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: Port::new(8080).unwrap(),
        }],
        endpoints: hosts.iter().map(endpoint).collect(),
    };
    set.canonicalise();
    set
}

/// Tasks on a thread that is started from this one, and so in the same namespace.
struct Tasks {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Tasks {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            // Whichever way the sender goes.
            let _ = runtime.block_on(stopped);
        });
        Self { handle, stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// Everything of an agent but its command line, signals and HTTP servers.
pub(crate) struct Agent {
    pub(crate) status: Arc<Status>,
    metrics: Metrics,
    stopping: Arc<AtomicBool>,
    events: mpsc::Sender<Event>,
    thread: JoinHandle<()>,
    _tasks: Tasks,
}

impl Agent {
    pub(crate) fn start(mode: Mode, flavour: IptablesFlavour, state: &Path, server: SocketAddr) -> Self {
        let (cache, restored) = Cache::open(state, NODE).unwrap();
        let mode::Chosen { backend, interface } = mode::choose(mode, flavour, &Options::default()).unwrap();
        let description = backend.describe();
        let (metrics, _) = Metrics::new(&description.families);
        let status = Arc::new(Status::default());
        let stopping = Arc::new(AtomicBool::new(false));
        let identity = Identity {
            node_name: NODE.into(),
            instance_id: format!("{:?}", Instant::now()),
            started: std::time::SystemTime::now(),
            boot_id: String::new(),
            agent_version: "test".to_owned(),
            features: Vec::new(),
            backend: v1::Backend::default(),
            settings: None,
            kernel_adopted: false,
        };
        let parts = Parts {
            backend,
            remove_others: Some(Box::new(move || mode::remove_others(interface, &LEAVE_IPVS))),
            new_addresses: None,
            cache: Some(cache),
            restored,
            identity,
            view_config: ViewConfig {
                families: description.families,
                detect_local: DetectLocal::ClusterCidrs(vec!["10.244.0.0/16".parse().unwrap()]),
                ..ViewConfig::new(NODE)
            },
            follow_ups: Vec::new(),
            status: status.clone(),
            metrics: metrics.clone(),
            stopping: stopping.clone(),
        };
        let (events, queue) = mpsc::channel(8);
        let thread = std::thread::spawn(move || Reconciler::new(parts, Now::read()).run(queue));
        let tasks = Tasks::new();
        let servers = Servers::new(&[format!("http://{server}")], &Security::Plaintext).unwrap();
        let stream = events.clone();
        tasks.handle.spawn(async move { transport::run(servers, NODE, stream).await });
        let ticks = events.clone();
        tasks.handle.spawn(async move {
            let mut interval = tokio::time::interval(TICK);
            while ticks.send(Event::Tick).await.is_ok() {
                interval.tick().await;
            }
        });
        Self { status, metrics, stopping, events, thread, _tasks: tasks }
    }

    /// Kernel objects written so far.
    pub(crate) fn objects(&self) -> u64 {
        self.metrics.objects_changed.get()
    }

    /// Foreign changes repaired so far.
    pub(crate) fn repairs(&self) -> u64 {
        self.metrics.drift_repairs.get()
    }

    /// True once a stream was refused or has ended.
    pub(crate) fn was_turned_away(&self) -> bool {
        self.metrics.disconnects.get() > 0
    }

    /// Waits until this transaction is in force and read back.
    pub(crate) fn is_verified_at(&self, seq: u64) {
        until("the read-back", || {
            let snapshot = self.status.snapshot();
            snapshot.connected && (snapshot.applied_seq, snapshot.verified_seq) == (seq, seq)
        });
        assert_eq!(self.status.snapshot().failures, 0);
    }

    /// Ends as on SIGTERM.
    pub(crate) fn stop(self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.events.blocking_send(Event::Shutdown).unwrap();
        self.thread.join().unwrap();
    }
}
