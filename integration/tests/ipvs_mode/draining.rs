//! Connections to what is no longer wanted. They end by a reset where a test waits for what follows:
//! after a FIN, the kernel keeps a connection for two minutes, as long as a late packet may take.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lockstep_integration::fixture::roll;
use lockstep_integration::foreign::has_rules_of;
use lockstep_integration::lab::Place;
use lockstep_integration::product::{Mode, PATIENCE, Product, wait_until};
use lockstep_integration::traffic::{Conversation, Outcome, Transport, probe};

use crate::{FIRST, NODE, SECOND, bound, only_answer, roll_to, started_with, virtual_servers, weight};

/// Where clients of `roll` are.
const CLIENTS: [Place; 3] = [Place::Outside, NODE, FIRST];

/// A connection to the pod from each of them; others that began meanwhile have been reset.
fn conversations(product: &Product, with: Place) -> Result<Vec<Conversation>> {
    let begin = |from: Place| -> Result<Conversation> {
        for _ in 0..4 {
            let open = Conversation::begin(&product.lab, from, roll())?;
            if open.with == with {
                return Ok(open);
            }
            open.reset()?;
        }
        anyhow::bail!("{from}: no connection to {with}\n{}", virtual_servers(product)?)
    };
    CLIENTS.into_iter().map(begin).collect()
}

fn go_on(open: &mut [Conversation], when: &str) -> Result<()> {
    open.iter_mut().try_for_each(|open| open.go_on().with_context(|| when.to_owned()))
}

fn ensure_weight(product: &Product, pod: Place, expected: Option<u32>, when: &str) -> Result<()> {
    let found = weight(product, roll(), pod)?;
    ensure!(
        found == expected,
        "{when}: {pod} has weight {found:?}, expected {expected:?}\n{}",
        virtual_servers(product)?
    );
    Ok(())
}

#[test]
fn an_endpoint_that_leaves_keeps_its_connections_and_gets_no_new_ones() -> Result<()> {
    let product = started_with(&[])?;
    let mut open = conversations(&product, SECOND)?;
    roll_to(&product, &[FIRST])?;
    ensure_weight(&product, SECOND, Some(0), "it left with open connections")?;
    go_on(&mut open, "after the endpoint left")?;
    only_answer(&product, Place::Outside, roll(), &[FIRST])?;
    only_answer(&product, NODE, roll(), &[FIRST])?;

    roll_to(&product, &[FIRST, SECOND])?;
    ensure_weight(&product, SECOND, Some(1), "it came back")?;
    go_on(&mut open, "after the endpoint came back")?;
    let mut more = conversations(&product, SECOND)?;
    go_on(&mut more, "to the endpoint that came back")?;

    roll_to(&product, &[FIRST])?;
    ensure_weight(&product, SECOND, Some(0), "it left again")?;
    go_on(&mut open, "after the endpoint left again")?;
    open.into_iter().chain(more).try_for_each(Conversation::reset)?;
    let ended = Instant::now();
    wait_until("the endpoint is gone", PATIENCE, || {
        Ok(weight(&product, roll(), SECOND)?.is_none().then_some(()))
    })
    .with_context(|| virtual_servers(&product).unwrap_or_default())?;
    println!("the endpoint left {:.1?} after its last connection ended", ended.elapsed());
    only_answer(&product, Place::Outside, roll(), &[FIRST])
}

/// What becomes of a connection to `roll`, from everywhere.
fn outcomes(product: &Product, transport: Transport, to: SocketAddr) -> Result<Vec<Outcome>> {
    CLIENTS.into_iter().map(|from| probe(&product.lab, from, transport, to)).collect()
}

#[test]
fn a_service_that_is_deleted_keeps_its_connections_and_refuses_new_ones() -> Result<()> {
    let product = started_with(&[])?;
    let mut open = conversations(&product, SECOND)?;
    // There must be something left to be programmed.
    product.write_manifest("other.yaml", OTHER)?;
    product.change(|product| product.remove_manifest("roll.yaml"))?;
    go_on(&mut open, "after the Service was deleted")?;
    let address = roll().ip().to_string();
    for outcome in outcomes(&product, Transport::Tcp, roll())? {
        ensure!(outcome == Outcome::Refused, "a new connection: {outcome}");
    }
    ensure!(bound(&product)?.contains(&address), "its address is gone, and its connections go on");
    ensure_weight(&product, SECOND, Some(0), "it was deleted")?;

    open.into_iter().try_for_each(Conversation::reset)?;
    wait_until("the Service is gone", PATIENCE, || {
        let left = virtual_servers(&product)?.contains(&address) || bound(&product)?.contains(&address);
        Ok((!left).then_some(()))
    })
    .with_context(|| virtual_servers(&product).unwrap_or_default())?;
    let sets = product.lab.tool(NODE, &["ipset", "save"])?;
    ensure!(!sets.contains(&address), "sets name it still:\n{sets}");
    Ok(())
}

const OTHER: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: other, namespace: default, uid: uid-other}\n\
    spec: {clusterIP: 10.96.0.77, clusterIPs: [10.96.0.77], ports: [{port: 53, protocol: UDP}]}\n";

#[test]
fn connections_are_cut_when_an_endpoint_had_its_time() -> Result<()> {
    let product = started_with(&["--ipvs-drain-timeout=1s"])?;
    let mut open = conversations(&product, SECOND)?;
    go_on(&mut open, "at first")?;
    roll_to(&product, &[FIRST])?;
    wait_until("the endpoint is gone", PATIENCE, || {
        Ok(weight(&product, roll(), SECOND)?.is_none().then_some(()))
    })?;
    for mut open in open {
        ensure!(open.go_on().is_err(), "a connection to {} goes on", open.with);
    }
    only_answer(&product, Place::Outside, roll(), &[FIRST])
}

#[test]
fn a_mode_that_is_left_goes_with_its_last_connection() -> Result<()> {
    let mut product = started_with(&[])?;
    let mut open = conversations(&product, SECOND)?;
    product.agent(1)?.terminate()?;
    product.set_mode(1, Mode::Nftables);
    product.start_agent(1)?;
    product.agent(1)?.wait_for_log("IPVS keeps its connections")?;
    product.wait_verified(0)?;
    go_on(&mut open, "in the next mode")?;
    only_answer(&product, Place::Outside, roll(), &[FIRST, SECOND])?;
    ensure!(!has_rules_of(&product, Mode::Ipvs)?, "chains of IPVS mode are left");

    open.into_iter().try_for_each(Conversation::reset)?;
    product.agent(1)?.wait_for_log("the last connection of IPVS has ended")?;
    ensure!(bound(&product).is_err(), "the interface is left: {}", bound(&product)?);
    ensure!(!virtual_servers(&product)?.contains(&roll().to_string()), "a virtual server is left");
    let sets = product.lab.tool(NODE, &["ipset", "list", "-n"])?;
    ensure!(!sets.contains("KUBE-"), "sets are left: {sets}");
    for tool in ["iptables-nft-save", "ip6tables-nft-save"] {
        let rules = product.lab.tool(NODE, &[tool])?;
        ensure!(!rules.contains("KUBE-"), "chains are left:\n{rules}");
    }
    only_answer(&product, Place::Outside, roll(), &[FIRST, SECOND])
}
