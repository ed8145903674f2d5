//! Wiring: reads as the list of what runs.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use lockstep_client::cache::{Cache, CacheError, Restored};
use lockstep_client::session::{Identity, Now};
use lockstep_client::transport;
use lockstep_kernel::addresses::Addresses;
use lockstep_model::{Family, Feature};
use lockstep_view::backend::Description;
use lockstep_view::{NodePortAddresses, ViewConfig};
use lockstep_wire::v1;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use crate::config::{Config, EXIT_CONFIG, EXIT_FAILED, EXIT_UNUSABLE, RunArguments};
use crate::conntrack::{self, Cutter};
use crate::health_ports::HealthPorts;
use crate::http;
use crate::metrics::Metrics;
use crate::mode::{self, Chosen};
use crate::reconcile::{Event, NewAddresses, Parts, Reconciler};
use crate::settings;
use crate::status::Status;

/// Frames that may wait for the loop: they are up to 1 MiB each.
const EVENTS: usize = 8;
const TICK: Duration = Duration::from_millis(200);
/// What the last Ack may take to leave.
const FAREWELL: Duration = Duration::from_secs(2);
/// Exit code after a second signal, as a shell reports an interrupted program.
const EXIT_SIGNAL: i32 = 130;

/// The agent, from its flags to its exit code.
pub fn main(arguments: &RunArguments) -> ExitCode {
    arguments.log_format.install();
    let config = match arguments.check() {
        Ok(config) => config,
        Err(error) => {
            tracing::error!("{error:#}");
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    match run(&config) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn run(config: &Config) -> anyhow::Result<ExitCode> {
    lockstep_kernel::memory::map_large_pieces();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"), node = config.node_name, mode = ?config.mode,
        pods = ?config.detect_local, state_dir = %config.state_dir.display(), "starting"
    );
    // The lock comes first: two agents must not even probe at the same time.
    let (cache, restored) = match Cache::open(&config.state_dir, &config.node_name) {
        Ok(opened) => opened,
        Err(error @ CacheError::InUse { .. }) => {
            tracing::error!("{error}; one agent per node, each with a state directory of its own");
            return Ok(ExitCode::from(EXIT_UNUSABLE));
        }
        Err(error) => return Err(error).context("--state-dir"),
    };
    // The iptables backend looks at one of them.
    config.conntrack.apply();
    let chosen = match mode::choose(config.mode, config.iptables_flavour, &config.ipvs) {
        Ok(chosen) => chosen,
        Err(error) => {
            tracing::error!("{error:#}");
            return Ok(ExitCode::from(EXIT_UNUSABLE));
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("tokio")?;
    runtime.block_on(serve(config, chosen, cache, restored))
}

async fn serve(
    config: &Config,
    chosen: Chosen,
    cache: Cache,
    restored: Option<Restored>,
) -> anyhow::Result<ExitCode> {
    let Chosen { backend, interface } = chosen;
    let description = backend.describe();
    let status = Arc::new(Status::default());
    let stopping = Arc::new(AtomicBool::new(false));
    let (metrics, mut registry) = Metrics::new(&description.families);
    let sweep = conntrack::kernel(conntrack::Metrics::new(&mut registry));
    let cutter = Cutter::start(sweep).context("thread that cuts stale UDP flows")?;
    let (events, queue) = mpsc::channel(EVENTS);
    let health_ports = HealthPorts::new(Handle::current(), status.clone(), description.families.clone());

    spawn_signals(events.clone(), stopping.clone())?;
    tokio::spawn(http::serve(
        "health",
        config.healthz,
        http::health_routes(status.clone(), &description.families),
    ));
    let routes = http::metrics_routes(registry, metrics.clone(), status.clone());
    tokio::spawn(http::serve("metrics", config.metrics, routes));
    tokio::spawn(ticks(events.clone()));
    let (servers, node) = (config.servers.clone(), config.node_name.clone());
    let link = tokio::spawn(async move { transport::run(servers, &node, events).await });

    let view_config = mode::view_config(config, &description);
    let leave_ipvs = mode::LeaveIpvs { exclude: config.ipvs.exclude.clone(), drain: Some(config.ipvs.drain) };
    let parts = Parts {
        backend,
        remove_others: Some(Box::new(move || mode::remove_others(interface, &leave_ipvs))),
        new_addresses: new_addresses(&view_config)?,
        cache: Some(cache),
        restored,
        identity: identity(config, &description, &view_config),
        view_config,
        follow_ups: vec![Box::new(cutter), Box::new(health_ports)],
        status,
        metrics,
        stopping,
    };
    let ended = wait(spawn_reconciler(parts, queue)?).await;
    // The transport ends when nobody takes its events any more; it sends the last Ack first.
    let _ = tokio::time::timeout(FAREWELL, link).await;
    ended
}

/// Follows the addresses of the node's interfaces, where node ports depend on them.
fn new_addresses(view_config: &ViewConfig) -> anyhow::Result<Option<NewAddresses>> {
    if !matches!(view_config.node_port_addresses, NodePortAddresses::Cidrs(_)) {
        return Ok(None);
    }
    let mut addresses = Addresses::open().context("listen for changes of interface addresses")?;
    let (mut due, mut known) = (true, None);
    Ok(Some(Box::new(move || {
        let news = addresses.changed().and_then(|changed| {
            due |= changed;
            if due { addresses.list().map(Some) } else { Ok(None) }
        });
        match news {
            Ok(list) => {
                due = false;
                let list = list.filter(|list| known.as_ref() != Some(list))?;
                known = Some(list.clone());
                Some(list)
            }
            Err(error) => {
                // What is in force stays, and the next turn asks again.
                if !std::mem::replace(&mut due, true) {
                    tracing::warn!(%error, "cannot read the addresses of the interfaces");
                }
                None
            }
        }
    })))
}

/// The reconcile thread. The cache's last write is part of its end.
fn spawn_reconciler(parts: Parts, queue: mpsc::Receiver<Event>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("reconcile".to_owned())
        .spawn(move || Reconciler::new(parts, Now::read()).run(queue))
}

async fn wait(thread: JoinHandle<()>) -> anyhow::Result<ExitCode> {
    let joined = tokio::task::spawn_blocking(move || thread.join()).await.context("waiting for the loop")?;
    match joined {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(_) => Err(anyhow::anyhow!("the reconcile loop panicked; the rules stay in force")),
    }
}

/// The first signal ends the process after the current pass, the second at once.
fn spawn_signals(events: mpsc::Sender<Event>, stopping: Arc<AtomicBool>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        tracing::info!("asked to end: finishing the current pass, rules stay in force");
        stopping.store(true, Ordering::Relaxed);
        // Dropped at once when the loop is busy: it looks at `stopping` after each pass.
        let _ = events.try_send(Event::Shutdown);
        drop(events);
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        tracing::warn!("a second signal: ending at once");
        std::process::exit(EXIT_SIGNAL);
    });
    Ok(())
}

async fn ticks(events: mpsc::Sender<Event>) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        interval.tick().await;
        // A loop that is busy needs no reminder.
        if let Err(mpsc::error::TrySendError::Closed(_)) = events.try_send(Event::Tick) {
            return;
        }
    }
}

fn identity(config: &Config, description: &Description, view_config: &ViewConfig) -> Identity {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let features = description.features.iter().map(|feature| match feature {
        Feature::Sctp => v1::Feature::Sctp,
        Feature::SessionAffinity => v1::Feature::SessionAffinity,
        Feature::LbProxyMode => v1::Feature::LbProxyMode,
        Feature::SourceRanges => v1::Feature::SourceRanges,
    });
    let families = description.families.iter().map(|family| match family {
        Family::V4 => v1::AddressFamily::Ipv4 as i32,
        Family::V6 => v1::AddressFamily::Ipv6 as i32,
    });
    let kind = match description.mode {
        mode::IPTABLES => v1::BackendKind::Iptables,
        mode::IPVS => v1::BackendKind::Ipvs,
        _ => v1::BackendKind::Nftables,
    };
    Identity {
        node_name: config.node_name.as_str().into(),
        instance_id: instance_id(),
        started: SystemTime::now(),
        boot_id: boot_id.trim().to_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        features: features.collect(),
        backend: v1::Backend {
            kind: kind as i32,
            version: description.version.clone(),
            families: families.collect(),
        },
        settings: Some(settings::to_wire(view_config)),
        kernel_adopted: false,
    }
}

/// Differs between any two processes: the kernel makes one per read.
fn instance_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map(|uuid| uuid.trim().to_owned())
        .unwrap_or_else(|_| format!("{}-{:?}", std::process::id(), SystemTime::now()))
}
