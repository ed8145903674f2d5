//! A node that goes over from the real kube-proxy, in any of its modes, to Lockstep in any of ours:
//! connections go on, new ones find an endpoint at any moment, and nothing that kube-proxy left decides
//! about a new one any more. Needs root and the real programs.
#![allow(clippy::print_stdout, reason = "what was measured belongs in the report")]

use std::fs;
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lockstep_integration::apiserver::Server;
use lockstep_integration::fixture::{self, WEB_NODE_PORT, conversations, go_on, only_answer, roll, web};
use lockstep_integration::guest::{self, bearable};
use lockstep_integration::kube_proxy;
use lockstep_integration::lab::{Family, Place};
use lockstep_integration::load::Load;
use lockstep_integration::objects::Objects;
use lockstep_integration::product::{Mode, PATIENCE, Product, wait_until};
use lockstep_integration::relay::Relay;
use lockstep_integration::traffic::{Outcome, Transport, probe};
use tokio::runtime::Runtime;

/// Connections a second while one goes and the other comes.
const LOAD: u32 = 100;

/// In the guest one of the two is in IPVS mode: every kernel shows the others.
#[test]
fn every_mode_takes_over_from_every_mode_of_kube_proxy() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let server = runtime.block_on(Server::find())?;
    let mut objects = Objects::new(runtime.block_on(server.cluster())?);
    for from in Mode::here() {
        for to in Mode::here() {
            if guest::is_here() && ![from, to].contains(&Mode::Ipvs) {
                continue;
            }
            let begun = Instant::now();
            let what = || format!("kube-proxy {} -> {}", from.name(), to.name());
            goes_over(from, to, &runtime, &server, &mut objects).with_context(what)?;
            println!("{}: {:.1?}", what(), begun.elapsed());
        }
    }
    runtime.block_on(objects.make(""))
}

fn goes_over(from: Mode, to: Mode, runtime: &Runtime, server: &Server, objects: &mut Objects) -> Result<()> {
    let mut product = fixture::product(&[to])?;
    // Both get the same objects, each in its own way.
    let manifests = ["nodes.yaml", "web.yaml", "roll.yaml"].map(|name| product.manifests().join(name));
    let manifests = manifests.iter().map(fs::read_to_string).collect::<Result<Vec<_>, _>>()?;
    runtime.block_on(objects.make(&manifests.join("\n---\n")))?;
    let relay = Relay::open(&product.lab, server.kubeconfig())?;
    let mut theirs = kube_proxy::start_prompt(&product.lab, 1, from, relay.kubeconfig())?;
    let families = kube_proxy::families(from);
    let programmed = wait_until("kube-proxy has the Services", PATIENCE, || {
        Ok(answers_everywhere(&product, families)?.then_some(()))
    });
    programmed.with_context(|| theirs.log())?;
    ensure!(is_there(&product, from)?, "no rules of kube-proxy");

    let mut open = conversations(&product, families)?;
    let mut streams = fixture::streams_to_web(&product);
    streams.retain(|stream| families.iter().any(|family| stream.to.is_ipv6() == (*family == Family::V6)));
    let load = Load::start(&product.lab, streams, bearable(LOAD));
    load.go_on(1)?;
    theirs.terminate()?;
    product.start()?;
    load.go_on(3)?;
    go_on(&mut open, "after it took over")?;

    let moved = fixture::roll_manifest(&[Place::Pod(1, 1)]);
    product.change(|product| product.write_manifest("roll.yaml", &moved))?;
    only_answer(&product, Place::Pod(1, 1))?;
    go_on(&mut open, "after the endpoint left")?;
    ensure!(shares_rules(from, to) || !is_there(&product, from)?, "rules of kube-proxy are left");
    let (report, _) = load.finish()?;
    ensure!(!report.answers.is_empty() && report.faults.is_empty(), "a gap: {:?}", report.faults);
    Ok(())
}

/// True once every Service is answered in every way that is asked for later.
fn answers_everywhere(product: &Product, families: &[Family]) -> Result<bool> {
    let mut asked = vec![(Place::Node(1), Transport::Tcp, roll())];
    for family in families {
        asked.push((Place::Pod(1, 2), Transport::Udp, web(*family)));
        let node_port = SocketAddr::new(Place::Node(1).address(*family), WEB_NODE_PORT);
        asked.push((Place::Outside, Transport::Tcp, node_port));
    }
    for (from, transport, to) in asked {
        if !matches!(probe(&product.lab, from, transport, to)?, Outcome::Answered { .. }) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// True where both write chains of one name in one flavour, so that the sign of the one is the other's too.
/// kube-proxy in IPVS mode has the legacy flavour here, and ours the nft one.
fn shares_rules(kube_proxy: Mode, ours: Mode) -> bool {
    match kube_proxy {
        Mode::Nftables => false,
        Mode::IptablesLegacy | Mode::Ipvs => ours == Mode::IptablesLegacy,
        Mode::IptablesNft => matches!(ours, Mode::IptablesNft | Mode::Ipvs),
    }
}

/// True where the node's packets meet what a kube-proxy of this mode writes.
fn is_there(product: &Product, from: Mode) -> Result<bool> {
    let (tool, sign): (&[&str], _) = match from {
        Mode::Nftables => (&["nft", "list", "tables"], "kube-proxy"),
        Mode::IptablesNft => (&["iptables-nft-save", "-t", "nat"], "-j KUBE-SERVICES"),
        Mode::IptablesLegacy | Mode::Ipvs => (&["iptables-legacy-save", "-t", "nat"], "-j KUBE-SERVICES"),
    };
    Ok(product.lab.tool(Place::Node(1), tool)?.contains(sign))
}
