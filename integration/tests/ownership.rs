//! What is ours in the kernel and what is not: foreign changes to our rules are repaired, and
//! foreign rules are never touched. Needs root.
#![allow(clippy::print_stdout, reason = "what was measured belongs in the report")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lockstep_integration::bench::drift::{self, Repair};
use lockstep_integration::fixture::{self, WEB_NODE_PORT, product, started, web};
use lockstep_integration::foreign::{self, rules, rules_of_others, same};
use lockstep_integration::lab::{Family, Place};
use lockstep_integration::product::{Mode, PATIENCE, Process, Product, binaries, wait_until};
use lockstep_integration::traffic::{Outcome, Transport, probe_within};

/// From a change that somebody else makes to traffic again, on a machine under load. On an idle
/// one it is a fraction of a second: the agent looks five times a second.
const REPAIRED_WITHIN: Duration = Duration::from_secs(2);
/// The same for iptables, which starts programs for it and, in legacy, moves whole tables.
const IPTABLES_REPAIRED_WITHIN: Duration = Duration::from_secs(10);
/// Where nothing but reading all rules shows the change: a minute between two audits, and their
/// share of a core.
const AUDITED_WITHIN: Duration = Duration::from_secs(120);
const TRIES: u32 = 3;

/// Waits until a TCP connection is answered; returns how long it took.
fn answered(
    product: &Product,
    from: Place,
    family: Family,
    begun: Instant,
    limit: Duration,
) -> Result<Duration> {
    wait_until("traffic works again", limit + PATIENCE, || {
        let patience = Duration::from_millis(50);
        let outcome = probe_within(&product.lab, from, Transport::Tcp, web(family), patience)?;
        let good = matches!(outcome, Outcome::Answered { by: Place::Pod(_, 1), .. });
        Ok(good.then(|| begun.elapsed()))
    })
    .with_context(|| product.logs())
}

fn repairs(product: &Product, node: u8) -> Result<u64> {
    let nodes = product.list_nodes()?.nodes;
    let node = nodes.into_iter().find(|status| status.node_name == format!("node{node}"));
    Ok(node.context("the node is not listed")?.drift_repairs)
}

/// Makes a change and measures until traffic works again; then the change is counted and the
/// rules are as they were.
fn repaired(product: &Product, node: u8, family: Family, change: &[&str]) -> Result<Duration> {
    let (before, count) = (rules(product, node)?, repairs(product, node)?);
    let begun = Instant::now();
    product.lab.tool(Place::Node(node), change)?;
    let took = answered(product, Place::Pod(node, 2), family, begun, IPTABLES_REPAIRED_WITHIN)?;
    wait_until("the repair is counted", PATIENCE, || Ok((repairs(product, node)? > count).then_some(())))
        .with_context(|| change.join(" "))?;
    wait_until("the rules are as before", PATIENCE, || Ok((rules(product, node)? == before).then_some(())))?;
    Ok(took)
}

fn ensure_quick(name: &str, mut times: Vec<Duration>, limit: Duration) -> Result<()> {
    times.sort();
    let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{name}: traffic again after {median:.0?} (median of {}), {longest:.0?} at most", times.len());
    ensure!(longest <= limit, "{name}: {longest:?} until traffic worked again");
    Ok(())
}

#[test]
fn nftables_drift_among_a_thousand_services_is_repaired_and_reported_within_a_second() -> Result<()> {
    for repair in drift::measure(1_000, &binaries()?, TRIES)? {
        let Repair { change, tool, repaired, reported } = repair;
        println!(
            "{change}: in the kernel again after {repaired:.0?}, reported after {reported:.0?} (nft: {tool:.0?})"
        );
        ensure!(reported <= REPAIRED_WITHIN, "{change}: {reported:?} until the repair was reported");
    }
    Ok(())
}

#[test]
fn nftables_changed_by_others_are_repaired_within_a_second_and_counted() -> Result<()> {
    let product = started(&[Mode::Nftables])?;
    for family in [Family::V4, Family::V6] {
        let table = if family == Family::V4 { "ip" } else { "ip6" };
        let element = format!("{{ {} . tcp . 80 }}", web(family).ip());
        let changes: [(&str, Vec<&str>); 4] = [
            ("element deleted", vec!["nft", "delete", "element", table, "lockstep", "frontends", &element]),
            ("chain emptied", vec!["nft", "flush", "chain", table, "lockstep", "services"]),
            ("table flushed", vec!["nft", "flush", "table", table, "lockstep"]),
            ("table deleted", vec!["nft", "delete", "table", table, "lockstep"]),
        ];
        for (name, change) in changes {
            let times = (0..TRIES).map(|_| repaired(&product, 1, family, &change)).collect::<Result<_>>()?;
            ensure_quick(&format!("nftables, {family}, {name}"), times, REPAIRED_WITHIN)?;
        }
    }
    Ok(())
}

#[test]
fn iptables_changed_by_others_are_repaired_at_the_next_look_and_counted() -> Result<()> {
    let modes = [Mode::IptablesLegacy, Mode::IptablesNft];
    let product = started(&modes)?;
    for (node, mode) in (1..).zip(modes) {
        for family in [Family::V4, Family::V6] {
            let tool = tool(mode, family);
            let changes: [(&str, Vec<&str>); 2] = [
                ("chain emptied", vec![&tool, "-t", "nat", "-F", "KUBE-SERVICES"]),
                ("table flushed", vec![&tool, "-t", "nat", "-F"]),
            ];
            for (name, change) in changes {
                let times =
                    (0..TRIES).map(|_| repaired(&product, node, family, &change)).collect::<Result<_>>()?;
                ensure_quick(&format!("{}, {family}, {name}", mode.name()), times, IPTABLES_REPAIRED_WITHIN)?;
            }
        }
    }
    Ok(())
}

fn tool(mode: Mode, family: Family) -> String {
    let version = if family == Family::V4 { "iptables" } else { "ip6tables" };
    let flavour = if mode == Mode::IptablesNft { "nft" } else { "legacy" };
    format!("{version}-{flavour}")
}

/// An edit that keeps the table's size is the one kind that legacy iptables gives no sign of.
#[test]
fn an_edit_of_legacy_iptables_that_keeps_its_size_is_found_by_the_audit() -> Result<()> {
    let product = started(&[Mode::IptablesLegacy])?;
    let before = rules(&product, 1)?;
    let rule = before
        .lines()
        .find(|line| line.starts_with("-A KUBE-SEP-") && line.contains("--to-destination 10.244.1.1:"))
        .context("no rule for the endpoint 10.244.1.1")?;
    let chain = rule.split(' ').nth(1).context("a rule without a chain")?;
    let rules_of_chain: Vec<&str> =
        before.lines().filter(|line| line.starts_with(&format!("-A {chain} "))).collect();
    let position = rules_of_chain.iter().position(|other| other == &rule).context("no position")? + 1;
    // One endpoint for another: the rule has the same matches and the same size.
    let other = rule.replacen(&format!("-A {chain}"), &format!("-R {chain} {position}"), 1);
    let other = other.replace("10.244.1.1:", "10.244.1.2:");
    let begun = Instant::now();
    product.lab.tool(Place::Node(1), &["sh", "-c", &format!("iptables-legacy -t nat {other}")])?;
    ensure!(rules(&product, 1)? != before, "the edit changed nothing");
    wait_until("the audit repairs it", AUDITED_WITHIN, || Ok((rules(&product, 1)? == before).then_some(())))
        .with_context(|| product.logs())?;
    println!("iptables-legacy, edit of equal size: repaired after {:.0?}", begun.elapsed());
    Ok(())
}

#[test]
fn foreign_rules_are_byte_identical_during_a_run_and_after_cleanup() -> Result<()> {
    let mut product = product(&Mode::ALL)?;
    foreign::add(&product)?;
    let nodes = 1..=3;
    let whole: Vec<_> = nodes.clone().map(|node| rules(&product, node)).collect::<Result<_>>()?;
    let others: Vec<_> = nodes.clone().map(|node| rules_of_others(&product, node)).collect::<Result<_>>()?;
    for text in &others {
        for part in ["12345", "12346", "9999", "cali-FORWARD", "KUBE-FIREWALL", "KUBE-KUBELET-CANARY"] {
            ensure!(text.matches(part).count() >= 1, "{part} is not there:\n{text}");
        }
    }
    product.start()?;
    let out = [Place::Pod(2, 2)];
    product.change(|product| product.write_manifest("roll.yaml", &fixture::roll_manifest(&out)))?;
    for (node, before) in nodes.clone().zip(&others) {
        same(node, "while Lockstep runs", before, &rules_of_others(&product, node)?)?;
        let ours = rules(&product, node)?;
        ensure!(ours.contains(&WEB_NODE_PORT.to_string()), "node{node} has no rules of ours");
    }
    product.change(|product| product.remove_manifest("roll.yaml"))?;
    for (node, before) in nodes.zip(&whole) {
        product.agent(node)?.terminate()?;
        product.cleanup(node)?;
        same(node, "after cleanup", before, &rules(&product, node)?)?;
    }
    Ok(())
}

#[test]
fn restarted_agent_adopts_equal_rules_without_a_write() -> Result<()> {
    let mut product = started(&Mode::ALL)?;
    for node in 1..=3 {
        let before = rules(&product, node)?;
        let monitor = Monitor::start(&product, node)?;
        let status = product.agent(node)?.terminate()?;
        ensure!(status.success(), "SIGTERM: {status}");
        ensure!(rules(&product, node)? == before, "node{node}: rules changed when the agent ended");
        product.start_agent(node)?;
        product.wait_verified(0)?;
        monitor.heard_nothing(&product, node)?;
        ensure!(rules(&product, node)? == before, "node{node}: rules differ after the restart");
    }
    for node in product.list_nodes()?.nodes {
        let written = node.last_stats.context("no statistics")?.kernel_objects_changed;
        ensure!(written == 0, "{}: {written} kernel objects written, expected none", node.node_name);
    }
    Ok(())
}

/// `nft monitor` between two transactions of our own.
struct Monitor(Process);

impl Monitor {
    fn start(product: &Product, node: u8) -> Result<Self> {
        let place = Place::Node(node);
        let mut monitor = product.spawn(&format!("monitor-{place}"), place, &["nft", "monitor"])?;
        // It listens from some moment on; a transaction that it tells of came after that.
        wait_until("nft monitor listens", PATIENCE, || {
            product.lab.tool(place, &["nft", "add table ip begin; delete table ip begin"])?;
            ensure!(monitor.ended()?.is_none(), "nft monitor ended:\n{}", monitor.log());
            Ok(monitor.log().contains("table ip begin").then_some(()))
        })?;
        Ok(Self(monitor))
    }

    fn heard_nothing(mut self, product: &Product, node: u8) -> Result<()> {
        product.lab.tool(Place::Node(node), &["nft", "add table ip end; delete table ip end"])?;
        self.0.wait_for_log("table ip end")?;
        let log = self.0.log();
        // A mode is tried out in a table or chains of its own, at every start.
        let expected = ["table ip begin", "table ip end", " lockstep-probe", " LOCKSTEP-PROBE"];
        let heard = |line: &&str| {
            !line.trim().is_empty()
                && !["#", "\t", "}"].iter().any(|start| line.starts_with(start))
                && !expected.iter().any(|name| line.contains(name))
        };
        let heard: Vec<&str> = log.lines().filter(heard).collect();
        ensure!(heard.is_empty(), "node{node}: the kernel was written to:\n{}", heard.join("\n"));
        Ok(())
    }
}

#[test]
fn a_change_made_while_the_agent_is_down_is_all_that_is_written() -> Result<()> {
    let mut product = started(&Mode::ALL)?;
    for node in 1..=3 {
        product.agent(node)?.kill()?;
    }
    let moved = fixture::roll_manifest(&[Place::Pod(2, 2)]);
    let head = product.take_in(|product| product.write_manifest("roll.yaml", &moved))?;
    for node in 1..=3 {
        product.start_agent(node)?;
    }
    product.wait_verified(head)?;
    for node in product.list_nodes()?.nodes {
        let written = node.last_stats.context("no statistics")?.kernel_objects_changed;
        println!("{}: {written} kernel objects written for one endpoint that moved", node.node_name);
        ensure!((1..=12).contains(&written), "{}: {written} kernel objects written", node.node_name);
    }
    Ok(())
}
