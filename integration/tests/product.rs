//! What the whole product survives, and how. Each test is a network of its own with the real
//! programs in it; its name is the stated outcome. Needs root.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lockstep_integration::apiserver::peer;
use lockstep_integration::lab::{Lab, Place};
use lockstep_integration::product::{Mode, PATIENCE, Product, wait_until};
use lockstep_integration::traffic::{Outcome, Transport, probe};

const CLIENT: Place = Place::Pod(1, 2);

fn product(modes: &[Mode]) -> Result<Product> {
    let nodes = u8::try_from(modes.len())?;
    let product = Product::new(Lab::new(nodes, 2)?, modes)?;
    product.write_manifest("nodes.yaml", &product.node_manifest())?;
    product.write_manifest("web.yaml", &web(1))?;
    Ok(product)
}

fn started(modes: &[Mode]) -> Result<Product> {
    let mut product = product(modes)?;
    product.start()?;
    Ok(product)
}

/// A Service with one endpoint: this pod of node 1.
fn web(pod: u8) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: default, uid: uid-web}}\n\
         spec:\n  clusterIP: 10.96.0.10\n  clusterIPs: [10.96.0.10]\n  ports: [{{port: 80, targetPort: 8080}}]\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: web-1, namespace: default, labels: {{kubernetes.io/service-name: web}}}}\n\
         addressType: IPv4\nports: [{{port: 8080}}]\n\
         endpoints: [{{addresses: [10.244.1.{pod}], nodeName: node1}}]\n"
    )
}

fn answers(product: &Product, by: Place) -> Result<()> {
    let outcome = probe(&product.lab, CLIENT, Transport::Tcp, "10.96.0.10:80".parse()?)?;
    ensure!(
        matches!(outcome, Outcome::Answered { by: pod, .. } if pod == by),
        "expected an answer by {by}: {outcome}\n{}",
        product.logs()
    );
    Ok(())
}

/// Rules of a node, without counters, as the kernel's own tools list them.
fn rules(product: &Product, node: u8) -> Result<String> {
    let place = Place::Node(node);
    let mut text = product.lab.tool(place, &["nft", "--stateless", "list", "ruleset"])?;
    for tool in ["iptables-legacy-save", "ip6tables-legacy-save"] {
        let saved = product.lab.tool(place, &[tool])?;
        text.extend(saved.lines().filter(|line| !line.starts_with('#')).map(without_counters));
    }
    Ok(text)
}

/// `:INPUT ACCEPT [5:300]` without what packets change.
fn without_counters(line: &str) -> String {
    format!("{}\n", line.split(" [").next().unwrap_or(line))
}

#[test]
fn control_plane_killed_under_changes_loses_no_connection_and_converges_after_restart() -> Result<()> {
    let mut product = started(&Mode::ALL)?;
    product.write_manifest("web.yaml", &web(2))?;
    product.control_plane()?.kill()?;
    for _ in 0..100 {
        let outcome = probe(&product.lab, CLIENT, Transport::Tcp, "10.96.0.10:80".parse()?)?;
        ensure!(matches!(outcome, Outcome::Answered { .. }), "while there is no control plane: {outcome}");
    }
    product.write_manifest("web.yaml", &web(1))?;
    product.start_control_plane()?;
    product.wait_verified(1)?;
    answers(&product, Place::Pod(1, 1))
}

#[test]
fn agents_killed_under_changes_keep_rules_and_converge_after_restart() -> Result<()> {
    let mut product = started(&Mode::ALL)?;
    for node in 1..=3 {
        product.write_manifest("web.yaml", &web(1 + node % 2))?;
        product.agent(node)?.kill()?;
    }
    let outcome = probe(&product.lab, CLIENT, Transport::Tcp, "10.96.0.10:80".parse()?)?;
    ensure!(matches!(outcome, Outcome::Answered { .. }), "while there is no agent: {outcome}");
    let before = product.head()?;
    product.write_manifest("web.yaml", &web(1))?;
    product
        .write_manifest("more.yaml", &web(1).replace("web", "more").replace("10.96.0.10", "10.96.0.11"))?;
    for node in 1..=3 {
        product.start_agent(node)?;
    }
    product.wait_verified(before + 1)?;
    answers(&product, Place::Pod(1, 1))
}

#[test]
fn restarted_agent_adopts_equal_rules_without_a_write() -> Result<()> {
    let mut product = started(&Mode::ALL)?;
    for node in 1..=3 {
        let before = rules(&product, node)?;
        let status = product.agent(node)?.terminate()?;
        ensure!(status.success(), "SIGTERM: {status}");
        ensure!(rules(&product, node)? == before, "node{node}: rules changed when the agent ended");
        product.start_agent(node)?;
        product.wait_verified(0)?;
        ensure!(rules(&product, node)? == before, "node{node}: rules differ after the restart");
    }
    for node in product.list_nodes()?.nodes {
        let written = node.last_stats.context("no statistics")?.kernel_objects_changed;
        ensure!(written == 0, "{}: {written} kernel objects written, expected none", node.node_name);
    }
    Ok(())
}

#[test]
fn broken_manifest_keeps_its_last_good_content_and_is_reported() -> Result<()> {
    let product = started(&[Mode::Nftables])?;
    product.write_manifest("web.yaml", "kind: Service\nmetadata: [")?;
    wait_until("the broken file is reported", PATIENCE, || {
        let quarantined = product.list_failures()?.quarantined;
        Ok(quarantined.iter().any(|object| object.name.contains("web.yaml")).then_some(()))
    })?;
    answers(&product, Place::Pod(1, 1))?;
    product.change(|product| product.write_manifest("web.yaml", &web(2)))?;
    answers(&product, Place::Pod(1, 2))?;
    ensure!(product.list_failures()?.quarantined.is_empty(), "mended, but still reported");
    Ok(())
}

#[test]
fn control_plane_on_a_broken_directory_serves_nothing_and_nodes_keep_their_rules() -> Result<()> {
    let mut product = started(&[Mode::Nftables])?;
    product.control_plane()?.kill()?;
    product.write_manifest("broken.yaml", "kind: Service\nmetadata: [")?;
    product.start_control_plane()?;
    wait_until("the control plane says why it does not serve", PATIENCE, || {
        Ok(product.server_info()?.not_serving_reason.contains("broken.yaml").then_some(()))
    })?;
    ensure!(!product.server_info()?.synced, "it serves a directory with a broken file");
    answers(&product, Place::Pod(1, 1))?;
    product.remove_manifest("broken.yaml")?;
    wait_until("the control plane serves", PATIENCE, || Ok(product.server_info()?.synced.then_some(())))?;
    product.wait_verified(1)?;
    answers(&product, Place::Pod(1, 1))
}

#[test]
fn agent_without_control_plane_programs_its_last_state() -> Result<()> {
    let mut product = started(&Mode::ALL)?;
    product.control_plane()?.kill()?;
    for node in 1..=3 {
        product.agent(node)?.terminate()?;
        // As after a reboot: the disk has the state, the kernel has nothing.
        product.cleanup(node)?;
    }
    let outcome = probe(&product.lab, CLIENT, Transport::Tcp, "10.96.0.10:80".parse()?)?;
    ensure!(!matches!(outcome, Outcome::Answered { .. }), "rules are gone, yet: {outcome}");
    for node in 1..=3 {
        product.start_agent(node)?;
    }
    for client in [CLIENT, Place::Pod(2, 1), Place::Pod(3, 1)] {
        wait_until(&format!("{client} is answered"), PATIENCE, || {
            let outcome = probe(&product.lab, client, Transport::Tcp, "10.96.0.10:80".parse()?)?;
            Ok(matches!(outcome, Outcome::Answered { .. }).then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn unknown_node_name_is_programmed_and_visible_as_without_a_node_object() -> Result<()> {
    let product = product(&[Mode::Nftables])?;
    let mut product = product;
    product.start_control_plane()?;
    let _agent = product.spawn_agent(1, "no-such-node")?;
    wait_until("the agent is verified", PATIENCE, || {
        let nodes = product.list_nodes()?.nodes;
        let found = nodes.into_iter().find(|node| node.node_name == "no-such-node" && node.verified_seq > 0);
        Ok(found.map(|node| (node.has_node_object, node.connected)))
    })
    .and_then(|seen| {
        ensure!(seen == (false, true), "(has_node_object, connected) = {seen:?}");
        Ok(())
    })?;
    answers(&product, Place::Pod(1, 1))
}

#[test]
fn of_two_agents_with_one_name_one_stays_and_the_other_is_counted() -> Result<()> {
    let product = started(&[Mode::Nftables, Mode::Nftables])?;
    let _second = product.spawn_agent(2, "node1")?;
    wait_until("the control plane counts the second agent", PATIENCE, || {
        let nodes = product.list_nodes()?.nodes;
        let node = nodes.into_iter().find(|node| node.node_name == "node1").context("node1 is not listed")?;
        Ok((node.superseded > 0 && node.connected).then_some(()))
    })?;
    answers(&product, Place::Pod(1, 1))
}

const FOREIGN_NFT: &str = "add table inet theirs; add chain inet theirs keep { type filter hook input priority 5; }; \
                           add rule inet theirs keep tcp dport 12345 drop";

#[test]
fn foreign_rules_are_byte_identical_after_a_run_and_cleanup() -> Result<()> {
    let mut product = product(&Mode::ALL)?;
    for node in 1..=3 {
        product.lab.tool(Place::Node(node), &["nft", FOREIGN_NFT])?;
    }
    for tool in ["iptables-legacy", "iptables-nft"] {
        let node = if tool == "iptables-legacy" { 2 } else { 3 };
        let add = [tool, "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "9999", "-j", "ACCEPT"];
        product.lab.tool(Place::Node(node), &add)?;
    }
    let theirs = |product: &Product, node| -> Result<Vec<String>> {
        Ok(rules(product, node)?
            .lines()
            .filter(|line| line.contains("12345") || line.contains("9999"))
            .map(str::to_owned)
            .collect())
    };
    let before: Vec<_> = (1..=3).map(|node| theirs(&product, node)).collect::<Result<_>>()?;
    ensure!(before.iter().all(|lines| !lines.is_empty()), "the foreign rules are not there: {before:?}");
    product.start()?;
    product.change(|product| product.write_manifest("web.yaml", &web(2)))?;
    for node in 1..=3 {
        product.agent(node)?.terminate()?;
        product.cleanup(node)?;
        ensure!(
            theirs(&product, node)? == before[usize::from(node) - 1],
            "node{node}: foreign rules changed"
        );
        let left = rules(&product, node)?;
        ensure!(!left.contains("lockstep") && !left.contains("KUBE-"), "node{node}: left behind:\n{left}");
    }
    Ok(())
}

#[test]
fn rules_that_others_remove_are_repaired() -> Result<()> {
    let product = started(&Mode::ALL)?;
    let flush = [
        vec!["nft", "flush", "table", "ip", "lockstep"],
        vec!["iptables-legacy", "-t", "nat", "-F", "KUBE-SERVICES"],
        vec!["iptables-nft", "-t", "nat", "-F", "KUBE-SERVICES"],
    ];
    for (node, command) in (1..).zip(&flush) {
        let before = rules(&product, node)?;
        product.lab.tool(Place::Node(node), command)?;
        // The periodic look at iptables is the slowest of the three.
        wait_until(&format!("node{node} is repaired"), Duration::from_secs(60), || {
            Ok((rules(&product, node)? == before).then_some(()))
        })
        .with_context(|| product.logs())?;
    }
    answers(&product, Place::Pod(1, 1))
}

#[test]
fn grpcurl_commands_of_the_protocol_document_work() -> Result<()> {
    let product = started(&[Mode::Nftables])?;
    let grpcurl = peer("grpcurl")?;
    let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/protocol.md"))?;
    let address = product.url().trim_start_matches("http://").to_owned();
    let commands: Vec<&str> =
        document.lines().filter(|line| line.starts_with("grpcurl ") && !line.ends_with('\\')).collect();
    for call in [" list", " describe ", "FetchSnapshot", "ListNodes"] {
        ensure!(commands.iter().any(|command| command.contains(call)), "docs/protocol.md shows no `{call}`");
    }
    for command in commands {
        let line = command
            .replacen("grpcurl", &grpcurl.display().to_string(), 1)
            .replace("127.0.0.1:7443", &address);
        let output = run(product.lab.command(Place::Fabric, "sh").args(["-c", &line]))?;
        ensure!(!output.trim().is_empty(), "`{command}` printed nothing");
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
