//! The product in IPVS mode: what scenarios cannot show. Runs in the guest alone, `cargo xtask vm
//! test ipvs`: other kernels need not have IPVS.
#![allow(clippy::print_stdout, reason = "what was measured belongs in the report")]

mod affinity;
mod draining;
mod drift;
mod foreigners;
mod listeners;
mod ports;
mod restart;
mod schedulers;
mod shared_port;

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lockstep_integration::fixture::roll_manifest;
use lockstep_integration::lab::{Family, Lab, POD_CIDRS, Place};
use lockstep_integration::product::{Mode, PATIENCE, Product, wait_until};
use lockstep_integration::traffic::{Outcome, POD_PORT, Transport, probe};

/// The one node.
const NODE: Place = Place::Node(1);
/// The two endpoints of `roll`.
const FIRST: Place = Place::Pod(1, 1);
const SECOND: Place = Place::Pod(1, 2);

/// One node in IPVS mode with `roll` alone, whose two endpoints are here; its agent has these flags.
/// Nothing runs yet but the pods.
fn product_with(flags: &[&str]) -> Result<Product> {
    let mut product = Product::new(Lab::new(1, 2)?, &[Mode::Ipvs])?;
    let pods = format!("--cluster-cidr={POD_CIDRS}");
    product.set_agent_flags(&[&[pods.as_str()], flags].concat());
    product.write_manifest("nodes.yaml", &product.node_manifest())?;
    product.write_manifest("roll.yaml", &roll_manifest(&[FIRST, SECOND]))?;
    Ok(product)
}

/// The same, running and verified.
fn started_with(flags: &[&str]) -> Result<Product> {
    let mut product = product_with(flags)?;
    product.start()?;
    Ok(product)
}

/// `roll` has these endpoints, and the node has verified that.
fn roll_to(product: &Product, pods: &[Place]) -> Result<()> {
    product.change(|product| product.write_manifest("roll.yaml", &roll_manifest(pods)))
}

/// What `ipvsadm` would need to make all virtual servers anew, as it prints it.
fn virtual_servers(product: &Product) -> Result<String> {
    product.lab.tool(NODE, &["ipvsadm", "-Sn"])
}

/// Weight of an endpoint at a virtual server of TCP; `None` = it is not there.
fn weight(product: &Product, server: SocketAddr, pod: Place) -> Result<Option<u32>> {
    let begin = format!("-a -t {server} -r {}:{POD_PORT} -m -w ", pod.address(Family::V4));
    let servers = virtual_servers(product)?;
    let Some(weight) = servers.lines().find_map(|line| line.trim_end().strip_prefix(&begin)) else {
        return Ok(None);
    };
    Ok(Some(weight.parse().with_context(|| servers.clone())?))
}

/// Addresses on our interface, as `ip` lists them; an error where it is not there.
fn bound(product: &Product) -> Result<String> {
    product.lab.tool(NODE, &["ip", "-oneline", "addr", "show", "dev", "kube-ipvs0"])
}

/// Everything of ours that there is without the chains, and everything of the same kind that is not, in
/// an order that does not depend on how it came to be.
fn state(product: &Product) -> Result<String> {
    let mut text = String::new();
    let sets = product.lab.tool(NODE, &["ipset", "save"])?;
    for part in [virtual_servers(product)?, sets, bound(product).unwrap_or_default()] {
        // How long an address stays is of no interest, and neither is what a set is hashed with.
        let lines = part.lines().map(|line| line.split(" initval ").next().unwrap_or(line));
        let numberless = lines.map(|line| line.split_once(": ").map_or(line, |(_, rest)| rest));
        let lines: BTreeSet<&str> = numberless.collect();
        text.extend(lines.into_iter().flat_map(|line| [line, "\n"]));
    }
    Ok(text)
}

/// Waits until the control plane knows of more repairs than `before`.
fn counted(product: &Product, before: u64) -> Result<()> {
    wait_until("the repair is counted", PATIENCE, || Ok((repairs(product)? > before).then_some(())))
}

fn repairs(product: &Product) -> Result<u64> {
    let nodes = product.list_nodes()?.nodes;
    Ok(nodes.first().context("no node is listed")?.drift_repairs)
}

/// What the node says of its backend; empty = nothing is wrong.
fn backend_error(product: &Product) -> Result<String> {
    let nodes = product.list_nodes()?.nodes;
    Ok(nodes.into_iter().next().map(|node| node.backend_error).unwrap_or_default())
}

/// Every one of some connections to `to` is answered by one of these.
fn only_answer(product: &Product, from: Place, to: SocketAddr, pods: &[Place]) -> Result<()> {
    for _ in 0..6 {
        let outcome = probe(&product.lab, from, Transport::Tcp, to)?;
        ensure!(
            matches!(outcome, Outcome::Answered { by, .. } if pods.contains(&by)),
            "{from} -> {to}: expected an answer by {pods:?}: {outcome}\n{}\n{}",
            virtual_servers(product)?,
            product.logs()
        );
    }
    Ok(())
}
