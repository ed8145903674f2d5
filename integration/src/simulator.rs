//! Thousands of nodes in one process, against a real control plane: each is a connection of its
//! own that acknowledges every transaction, and holds nothing.
//!
//! For what a node does with its state there are real ones; this asks what the control plane
//! does with many of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lockstep_wire::raw::sync_response::Kind;
use lockstep_wire::raw::sync_service_client::SyncServiceClient;
use lockstep_wire::v1;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;

/// Connections that are opened at the same time.
const AT_ONCE: usize = 128;
/// How long all of them may take for one transaction.
const PATIENCE: Duration = Duration::from_secs(120);

/// Streams of that many nodes.
#[derive(Debug)]
pub struct Crowd {
    streams: JoinSet<Result<()>>,
    arrivals: mpsc::UnboundedReceiver<(usize, u64, Instant)>,
    /// Newest transaction of each.
    reached: Vec<u64>,
}

impl Crowd {
    /// Opens `count` streams, named `node-0` and so on.
    pub fn join(url: &str, count: usize) -> Result<Self> {
        let endpoint = Endpoint::from_shared(url.to_owned())?;
        let (out, arrivals) = mpsc::unbounded_channel();
        let gate = Arc::new(Semaphore::new(AT_ONCE));
        let mut streams = JoinSet::new();
        for index in 0..count {
            let (endpoint, gate, out) = (endpoint.clone(), gate.clone(), out.clone());
            streams.spawn(async move {
                node(index, endpoint, gate, out).await.with_context(|| format!("node-{index}"))
            });
        }
        Ok(Self { streams, arrivals, reached: vec![0; count] })
    }

    /// Waits until every node has got `seq` or a later state. Returns when each did, sorted.
    pub async fn reach(&mut self, seq: u64) -> Result<Vec<Instant>> {
        let mut times = Vec::new();
        let mut missing = self.reached.iter().filter(|reached| **reached < seq).count();
        while missing > 0 {
            let arrival = tokio::select! {
                arrival = tokio::time::timeout(PATIENCE, self.arrivals.recv()) => arrival,
                Some(ended) = self.streams.join_next() => {
                    ended??;
                    anyhow::bail!("a stream has ended");
                }
            };
            let arrival = arrival.with_context(|| format!("{missing} nodes never reached {seq}"))?;
            let (index, to, at) = arrival.context("no node is left")?;
            if self.reached[index] < seq && to >= seq {
                missing -= 1;
                times.push(at);
            }
            self.reached[index] = self.reached[index].max(to);
        }
        times.sort_unstable();
        Ok(times)
    }
}

async fn node(
    index: usize,
    endpoint: Endpoint,
    gate: Arc<Semaphore>,
    out: mpsc::UnboundedSender<(usize, u64, Instant)>,
) -> Result<()> {
    let name = format!("node-{index}");
    let opening = gate.acquire().await?;
    let channel = endpoint.connect().await?;
    let (requests, queue) = mpsc::channel(4);
    requests.send(request(v1::sync_request::Kind::Hello(hello(name)))).await?;
    let mut client = SyncServiceClient::new(channel);
    let mut responses = client.sync(ReceiverStream::new(queue)).await?.into_inner();
    drop(opening);
    while let Some(response) = responses.message().await? {
        let Some(Kind::Update(update)) = response.kind else { continue };
        let Some(to) = update.to.filter(|_| update.commit) else { continue };
        let seq = to.seq;
        if out.send((index, seq, Instant::now())).is_err() {
            return Ok(());
        }
        let ack = v1::Ack {
            received_seq: seq,
            applied_seq: seq,
            verified_seq: seq,
            position: Some(to),
            outcome: v1::Outcome::Verified.into(),
            ..Default::default()
        };
        requests.send(request(v1::sync_request::Kind::Ack(ack))).await?;
    }
    ensure!(out.is_closed(), "the server ended the stream");
    Ok(())
}

fn hello(node_name: String) -> v1::Hello {
    v1::Hello {
        instance_id: node_name.clone(),
        node_name,
        agent_version: "simulator".into(),
        protocol_min: 1,
        protocol_max: 1,
        features: vec![v1::Feature::EndpointPatch.into(), v1::Feature::Zstd.into()],
        backend: Some(v1::Backend { kind: v1::BackendKind::External.into(), ..Default::default() }),
        ..Default::default()
    }
}

fn request(kind: v1::sync_request::Kind) -> v1::SyncRequest {
    v1::SyncRequest { kind: Some(kind) }
}

/// What a process has used.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// Resident memory now, MiB.
    pub rss: u64,
    /// The most it ever was, MiB.
    pub peak: u64,
    /// Processor time since its start.
    pub cpu: Duration,
}

/// What a process has used so far.
pub fn usage(pid: u32) -> Result<Usage> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
        let kib: u64 = line.trim_matches([':', ' ', '\t']).trim_end_matches(" kB").trim().parse()?;
        Ok(kib / 1024)
    };
    // utime and stime, in hundredths of a second on every Linux.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').context("no stat")?.1;
    let ticks = after_name.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    let ticks: u64 = ticks.sum::<Result<u64, _>>()?;
    Ok(Usage { rss: field("VmRSS")?, peak: field("VmHWM")?, cpu: Duration::from_millis(ticks * 10) })
}
