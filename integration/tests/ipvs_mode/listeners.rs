//! Addresses of Services are the node's own in this mode, and what listens at every address of the node
//! must not answer there.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use lockstep_integration::fixture::{started, web};
use lockstep_integration::lab::{Family, Place};
use lockstep_integration::product::{Mode, Product};
use lockstep_integration::traffic::{OTHER_POD_PORT, Outcome, POD_PORT, Transport, probe};

use crate::NODE;

const CLIENTS: [Place; 3] = [Place::Outside, NODE, Place::Pod(1, 2)];

#[test]
fn what_the_node_listens_at_does_not_answer_at_a_services_address() -> Result<()> {
    let product = started(&[Mode::Ipvs])?;
    for family in [Family::V4, Family::V6] {
        for (from, transport) in
            CLIENTS.into_iter().flat_map(|from| [(from, Transport::Tcp), (from, Transport::Udp)])
        {
            for port in [POD_PORT, OTHER_POD_PORT] {
                let to = SocketAddr::new(web(family).ip(), port);
                let outcome = probe(&product.lab, from, transport, to)?;
                ensure!(outcome == Outcome::Refused, "{from} -> {to} {transport:?}: {outcome}");
            }
        }
        for from in CLIENTS {
            let own = SocketAddr::new(NODE.address(family), POD_PORT);
            let outcome = probe(&product.lab, from, Transport::Tcp, own)?;
            let answers = matches!(outcome, Outcome::Answered { by: NODE, .. });
            ensure!(answers, "nothing listens: {from} -> {own}: {outcome}");
        }
    }
    Ok(())
}

/// Sends one echo request; true where it was answered.
fn ping(product: &Product, from: Place, to: IpAddr) -> Result<bool> {
    let to = to.to_string();
    Ok(product.lab.command(from, "ping").args(["-c", "1", "-W", "4", &to]).output()?.status.success())
}

/// ICMP errors of the kind "unreachable" that a place received.
fn unreachables(product: &Product, place: Place, family: Family) -> Result<u64> {
    // `/proc/net` is that of the process's first thread, which stays where it was.
    let read = |path: &str| std::fs::read_to_string(path);
    let found = match family {
        Family::V4 => {
            let text = product.lab.inside(place, || read("/proc/thread-self/net/snmp"))??;
            let mut lines = text.lines().filter_map(|line| line.strip_prefix("Icmp: "));
            let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
            let mut found = names.split(' ').zip(values.split(' '));
            found.find(|(name, _)| *name == "InDestUnreachs").map(|(_, value)| value.to_owned())
        }
        Family::V6 => {
            let text = product.lab.inside(place, || read("/proc/thread-self/net/snmp6"))??;
            let found = text.lines().find_map(|line| line.strip_prefix("Icmp6InDestUnreachs"));
            found.map(|value| value.trim().to_owned())
        }
    };
    Ok(found.context("no count of ICMP errors")?.parse()?)
}

#[test]
fn an_echo_request_to_a_services_address_is_refused() -> Result<()> {
    let product = started(&[Mode::Ipvs])?;
    for family in [Family::V4, Family::V6] {
        for from in [Place::Outside, Place::Pod(1, 2)] {
            ensure!(ping(&product, from, NODE.address(family))?, "{from}: no ping at all, {family}");
            let before = unreachables(&product, from, family)?;
            ensure!(!ping(&product, from, web(family).ip())?, "{from}: the address answers, {family}");
            ensure!(unreachables(&product, from, family)? > before, "{from}: no refusal, {family}");
        }
    }
    Ok(())
}
