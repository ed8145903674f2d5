//! What is ours in the kernel and what is not: foreign changes to our rules are repaired, and
//! foreign rules are never touched. Needs root.
#![allow(clippy::print_stdout, reason = "what was measured belongs in the report")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lockstep_integration::bench::drift::{self, Repair};
use lockstep_integration::fixture::{self, WEB_NODE_PORT, product, started, web};
use lockstep_integration::lab::{Family, Place};
use lockstep_integration::load::Load;
use lockstep_integration::product::{Mode, PATIENCE, Process, Product, binaries, wait_until};
use lockstep_integration::traffic::{Outcome, Transport, probe, probe_within};

/// From a change that somebody else makes to traffic again, on a machine under load. On an idle
/// one it is a fraction of a second: the agent looks five times a second.
const REPAIRED_WITHIN: Duration = Duration::from_secs(2);
/// The same for iptables, which starts programs for it and, in legacy, moves whole tables.
const IPTABLES_REPAIRED_WITHIN: Duration = Duration::from_secs(10);
/// Where nothing but reading all rules shows the change: a minute between two audits, and their
/// share of a core.
const AUDITED_WITHIN: Duration = Duration::from_secs(120);
const TRIES: u32 = 3;
/// Connections a second while the mode changes.
const LOAD: u32 = 100;

/// Rules of a node, without counters, as the kernel's own tools list them.
fn rules(product: &Product, node: u8) -> Result<String> {
    let place = Place::Node(node);
    let mut text = product.lab.tool(place, &["nft", "--stateless", "list", "ruleset"])?;
    for tool in ["iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save"] {
        let saved = product.lab.tool(place, &[tool])?;
        text.extend(saved.lines().filter(|line| !line.starts_with('#')).map(without_counters));
    }
    Ok(text)
}

/// `:INPUT ACCEPT [5:300]` without what packets change.
fn without_counters(line: &str) -> String {
    format!("{}\n", line.split(" [").next().unwrap_or(line))
}

/// The same without anything that is Lockstep's while it runs.
fn foreign_rules(product: &Product, node: u8) -> Result<String> {
    let place = Place::Node(node);
    let mut text = String::new();
    for table in product.lab.tool(place, &["nft", "list", "tables"])?.lines() {
        let words: Vec<&str> = table.split(' ').collect();
        let [_, family, name] = words[..] else { bail!("a table called {table:?}") };
        // Tables of iptables-nft are read below, by the tool whose they are.
        let of_iptables = matches!(family, "ip" | "ip6") && matches!(name, "nat" | "filter" | "mangle");
        if name != "lockstep" && !of_iptables {
            text += &product.lab.tool(place, &["nft", "--stateless", "list", "table", family, name])?;
        }
    }
    for tool in ["iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save"] {
        let saved = product.lab.tool(place, &[tool])?;
        let theirs = |line: &&str| {
            let ours = line.contains("KUBE-") && !FOREIGN_KUBE.iter().any(|chain| line.contains(chain));
            !line.starts_with('#') && !ours
        };
        text.extend(saved.lines().filter(theirs).map(without_counters));
    }
    Ok(text)
}

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

/// Chains of kube-proxy's prefix that are kubelet's.
const FOREIGN_KUBE: [&str; 2] = ["KUBE-FIREWALL", "KUBE-KUBELET-CANARY"];

/// As firewalld has it: one table for both families, high priorities, sets, maps, counters.
const LIKE_FIREWALLD: &str = "
table inet firewalld {
    set trusted { type ipv4_addr; flags interval; elements = { 192.0.2.0/24, 198.51.100.7 } }
    chain nat_PREROUTING { type nat hook prerouting priority dstnat + 10; policy accept; jump nat_PREROUTING_ZONES; }
    chain nat_PREROUTING_ZONES { iifname \"nowhere0\" goto nat_PRE_public; goto nat_PRE_public; }
    chain nat_PRE_public { return; }
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state established,related accept
        ip saddr @trusted counter accept
        tcp dport 12345 counter drop comment \"theirs\"
    }
}
table ip services { chain services { tcp dport 12346 drop; }; }
";

/// As Docker, Calico and kubelet have it.
const LIKE_DOCKER_AND_CALICO: &str = "
*nat
:DOCKER - [0:0]
:cali-PREROUTING - [0:0]
:cali-POSTROUTING - [0:0]
-A PREROUTING -m comment --comment \"cali:6gwbT8clXdHdC1b1\" -j cali-PREROUTING
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -m comment --comment \"cali:O3lYWMrLQYEMJtB5\" -j cali-POSTROUTING
-A DOCKER -p tcp -m tcp --dport 9999 -j REDIRECT --to-ports 9998
-A cali-PREROUTING -p udp -m udp --dport 9997 -j ACCEPT
COMMIT
*mangle
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*filter
:DOCKER-USER - [0:0]
:KUBE-FIREWALL - [0:0]
:cali-FORWARD - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-FORWARD
-A FORWARD -j DOCKER-USER
-A OUTPUT -j KUBE-FIREWALL
-A DOCKER-USER -j RETURN
-A KUBE-FIREWALL -m comment --comment \"block marked\" -m mark --mark 0x8000/0x8000 -j DROP
-A cali-FORWARD -p tcp -m tcp --dport 9996 -j DROP
COMMIT
";

/// kubelet's guard of the loopback, IPv4 alone. Node ports at 127.0.0.1 need the same.
const LIKE_KUBELET: &str = "KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" \
    -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP";

/// Gives every node what other programs have in the kernel.
fn add_foreign_rules(product: &Product) -> Result<()> {
    let files = product.lab.directory().to_path_buf();
    std::fs::write(files.join("foreign.nft"), LIKE_FIREWALLD)?;
    std::fs::write(files.join("foreign.iptables"), LIKE_DOCKER_AND_CALICO)?;
    for node in 1..=product.lab.nodes() {
        let place = Place::Node(node);
        product.lab.tool(place, &["nft", "-f", &files.join("foreign.nft").display().to_string()])?;
        for tool in ["iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft"] {
            let restore = format!("{tool}-restore < {}", files.join("foreign.iptables").display());
            product.lab.tool(place, &["sh", "-c", &restore])?;
            if !tool.starts_with("ip6") {
                product.lab.tool(place, &["sh", "-c", &format!("{tool} -A {LIKE_KUBELET}")])?;
            }
        }
    }
    Ok(())
}

#[test]
fn foreign_rules_are_byte_identical_during_a_run_and_after_cleanup() -> Result<()> {
    let mut product = product(&Mode::ALL)?;
    add_foreign_rules(&product)?;
    let nodes = 1..=3;
    let whole: Vec<_> = nodes.clone().map(|node| rules(&product, node)).collect::<Result<_>>()?;
    let foreign: Vec<_> = nodes.clone().map(|node| foreign_rules(&product, node)).collect::<Result<_>>()?;
    for text in &foreign {
        for part in ["12345", "12346", "9999", "cali-FORWARD", "KUBE-FIREWALL", "KUBE-KUBELET-CANARY"] {
            ensure!(text.matches(part).count() >= 1, "{part} is not there:\n{text}");
        }
    }
    product.start()?;
    let out = [Place::Pod(2, 2)];
    product.change(|product| product.write_manifest("roll.yaml", &fixture::roll_manifest(&out)))?;
    for (node, before) in nodes.clone().zip(&foreign) {
        same(node, "while Lockstep runs", before, &foreign_rules(&product, node)?)?;
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
fn iptables_to_nftables_leaves_no_rule_of_iptables() -> Result<()> {
    switches(Mode::IptablesLegacy, Mode::Nftables)
}

#[test]
fn nftables_to_iptables_leaves_no_rule_of_nftables() -> Result<()> {
    switches(Mode::Nftables, Mode::IptablesLegacy)
}

#[test]
fn legacy_to_the_nft_flavour_leaves_no_rule_of_legacy() -> Result<()> {
    switches(Mode::IptablesLegacy, Mode::IptablesNft)
}

/// An agent that comes back in another mode: the old mode's rules would go on sending to an endpoint
/// that is gone, whatever the new mode's say.
fn switches(from: Mode, to: Mode) -> Result<()> {
    let mut product = product(&[from])?;
    add_foreign_rules(&product)?;
    let foreign = foreign_rules(&product, 1)?;
    product.start()?;
    ensure!(
        has_rules_of(&product, from)? && !has_rules_of(&product, to)?,
        "not only {} at first",
        from.name()
    );
    only_answer(&product, Place::Pod(1, 2))?;

    product.agent(1)?.kill()?;
    product.set_mode(1, to);
    let load = Load::start(&product.lab, fixture::streams_to_web(&product), LOAD);
    product.start_agent(1)?;
    product.agent(1)?.wait_for_log("removed the rules of a mode")?;
    load.go_on(3)?;
    let moved = fixture::roll_manifest(&[Place::Pod(1, 1)]);
    product.change(|product| product.write_manifest("roll.yaml", &moved))?;
    only_answer(&product, Place::Pod(1, 1))?;
    ensure!(!has_rules_of(&product, from)?, "rules of {} are left:\n{}", from.name(), rules(&product, 1)?);
    ensure!(has_rules_of(&product, to)?, "no rules of {}", to.name());
    same(1, "after the switch", &foreign, &foreign_rules(&product, 1)?)?;
    let (report, _) = load.finish()?;
    ensure!(!report.answers.is_empty() && report.faults.is_empty(), "a gap: {:?}", report.faults);
    Ok(())
}

/// Every one of some connections to `roll` is answered by this pod.
fn only_answer(product: &Product, pod: Place) -> Result<()> {
    for _ in 0..10 {
        let outcome = probe(&product.lab, Place::Node(1), Transport::Tcp, fixture::roll())?;
        ensure!(
            matches!(outcome, Outcome::Answered { by, .. } if by == pod),
            "expected an answer by {pod}: {outcome}\n{}",
            product.logs()
        );
    }
    Ok(())
}

/// True where the kernel of node 1 has rules of Lockstep in this mode.
fn has_rules_of(product: &Product, mode: Mode) -> Result<bool> {
    let tools: [&[&str]; 2] = match mode {
        Mode::Nftables => [&["nft", "list", "tables"], &["nft", "list", "tables"]],
        Mode::IptablesLegacy => [&["iptables-legacy-save"], &["ip6tables-legacy-save"]],
        Mode::IptablesNft | Mode::Ipvs => [&["iptables-nft-save"], &["ip6tables-nft-save"]],
    };
    let mut found = false;
    for tool in tools {
        let text = product.lab.tool(Place::Node(1), tool)?;
        found |= text.lines().any(|line| {
            let theirs = FOREIGN_KUBE.iter().any(|chain| line.contains(chain));
            line.ends_with(" lockstep") || (line.contains("KUBE-") && !theirs)
        });
    }
    Ok(found)
}

fn same(node: u8, when: &str, before: &str, after: &str) -> Result<()> {
    if before == after {
        return Ok(());
    }
    let gone = before.lines().filter(|line| !after.contains(line));
    let new = after.lines().filter(|line| !before.contains(line));
    let lines: Vec<String> =
        gone.map(|line| format!("- {line}")).chain(new.map(|line| format!("+ {line}"))).collect();
    bail!("node{node}, {when}: foreign rules changed (or their order):\n{}", lines.join("\n"))
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
