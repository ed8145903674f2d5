//! How long a change that somebody else makes to our tables lasts, among many Services.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lockstep_kernel::nf_tables::{self, Family};
use lockstep_wire::v1;
use lockstep_wire::v1::status_service_client::StatusServiceClient;
use tonic::transport::{Channel, Endpoint};

use super::programs::{self, LISTEN, Programs, TABLE, until};

/// Fine enough for times of some milliseconds.
const POLL: Duration = Duration::from_millis(2);

/// Between two changes, so that the second is not one of somebody who keeps on disturbing: what
/// the agent does about those is less, and on purpose.
const REST: Duration = Duration::from_secs(2);

/// One foreign change and its end.
#[derive(Debug)]
pub struct Repair {
    /// What was done.
    pub change: &'static str,
    /// How long the foreign tool took.
    pub tool: Duration,
    /// From the tool's end until the kernel was as it should be.
    pub repaired: Duration,
    /// From the tool's end until the control plane knew of the repair and that it was verified.
    pub reported: Duration,
}

/// Loads this many Services and disturbs them with `nft`, so many times in each way.
pub fn measure(services: u32, binaries: &Path, tries: u32) -> Result<Vec<Repair>> {
    programs::run(services, binaries, |programs| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime.block_on(Endpoint::from_shared(format!("http://{LISTEN}"))?.connect())?;
        let mut node = || runtime.block_on(node(StatusServiceClient::new(channel.clone())));
        // Of the first Service. What a repair writes is one transaction: where one is back, all are.
        let frontend = [10, 64, 0, 1, 6, 0, 0, 0, 0, 80, 0, 0];
        let endpoint = [&frontend[..], &0_u32.to_ne_bytes()].concat();
        let element = "{ 10.64.0.1 . tcp . 80 }";
        let mut repairs = Vec::new();
        for _ in 0..tries {
            let change = ["delete", "element", "ip", TABLE, "frontends", element];
            repairs.push(repair(
                programs,
                "one element deleted",
                &change,
                "frontends",
                &frontend,
                &mut node,
            )?);
            let change = ["flush", "map", "ip", TABLE, "endpoints"];
            repairs.push(repair(programs, "a map flushed", &change, "endpoints", &endpoint, &mut node)?);
        }
        Ok(repairs)
    })
}

fn repair(
    programs: &mut Programs,
    change: &'static str,
    arguments: &[&str],
    set: &str,
    key: &[u8],
    node: &mut impl FnMut() -> Result<v1::NodeStatus>,
) -> Result<Repair> {
    std::thread::sleep(REST);
    let mut before = 0;
    until("the node to be verified", POLL, || {
        let status = node()?;
        before = status.drift_repairs;
        Ok(status.verified_seq > 0 && status.verified_seq == status.received_seq)
    })?;
    let begun = Instant::now();
    let done = Command::new("nft").args(arguments).output().context("nft")?;
    ensure!(done.status.success(), "nft: {}", String::from_utf8_lossy(&done.stderr));
    let tool = begun.elapsed();
    let foreign = Instant::now();
    let kernel = &mut programs.kernel;
    until("the kernel to be as it should be", POLL, || {
        let found = nf_tables::element_values(kernel, Family::Ipv4, TABLE, set, &[key])?;
        Ok(found.first().is_some_and(Option::is_some))
    })?;
    let repaired = foreign.elapsed();
    until("the repair to be reported", POLL, || {
        let status = node()?;
        Ok(status.drift_repairs > before && status.verified_seq == status.received_seq)
    })?;
    Ok(Repair { change, tool, repaired, reported: foreign.elapsed() })
}

async fn node(mut client: StatusServiceClient<Channel>) -> Result<v1::NodeStatus> {
    let nodes = client.list_nodes(v1::ListNodesRequest::default()).await?.into_inner().nodes;
    nodes.into_iter().next().context("no node is connected")
}
