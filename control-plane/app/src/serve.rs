//! `lockstep-control-plane`.

use std::future::Future;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use lockstep_server::{Acceptor, Config, Hub};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tracing::info;

mod args;
mod certificates;
mod feed;
mod http;
mod metrics;

use args::{Args, LogFormat, SourceArg};
use certificates::Certificates;

/// Events and inputs in flight. A source that is faster waits.
const IN_FLIGHT: usize = 256;

/// Below this many open files, it is said that there are few.
const FILES_FOR_A_LARGE_CLUSTER: u64 = 8_192;

/// The program. Exit codes are in `--help`.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Help and version go to stdout and are no error.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    if let Err(usage) = args.check() {
        let _ = writeln!(std::io::stderr(), "error: {usage}\n\nFor more information, try '--help'.");
        return ExitCode::from(2);
    }
    log_to_stderr(args.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.context("starting the async runtime").and_then(|runtime| runtime.block_on(run(args))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Everything that can be wrong with the surroundings is found out before anything starts.
async fn run(args: Args) -> anyhow::Result<()> {
    raise_file_limit();
    let stop = stop_signal().context("listening to signals")?;
    let certificates = args.tls.files().map(Certificates::read).transpose()?;
    let tls = certificates.map(spawn_renewal);
    let config = Config {
        heartbeat: args.heartbeat_interval(),
        node_name_from_certificate: args.tls.client_ca.is_some(),
        ..Config::default()
    };
    let hub = Arc::new(Hub::new(config));
    let listener = listen("--listen", args.listen).await?;
    let http = match args.http {
        Some(address) => Some(listen("--http", address).await?),
        None => None,
    };
    let (events, incoming) = mpsc::channel(IN_FLIGHT);
    let source = spawn_source(&args.source, args.kubeconfig.as_deref(), events).await?;
    let (feeding, inputs) = mpsc::channel(IN_FLIGHT);
    tokio::spawn(feed::run(incoming, feeding));
    tokio::spawn(lockstep_server::run_intake(hub.clone(), inputs));
    info!(
        version = env!("CARGO_PKG_VERSION"),
        source = %args.source,
        listen = %listener.local_addr()?,
        tls = tls.is_some(),
        client_certificates = args.tls.client_ca.is_some(),
        "started"
    );
    if let Some(http) = http {
        info!(address = %http.local_addr()?, "serving health and metrics");
        tokio::spawn(http::serve(http, hub.clone()));
    }
    tokio::select! {
        served = lockstep_server::serve(hub, listener, tls, stop) => served?,
        ended = source => match ended.context("the source")? {
            Ok(()) => anyhow::bail!("the source has ended"),
            Err(error) => return Err(error),
        },
    }
    info!("stopped");
    Ok(())
}

/// A connection is an open file, and a shell or a service manager often allows 1,024 where the
/// kernel would allow half a million.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, current = limit.current, "the limit of open files stays as it is");
    }
    if let Some(maximum) = limit.maximum.filter(|maximum| *maximum < FILES_FOR_A_LARGE_CLUSTER) {
        tracing::warn!(maximum, "few open files are allowed: one is needed per node");
    }
}

async fn listen(flag: &str, address: std::net::SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("{flag} {address}"))
}

/// From now on, renewed files are taken up.
fn spawn_renewal((certificates, acceptor): (Certificates, Acceptor)) -> watch::Receiver<Acceptor> {
    let (sender, acceptors) = watch::channel(acceptor);
    tokio::spawn(certificates::follow(certificates, sender));
    acceptors
}

type SourceTask = tokio::task::JoinHandle<anyhow::Result<()>>;

async fn spawn_source(
    source: &SourceArg,
    kubeconfig: Option<&std::path::Path>,
    events: mpsc::Sender<lockstep_source::Event>,
) -> anyhow::Result<SourceTask> {
    Ok(match source {
        SourceArg::Kubernetes => {
            let client = lockstep_source::kubernetes::connect(kubeconfig).await?;
            tokio::spawn(async move {
                lockstep_source::kubernetes::run(client, events).await;
                Ok(())
            })
        }
        SourceArg::Files(directory) => {
            let directory = directory.clone();
            tokio::spawn(async move { Ok(lockstep_source::files::run(directory, events).await?) })
        }
    })
}

/// SIGTERM or SIGINT. Listened to from the call on, so that none is missed while the rest starts.
fn stop_signal() -> std::io::Result<impl Future<Output = ()> + Send> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        info!(signal = name, "stopping");
    })
}

fn log_to_stderr(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("LOCKSTEP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match format {
        LogFormat::Text => log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}
