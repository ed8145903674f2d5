//! What the whole product survives, and how. Each test is a network of its own with the real
//! programs in it; its name is the stated outcome. Needs root.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lockstep_integration::apiserver::peer;
use lockstep_integration::lab::{Family, Lab, Place};
use lockstep_integration::product::{Mode, PATIENCE, Product, wait_until};
use lockstep_integration::traffic::{Outcome, Transport, probe};

const CLIENT: Place = Place::Pod(1, 2);
const WEB: &str = "10.96.0.10:80";
const NODE_PORT: u16 = 30080;
/// An address of node 1 beside that of its Node object.
const SECOND: &str = "10.200.0.77";

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
         spec:\n  type: NodePort\n  clusterIP: 10.96.0.10\n  clusterIPs: [10.96.0.10]\n  \
         ports: [{{port: 80, targetPort: 8080, nodePort: {NODE_PORT}}}]\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: web-1, namespace: default, labels: {{kubernetes.io/service-name: web}}}}\n\
         addressType: IPv4\nports: [{{port: 8080}}]\n\
         endpoints: [{{addresses: [10.244.1.{pod}], nodeName: node1}}]\n"
    )
}

fn answers(product: &Product, by: Place) -> Result<()> {
    let outcome = probe(&product.lab, CLIENT, Transport::Tcp, WEB.parse()?)?;
    ensure!(
        matches!(outcome, Outcome::Answered { by: pod, .. } if pod == by),
        "expected an answer by {by}: {outcome}\n{}",
        product.logs()
    );
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

/// What a reboot leaves of the kernel's rules: nothing.
const REBOOT: &str = "nft flush ruleset
for tool in iptables-legacy-restore ip6tables-legacy-restore; do
    printf '*nat\\nCOMMIT\\n*filter\\nCOMMIT\\n' | $tool
done";

#[test]
fn rebooted_nodes_without_control_plane_program_their_last_state_and_say_it_is_stale() -> Result<()> {
    let mut product = started(&Mode::ALL)?;
    let stale = |product: &Product, node| -> Result<(bool, bool)> {
        let place = Place::Node(node);
        let (status, health) = product.http_get(place, 10256, "/healthz")?;
        ensure!(status == 200, "node{node}: /healthz: {status} {health}");
        let (_, metrics) = product.http_get(place, 10249, "/metrics")?;
        Ok((health.contains(r#""stale":true"#), metrics.lines().any(|line| line == "lockstep_stale 1")))
    };
    for node in 1..=3 {
        ensure!(stale(&product, node)? == (false, false), "node{node} says it is stale while it is not");
        let cache = product.state_directory(node, &format!("node{node}"));
        wait_until(&format!("node{node} has the state on disk"), PATIENCE, || {
            let saved = files(&cache)?
                .iter()
                .any(|bytes| bytes.windows(4).any(|word| word == b"web-" || word == b"web\x12"));
            Ok(saved.then_some(()))
        })?;
    }
    product.control_plane()?.kill()?;
    for node in 1..=3 {
        product.agent(node)?.kill()?;
        product.lab.tool(Place::Node(node), &["sh", "-e", "-c", REBOOT])?;
    }
    let gone = probe(&product.lab, CLIENT, Transport::Tcp, WEB.parse()?)?;
    ensure!(!matches!(gone, Outcome::Answered { .. }), "rules are gone, yet: {gone}");
    for node in 1..=3 {
        product.start_agent(node)?;
    }
    for (node, client) in (1..).zip([CLIENT, Place::Pod(2, 1), Place::Pod(3, 1)]) {
        wait_until(&format!("{client} is answered"), PATIENCE, || {
            let outcome = probe(&product.lab, client, Transport::Tcp, WEB.parse()?)?;
            Ok(matches!(outcome, Outcome::Answered { .. }).then_some(()))
        })
        .with_context(|| product.logs())?;
        // The packet may be there before the rules have been read back, and until then it is not healthy.
        wait_until(&format!("node{node} says that it is stale"), PATIENCE, || {
            Ok(stale(&product, node).is_ok_and(|stale| stale == (true, true)).then_some(()))
        })?;
        product.agent(node)?.wait_for_log("programming cached state from")?;
    }
    product.start_control_plane()?;
    product.wait_verified(1)?;
    for node in 1..=3 {
        wait_until(&format!("node{node} is not stale any more"), PATIENCE, || {
            Ok((stale(&product, node)? == (false, false)).then_some(()))
        })?;
    }
    answers(&product, Place::Pod(1, 1))
}

/// Contents of all files in a directory.
fn files(directory: &Path) -> Result<Vec<Vec<u8>>> {
    let mut contents = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        contents.push(std::fs::read(entry?.path())?);
    }
    Ok(contents)
}

/// Whether the node port answers at an address of node 1, after some time at the latest.
fn node_port_answers(product: &Product, address: &str, expected: bool) -> Result<()> {
    let to = SocketAddr::new(address.parse()?, NODE_PORT);
    wait_until(&format!("{to} answers: {expected}"), PATIENCE, || {
        let outcome = probe(&product.lab, Place::Outside, Transport::Tcp, to)?;
        let answered = matches!(outcome, Outcome::Answered { by: Place::Pod(1, 1), .. });
        Ok((answered == expected).then_some(()))
    })
    .with_context(|| product.logs())
}

fn address_of(node: u8) -> String {
    Place::Node(node).address(Family::V4).to_string()
}

fn second_address(product: &Product, verb: &str) -> Result<()> {
    let address = format!("{SECOND}/24");
    product.lab.tool(Place::Node(1), &["ip", "addr", verb, &address, "dev", "eth0"]).map(drop)
}

#[test]
fn unknown_node_name_is_programmed_and_visible_as_without_a_node_object() -> Result<()> {
    let mut product = product(&[Mode::Nftables])?;
    product.start_control_plane()?;
    second_address(&product, "add")?;
    let _agent = product.spawn_agent(1, "no-such-node")?;
    let seen = |product: &Product, has_node_object| {
        wait_until("the agent is verified", PATIENCE, || {
            let nodes = product.list_nodes()?.nodes;
            let mut nodes = nodes.into_iter().filter(|node| node.node_name == "no-such-node");
            let found = nodes.find(|node| node.verified_seq > 0 && node.has_node_object == has_node_object);
            Ok(found.is_some_and(|node| node.connected).then_some(()))
        })
    };
    seen(&product, false)?;
    answers(&product, Place::Pod(1, 1))?;
    // Which address is the primary one nobody knows, so every one will do.
    node_port_answers(&product, &address_of(1), true)?;
    node_port_answers(&product, SECOND, true)?;
    // Until it is known.
    product.write_manifest("late.yaml", &product.node_manifest().replace("node1", "no-such-node"))?;
    seen(&product, true)?;
    node_port_answers(&product, SECOND, false)?;
    node_port_answers(&product, &address_of(1), true)
}

#[test]
fn node_ports_answer_where_the_mode_and_nodeport_addresses_say() -> Result<()> {
    let inside = "--nodeport-addresses=10.200.0.64/26,fd00:dead::/64";
    let cases = [
        (Mode::Nftables, None, (true, false)),
        (Mode::IptablesLegacy, None, (true, true)),
        (Mode::Nftables, Some(inside), (false, true)),
        (Mode::IptablesLegacy, Some(inside), (false, true)),
        (Mode::IptablesNft, Some("--nodeport-addresses=primary"), (true, false)),
    ];
    for (mode, flag, (first, second)) in cases {
        let mut product = product(&[mode])?;
        product.start_control_plane()?;
        let mut flags = vec!["--insecure".to_owned(), format!("--control-plane={}", product.url())];
        flags.extend(flag.map(str::to_owned));
        let _agent = product.spawn_agent_that(1, "node1", &flags)?;
        product.wait_verified(1)?;
        // Addresses come and go while it runs.
        second_address(&product, "add")?;
        let context = || format!("{} {flag:?}", mode.name());
        node_port_answers(&product, SECOND, second).with_context(context)?;
        node_port_answers(&product, &address_of(1), first).with_context(context)?;
        second_address(&product, "del")?;
        if flag == Some(inside) && mode == Mode::Nftables {
            let set = ["nft", "list", "table", "ip", "lockstep"];
            wait_until("the address is out of the rules", PATIENCE, || {
                Ok((!product.lab.tool(Place::Node(1), &set)?.contains(SECOND)).then_some(()))
            })?;
        }
    }
    Ok(())
}

/// The second agent programs the kernel of another node, and the cluster sees one node only.
#[test]
fn of_two_agents_with_one_name_the_newest_stays_and_the_other_is_counted() -> Result<()> {
    for mode in Mode::ALL {
        let product = started(&[mode, mode])?;
        let mut second = product.spawn_agent(2, "node1")?;
        wait_until("the control plane counts the second agent", PATIENCE, || {
            let nodes = product.list_nodes()?.nodes;
            let node = nodes.into_iter().find(|node| node.node_name == "node1").context("no node1")?;
            Ok((node.superseded > 0 && node.connected && node.verified_seq > 0).then_some(()))
        })
        .with_context(|| mode.name())?;
        ensure!(second.ended()?.is_none(), "{}: the newer agent ended", mode.name());
        ensure!(product.list_nodes()?.nodes.len() == 2, "{}: a third node", mode.name());
        answers(&product, Place::Pod(1, 1))?;
    }
    Ok(())
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
