//! One function per command.

use std::io::Write;
use std::time::{Duration, Instant, SystemTime};

use lockstep_wire::v1;
use lockstep_wire::v1::status_service_client::StatusServiceClient;
use tonic::Code;
use tonic::transport::Channel;

use super::Failure;
use super::args::{Args, Command, Format, ServiceName, WaitLevel};
use super::client;
use super::explain;
use super::output::{self, time};
use super::view::{self, Waited};

mod text;

/// Largest page the server gives.
const PAGE: u32 = 1_000;

/// Most nodes that `status` lists as behind.
const BEHIND: u32 = 20;

/// How long a question that is answered at once may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a Service that a wait is for may be unknown.
const GRACE: Duration = Duration::from_secs(2);

/// How often it is asked for meanwhile.
const RETRY: Duration = Duration::from_millis(100);

type Client = StatusServiceClient<Channel>;

/// Runs the command and writes what it has to say.
pub(super) async fn run(args: Args, out: &mut dyn Write) -> Result<(), Failure> {
    if let Command::Explain(question) = &args.command {
        question.packet().map_err(Failure::Usage)?;
    }
    let channel = client::connect(&args.connection).await?;
    let client = client::status(channel.clone());
    let format = args.output;
    let command = async {
        match args.command {
            Command::Watch { interval, count } => watch(client, out, format, interval, count).await,
            Command::Wait { service, level, timeout } => {
                wait(client, out, format, service, level, timeout).await
            }
            Command::Explain(question) => {
                let explanation = in_time(explain::explain(channel, &question)).await?;
                Ok(output::write(out, format, &explanation, explain::text::explanation)?)
            }
            command => in_time(ask(client, out, format, command)).await,
        }
    };
    command.await
}

/// An answer, or that there is none.
async fn in_time<T>(answer: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::time::timeout(ANSWER_TIMEOUT, answer)
        .await
        .unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {ANSWER_TIMEOUT:?}").into()))
}

async fn ask(client: Client, out: &mut dyn Write, format: Format, command: Command) -> Result<(), Failure> {
    match command {
        Command::Status => status(client, out, format).await,
        Command::Services { namespace } => services(client, out, format, namespace).await,
        Command::Service { service } => one_service(client, out, format, service).await,
        Command::Nodes { behind, failing } => nodes(client, out, format, behind, failing).await,
        Command::Node { name } => one_node(client, out, format, name).await,
        Command::Failures { namespace } => failures(client, out, format, namespace).await,
        Command::Watch { .. } | Command::Wait { .. } | Command::Explain(_) => {
            Err(Failure::Usage("this command is not a question".into()))
        }
    }
}

async fn status(mut client: Client, out: &mut dyn Write, format: Format) -> Result<(), Failure> {
    let info = client.get_server_info(v1::GetServerInfoRequest {}).await?.into_inner();
    let mut watch = client.watch_convergence(v1::WatchConvergenceRequest::default()).await?.into_inner();
    let convergence = watch.message().await?.unwrap_or_default();
    let request = v1::ListNodesRequest { only_behind: true, page_size: BEHIND, ..Default::default() };
    let behind = client.list_nodes(request).await?.into_inner();
    let source = info.source_fresh_at.and_then(|at| SystemTime::try_from(at).ok());
    let overview = view::Overview {
        server_id: info.server_id,
        version: info.version,
        serving: info.synced,
        not_serving_reason: info.not_serving_reason,
        source_fresh_at: info.source_fresh_at.map(|at| at.to_string()),
        source_age: source.map(|at| SystemTime::now().duration_since(at).unwrap_or_default().as_secs_f64()),
        head: info.head.unwrap_or_default().into(),
        services: info.services,
        endpoint_sets: info.endpoint_sets,
        service_cidrs: info.service_cidrs,
        quarantined: info.quarantined,
        streams: info.streams,
        convergence: convergence.into(),
        behind: behind.nodes.into_iter().map(view::Node::from).collect(),
        behind_truncated: !behind.next_page_token.is_empty(),
    };
    Ok(output::write(out, format, &overview, text::overview)?)
}

async fn services(
    mut client: Client,
    out: &mut dyn Write,
    format: Format,
    namespace: Option<String>,
) -> Result<(), Failure> {
    let namespace = namespace.unwrap_or_default();
    let (mut all, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListServicesRequest { namespace: namespace.clone(), page_size: PAGE, page_token };
        let page = client.list_services(request).await?.into_inner();
        all.extend(page.services.into_iter().map(view::Service::from));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(output::write(out, format, &all, |all| text::services(all))?);
        }
    }
}

async fn one_service(
    mut client: Client,
    out: &mut dyn Write,
    format: Format,
    service: ServiceName,
) -> Result<(), Failure> {
    let request = v1::GetServiceRequest { namespace: service.namespace, name: service.name };
    let detail = client.get_service(request).await?.into_inner().into();
    Ok(output::write(out, format, &detail, text::service)?)
}

async fn nodes(
    mut client: Client,
    out: &mut dyn Write,
    format: Format,
    only_behind: bool,
    only_failing: bool,
) -> Result<(), Failure> {
    let (mut all, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListNodesRequest { only_behind, only_failing, page_size: PAGE, page_token };
        let page = client.list_nodes(request).await?.into_inner();
        all.extend(page.nodes.into_iter().map(view::Node::from));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(output::write(out, format, &all, |all| text::nodes(all))?);
        }
    }
}

async fn one_node(
    mut client: Client,
    out: &mut dyn Write,
    format: Format,
    name: String,
) -> Result<(), Failure> {
    let detail = client.get_node(v1::GetNodeRequest { node_name: name }).await?.into_inner().into();
    Ok(output::write(out, format, &detail, text::node)?)
}

async fn failures(
    mut client: Client,
    out: &mut dyn Write,
    format: Format,
    namespace: Option<String>,
) -> Result<(), Failure> {
    let request = v1::ListFailuresRequest { namespace: namespace.unwrap_or_default(), reason: 0 };
    let failures = client.list_failures(request).await?.into_inner().into();
    Ok(output::write(out, format, &failures, text::failures)?)
}

async fn watch(
    mut client: Client,
    out: &mut dyn Write,
    format: Format,
    interval: Duration,
    count: Option<u64>,
) -> Result<(), Failure> {
    let min_interval = prost_types::Duration::try_from(interval).ok();
    let request = v1::WatchConvergenceRequest { min_interval };
    let mut watch = client.watch_convergence(request).await?.into_inner();
    let mut lines = 0;
    while count.is_none_or(|count| lines < count) {
        let Some(response) = watch.message().await? else {
            return Err(anyhow::anyhow!("the server ended the watch").into());
        };
        let at = prost_types::Timestamp::from(SystemTime::now());
        output::write_item(out, format, &view::Convergence::from(response), |now| {
            text::convergence(now, at)
        })?;
        lines += 1;
    }
    Ok(())
}

async fn wait(
    mut client: Client,
    out: &mut dyn Write,
    format: Format,
    service: Option<ServiceName>,
    level: WaitLevel,
    timeout: Duration,
) -> Result<(), Failure> {
    let start = Instant::now();
    let name = match &service {
        Some(service) => format!("{}/{}", service.namespace, service.name),
        None => "head".into(),
    };
    let target = match service {
        Some(ServiceName { namespace, name }) => {
            v1::wait_request::Target::Service(v1::ServiceRef { namespace, name })
        }
        None => v1::wait_request::Target::Seq(0),
    };
    let wanted =
        v1::WaitRequest { target: Some(target), level: level.to_wire().into(), ..Default::default() };
    let (mut last, mut unknown) = (v1::WaitResponse::default(), None);
    let mut progress = loop {
        let left = timeout.saturating_sub(start.elapsed());
        let mut request = tonic::Request::new(wanted.clone());
        request.set_timeout(left);
        match client.wait(request).await {
            Ok(progress) => break progress.into_inner(),
            // Right after `kubectl apply` the control plane may be a moment behind.
            Err(status) if status.code() == Code::NotFound && start.elapsed() < timeout.min(GRACE) => {
                unknown = Some(status);
                tokio::time::sleep(RETRY.min(left)).await;
            }
            // Where the time was over before the answer, the one before counts.
            Err(status) => return Err(unknown.unwrap_or(status).into()),
        }
    };
    // The server ends it at the deadline; where the connection is gone, the clock here does.
    let left = timeout.saturating_sub(start.elapsed());
    let follow = tokio::time::timeout(left, async {
        while !last.done {
            match progress.message().await {
                Ok(Some(response)) => last = response,
                Ok(None) => return Err(anyhow::anyhow!("the server ended the wait").into()),
                Err(status) if matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled) => break,
                Err(status) => return Err(Failure::from(status)),
            }
        }
        Ok(())
    });
    follow.await.unwrap_or(Ok(()))?;
    let waited = Waited {
        done: last.done,
        target: name,
        level: level.name(),
        seq: last.target.unwrap_or_default().seq,
        nodes_expected: last.nodes_expected,
        nodes_done: last.nodes_done,
        waited_seconds: start.elapsed().as_secs_f64(),
        laggards: last.laggards.into_iter().map(view::Laggard::from).collect(),
    };
    output::write(out, format, &waited, text::waited)?;
    if waited.done { Ok(()) } else { Err(Failure::TimedOut) }
}

/// Shows an optional duration.
fn optional_time(seconds: Option<f64>) -> String {
    seconds.map(time).unwrap_or_default()
}
