//! Which packets are pods', in every way to tell them, and node ports at 127.0.0.1, with packets.
//! Needs root.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lockstep_integration::fixture::{self, WEB_NODE_PORT, product, roll};
use lockstep_integration::lab::{Family, POD_CIDRS, Place};
use lockstep_integration::product::{Mode, PATIENCE, Product, wait_until};
use lockstep_integration::traffic::{Outcome, Transport, probe, probe_within};

const NODE: Place = Place::Node(1);
const POD: Place = Place::Pod(1, 1);
const OTHER_POD: Place = Place::Pod(1, 2);
const REMOTE_POD: Place = Place::Pod(2, 1);
/// Silence is dropped when it lasts so long. An answer takes a millisecond.
const SILENCE: Duration = Duration::from_millis(700);

/// External policy Local without an endpoint on node 1: pods and the node are sent to node 2, and
/// everybody else is dropped. UDP has no endpoint anywhere.
fn away() -> String {
    let mut text = "apiVersion: v1\nkind: Service\nmetadata: {name: away, namespace: default, uid: uid-away}\n\
        spec:\n  type: NodePort\n  clusterIP: 10.96.0.30\n  clusterIPs: [10.96.0.30, 'fd00:96::30']\n  \
        ipFamilies: [IPv4, IPv6]\n  externalTrafficPolicy: Local\n  externalIPs: [192.0.2.30, '2001:db8:1::30']\n  \
        ports:\n  - {name: tcp, port: 80, targetPort: 8080, nodePort: 30030}\n  \
        - {name: udp, port: 80, targetPort: 8080, protocol: UDP, nodePort: 30031}\n"
        .to_owned();
    for (family, kind) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: away-{}, namespace: default, labels: {{kubernetes.io/service-name: away}}}}\n\
             addressType: {kind}\nports: [{{name: tcp, port: 8080}}]\n\
             endpoints: [{{addresses: ['{}'], nodeName: node2}}]\n",
            kind.to_lowercase(),
            REMOTE_POD.address(family)
        );
    }
    text
}

fn started(mode: Mode, flags: &[&str]) -> Result<Product> {
    let mut product = product(&[mode, mode])?;
    product.write_manifest("away.yaml", &away())?;
    product.set_agent_flags(flags);
    product.start()?;
    Ok(product)
}

/// Who is told to be what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Pod,
    Node,
    Elsewhere,
}

/// Fails where packets from `from` do not meet what this class meets.
fn meets(product: &Product, from: Place, class: Class) -> Result<()> {
    for family in [Family::V4, Family::V6] {
        let [cluster_ip, external, node_port] = match family {
            Family::V4 => ["10.96.0.30:80", "192.0.2.30:80", "10.200.0.11:30030"],
            Family::V6 => ["[fd00:96::30]:80", "[2001:db8:1::30]:80", "[fd00:200::11]:30030"],
        };
        let own = |source: IpAddr| source == from.address(family);
        let of_node = |source: IpAddr| NODE.owns(source);
        for (to, local) in [(cluster_ip, false), (external, true), (node_port, true)] {
            let patience = if local && class == Class::Elsewhere { SILENCE } else { Duration::from_secs(5) };
            let outcome = probe_within(&product.lab, from, Transport::Tcp, to.parse()?, patience)?;
            let good = match (&outcome, class) {
                (Outcome::Timeout, Class::Elsewhere) => local,
                (Outcome::Answered { by: REMOTE_POD, source }, Class::Elsewhere) => {
                    !local && of_node(*source)
                }
                (Outcome::Answered { by: REMOTE_POD, source }, Class::Pod) => own(*source),
                (Outcome::Answered { by: REMOTE_POD, source }, Class::Node) => of_node(*source),
                _ => false,
            };
            ensure!(good, "{from} as {class:?} at {to}: {outcome:?}\n{}", product.logs());
        }
    }
    // To a pod of its own, whether the node is masqueraded shows: the pod sees the gateway.
    let outcome = probe(&product.lab, from, Transport::Tcp, roll())?;
    let Outcome::Answered { by: OTHER_POD, source } = outcome else { bail!("{from} at roll: {outcome:?}") };
    let masqueraded = NODE.owns(source) && source != NODE.address(Family::V4);
    ensure!(
        masqueraded == (class != Class::Pod || from == OTHER_POD),
        "{from} as {class:?} at roll: {source}"
    );
    Ok(())
}

/// In each of these, the first pod is a pod; whether the second is says the mode.
fn tells(flags: &[&str], other: Class) -> Result<()> {
    for mode in [Mode::Nftables, Mode::IptablesLegacy, Mode::IptablesNft] {
        let product = started(mode, flags)?;
        let test = || {
            meets(&product, POD, Class::Pod)?;
            meets(&product, OTHER_POD, other)?;
            meets(&product, NODE, Class::Node)?;
            meets(&product, Place::Outside, Class::Elsewhere)
        };
        test().with_context(|| format!("{}, {}", mode.name(), flags.join(" ")))?;
    }
    Ok(())
}

#[test]
fn pods_are_told_by_the_ranges_of_the_cluster() -> Result<()> {
    tells(&["--detect-local-mode=ClusterCIDR", &format!("--cluster-cidr={POD_CIDRS}")], Class::Pod)
}

#[test]
fn pods_are_told_by_a_bridge() -> Result<()> {
    tells(&["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=n1p1"], Class::Elsewhere)
}

#[test]
fn pods_are_told_by_how_their_interfaces_are_named() -> Result<()> {
    tells(&["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=n1p"], Class::Pod)
}

#[test]
fn pods_are_told_by_the_ranges_of_the_node_also_when_they_change() -> Result<()> {
    tells(&["--detect-local-mode=NodeCIDR"], Class::Pod)?;
    for mode in [Mode::Nftables, Mode::IptablesLegacy] {
        let product = started(mode, &["--detect-local-mode=NodeCIDR"])?;
        // No version says that a node took in what its Node object says: its packets do.
        let moved = |with: &str, pod: Place, other: Place| -> Result<()> {
            let text = product.node_manifest().replace("[10.244.1.0/24, 'fd00:244:1::/48']", with);
            product.write_manifest("nodes.yaml", &text)?;
            let both =
                || meets(&product, pod, Class::Pod).and_then(|()| meets(&product, other, Class::Elsewhere));
            wait_until("the node follows", PATIENCE, || Ok(both().is_ok().then_some(())))
                .with_context(|| format!("{}: {:?}\n{}", mode.name(), both(), product.logs()))
        };
        moved("[10.244.1.2/32, 'fd00:244:1::2/128']", OTHER_POD, POD)?;
        moved("[10.244.1.1/32, 'fd00:244:1::1/128']", POD, OTHER_POD)?;
    }
    Ok(())
}

#[test]
fn flags_that_do_not_go_together_end_the_agent_before_it_touches_anything() -> Result<()> {
    let mut product = product(&[Mode::IptablesLegacy])?;
    product.set_agent_flags(&["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=br/0"]);
    product.start_agent(1)?;
    let agent = product.agent(1)?;
    let status = wait_until("the agent ends", PATIENCE, || agent.ended())?;
    ensure!(status.code() == Some(2), "{status}");
    ensure!(agent.log().contains("--pod-bridge-interface \"br/0\": '/' cannot be in it"), "{}", agent.log());
    ensure!(!product.lab.tool(NODE, &["iptables-legacy-save"])?.contains("KUBE-"), "it wrote rules");
    Ok(())
}

fn localhost(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn route_localnet(product: &Product) -> Result<String> {
    let value = product.lab.tool(NODE, &["cat", "/proc/sys/net/ipv4/conf/all/route_localnet"])?;
    Ok(value.trim().to_owned())
}

/// Sends what is for 127.0.0.1 from outside to node 1, and takes answers from there.
fn reach_for_the_loopback_of_the_node(product: &Product) -> Result<()> {
    let outside = "ip addr del 127.0.0.1/8 dev lo; echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet; \
        ip route add 127.0.0.1/32 via 10.200.0.11";
    product.lab.tool(Place::Outside, &["sh", "-ec", outside])?;
    Ok(())
}

/// A program that listens at the loopback of node 1.
fn listen(product: &Product) -> Result<TcpListener> {
    Ok(product.lab.inside(NODE, || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))??)
}

/// True where a connection from outside to 127.0.0.1 of node 1 comes about.
fn comes_in(product: &Product, port: u16) -> Result<bool> {
    let dialled = product
        .lab
        .inside(Place::Outside, || std::net::TcpStream::connect_timeout(&localhost(port), SILENCE))?;
    Ok(dialled.is_ok())
}

#[test]
fn node_ports_answer_the_node_at_localhost_and_nobody_else() -> Result<()> {
    for mode in [Mode::IptablesLegacy, Mode::IptablesNft] {
        let mut product = product(&[mode, mode])?;
        product.write_manifest("away.yaml", &away())?;
        reach_for_the_loopback_of_the_node(&product)?;
        let listener = listen(&product)?;
        let port = listener.local_addr()?.port();
        // Without the guard, the sysctl alone lets it in: so this is what the guard is for.
        let switch = |value: &str| {
            let script = format!("echo {value} >/proc/sys/net/ipv4/conf/all/route_localnet");
            product.lab.tool(NODE, &["sh", "-c", &script])
        };
        switch("1")?;
        ensure!(comes_in(&product, port)?, "{}: the lab does not let it through anyway", mode.name());
        switch("0")?;
        product.start()?;
        ensure!(route_localnet(&product)? == "1", "{}: the sysctl is off\n{}", mode.name(), product.logs());
        let node_port = localhost(WEB_NODE_PORT);
        let mut reached = fixture::web_pods(&product);
        for _ in 0..200 {
            match probe(&product.lab, NODE, Transport::Tcp, node_port)? {
                Outcome::Answered { by, source } => {
                    ensure!(NODE.owns(source), "{}: {by} saw {source}", mode.name());
                    reached.remove(&by);
                }
                other => bail!("{}: {node_port}: {other:?}\n{}", mode.name(), product.logs()),
            }
            if reached.is_empty() {
                break;
            }
        }
        ensure!(reached.is_empty(), "{}: never reached: {reached:?}", mode.name());
        // Whatever the policy: who comes from 127.0.0.1 could not be answered there.
        let outcome = probe(&product.lab, NODE, Transport::Tcp, localhost(30030))?;
        let good = matches!(outcome, Outcome::Answered { by: REMOTE_POD, source } if NODE.owns(source));
        ensure!(good, "{}: policy Local: {outcome:?}", mode.name());
        let outcome = probe(&product.lab, NODE, Transport::Udp, localhost(30031))?;
        ensure!(outcome == Outcome::Refused, "{}: without endpoints: {outcome:?}", mode.name());
        let six = SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), WEB_NODE_PORT);
        let outcome = probe(&product.lab, NODE, Transport::Tcp, six)?;
        ensure!(outcome == Outcome::Refused, "{}: {six}: {outcome:?}", mode.name());

        ensure!(!comes_in(&product, port)?, "{}: a program of the node's own is reached", mode.name());
        ensure!(!comes_in(&product, WEB_NODE_PORT)?, "{}: node port at 127.0.0.1 from outside", mode.name());
        let outcome = probe(&product.lab, Place::Outside, Transport::Tcp, "10.200.0.11:30080".parse()?)?;
        ensure!(matches!(outcome, Outcome::Answered { .. }), "{}: {outcome:?}", mode.name());

        // The guard outlives what it was made for, because the sysctl does.
        product.agent(1)?.terminate()?;
        product.cleanup(1)?;
        ensure!(route_localnet(&product)? == "1" && !comes_in(&product, port)?, "{}: cleanup", mode.name());
    }
    Ok(())
}

#[test]
fn node_ports_are_not_at_localhost_where_they_are_not_wanted() -> Result<()> {
    let cidr = format!("--cluster-cidr={POD_CIDRS}");
    for (mode, flag) in [
        (Mode::IptablesLegacy, "--nodeport-addresses=10.200.0.0/24"),
        // No interface has this one of 127.0.0.0/8.
        (Mode::IptablesLegacy, "--nodeport-addresses=10.200.0.0/24,127.0.0.2/32"),
        (Mode::IptablesNft, "--iptables-localhost-nodeports=false"),
        (Mode::Nftables, "--nodeport-addresses=0.0.0.0/0"),
        (Mode::Nftables, "--iptables-localhost-nodeports=true"),
    ] {
        let product = started(mode, &[&cidr, flag])?;
        let test = || {
            let outcome = probe(&product.lab, NODE, Transport::Tcp, localhost(WEB_NODE_PORT))?;
            ensure!(outcome == Outcome::Refused, "127.0.0.1: {outcome:?}");
            let outcome = probe(&product.lab, NODE, Transport::Tcp, "10.200.0.11:30080".parse()?)?;
            ensure!(matches!(outcome, Outcome::Answered { .. }), "10.200.0.11: {outcome:?}");
            ensure!(route_localnet(&product)? == "0", "the sysctl was touched");
            let saved = product.lab.tool(NODE, &["iptables-legacy-save"])?
                + &product.lab.tool(NODE, &["iptables-nft-save"])?;
            ensure!(!saved.contains("KUBE-FIREWALL"), "a guard of nothing:\n{saved}");
            Ok(())
        };
        test().with_context(|| format!("{} {flag}", mode.name()))?;
    }
    // The loopback alone: the address is one of the node's, and no other is.
    let product = started(Mode::IptablesLegacy, &[&cidr, "--nodeport-addresses=127.0.0.0/8"])?;
    let outcome = probe(&product.lab, NODE, Transport::Tcp, localhost(WEB_NODE_PORT))?;
    ensure!(matches!(outcome, Outcome::Answered { .. }), "127.0.0.1 alone: {outcome:?}\n{}", product.logs());
    let outcome = probe(&product.lab, NODE, Transport::Tcp, "10.200.0.11:30080".parse()?)?;
    ensure!(outcome == Outcome::Refused, "127.0.0.1 alone: {outcome:?} at 10.200.0.11");
    Ok(())
}
