//! Beside rules of Docker, Calico, firewalld and a CNI plug-in's host ports: Services work as far
//! as those let packets through, whoever was first, and their rules are the same bytes
//! afterwards. Needs root.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lockstep_integration::fixture::{self, WEB_NODE_PORT, product, web};
use lockstep_integration::lab::{Family, Place};
use lockstep_integration::product::{Mode, Product};
use lockstep_integration::traffic::{OTHER_POD_PORT, Outcome, POD_PORT, Transport, probe};

/// Docker's, with a published port of a container that is the node's second pod.
const DOCKER: &str = "\
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d LOOPBACK -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s BRIDGE ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 18080 -j DNAT --to-destination CONTAINER:8080
COMMIT
*filter
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
";

/// Calico's: marks of its own, early ACCEPT of what a policy let through, and a policy under
/// which nobody reaches port 9090 of a pod.
const CALICO: &str = "\
*mangle
:cali-PREROUTING - [0:0]
-A PREROUTING -m comment --comment \"cali:6gwbT8clXdHdC1b1\" -j cali-PREROUTING
-A cali-PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-PREROUTING -m mark --mark 0x10000/0x10000 -j ACCEPT
COMMIT
*nat
:cali-OUTPUT - [0:0]
:cali-POSTROUTING - [0:0]
:cali-PREROUTING - [0:0]
:cali-fip-dnat - [0:0]
:cali-nat-outgoing - [0:0]
-A PREROUTING -m comment --comment \"cali:r6XmIziWUJsdOK6Z\" -j cali-PREROUTING
-A OUTPUT -m comment --comment \"cali:tVnHkvAo15HuiPy0\" -j cali-OUTPUT
-A POSTROUTING -m comment --comment \"cali:O3lYWMrLQYEMJtB5\" -j cali-POSTROUTING
-A cali-PREROUTING -j cali-fip-dnat
-A cali-OUTPUT -j cali-fip-dnat
-A cali-POSTROUTING -j cali-nat-outgoing
COMMIT
*filter
:cali-FORWARD - [0:0]
:cali-from-wl-dispatch - [0:0]
:cali-policy - [0:0]
-A FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-FORWARD
-A FORWARD -m comment --comment \"cali:S93hcgKJrXEqnTfs\" -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-FORWARD -j MARK --set-xmark 0x0/0xe0000
-A cali-FORWARD -j cali-from-wl-dispatch
-A cali-from-wl-dispatch -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-from-wl-dispatch -j cali-policy
-A cali-policy -p tcp -m tcp --dport 9090 -j DROP
-A cali-policy -j MARK --set-xmark 0x10000/0x10000
COMMIT
";

/// What the portmap plug-in makes of a `hostPort`: it must not be lost behind node ports.
const HOST_PORT: &str = "\
*nat
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-HOSTPORT-SETMARK - [0:0]
:CNI-HOSTPORT-MASQ - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -m comment --comment \"CNI portfwd requiring masquerade\" -j CNI-HOSTPORT-MASQ
-A CNI-HOSTPORT-SETMARK -m comment --comment \"CNI portfwd masquerade mark\" -j MARK --set-xmark 0x2000/0x2000
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 18081 -j CNI-HOSTPORT-SETMARK
-A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 18081 -j DNAT --to-destination CONTAINER:8080
COMMIT
";

/// firewalld's: one table, priorities after those of others, and zones that let in what was
/// translated, as its `StrictForwardPorts=no` does.
const FIREWALLD: &str = "
table inet firewalld {
    chain mangle_PREROUTING { type filter hook prerouting priority mangle + 10; policy accept; }
    chain nat_PREROUTING { type nat hook prerouting priority dstnat + 10; policy accept; jump nat_PRE_public; }
    chain nat_PRE_public { tcp dport 18082 redirect to :8080; }
    chain nat_POSTROUTING { type nat hook postrouting priority srcnat + 10; policy accept; oifname \"docker0\" masquerade; }
    chain filter_INPUT {
        type filter hook input priority filter + 10; policy accept;
        ct state { established, related } accept
        ct status dnat accept
        tcp dport 18083 counter drop comment \"a closed port\"
    }
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state { established, related } accept
        ct status dnat accept
        ct state invalid drop
    }
}
table ip theirs { set services { type ipv4_addr; elements = { 192.0.2.77 }; }; chain services { ip saddr @services drop; }; }
";

/// The tools of both flavours, with the family each is for.
const TOOLS: [(&str, Family); 4] = [
    ("iptables-legacy", Family::V4),
    ("ip6tables-legacy", Family::V6),
    ("iptables-nft", Family::V4),
    ("ip6tables-nft", Family::V6),
];

fn load(product: &Product, node: u8) -> Result<()> {
    let (place, pod) = (Place::Node(node), Place::Pod(node, 2));
    let file = product.lab.directory().join(format!("{place}.foreign"));
    let run = |text: &str, command: &str| -> Result<()> {
        std::fs::write(&file, text)?;
        let script = format!("{command} {}", file.display());
        product.lab.tool(place, &["sh", "-c", &script]).map(drop)
    };
    run(FIREWALLD, "nft -f")?;
    for (tool, family) in TOOLS {
        let (container, loopback, bridge) = match family {
            Family::V4 => (pod.address(family).to_string(), "127.0.0.0/8", "172.17.0.0/16"),
            Family::V6 => (format!("[{}]", pod.address(family)), "::1/128", "fd17::/64"),
        };
        for part in [CALICO, DOCKER, HOST_PORT] {
            let part = part.replace("CONTAINER", &container).replace("LOOPBACK", loopback);
            run(&part.replace("BRIDGE", bridge), &format!("{tool}-restore --noflush <"))?;
        }
    }
    Ok(())
}

/// What a node has that is not Lockstep's: without counters, and without lines that are
/// comments of the tools.
fn foreign(product: &Product, node: u8) -> Result<String> {
    let place = Place::Node(node);
    let list =
        |table: &str| product.lab.tool(place, &["sh", "-c", &format!("nft --stateless list table {table}")]);
    let mut text = list("inet firewalld")? + &list("ip theirs")?;
    for (tool, _) in TOOLS {
        let saved = product.lab.tool(place, &[&format!("{tool}-save")])?;
        let theirs = saved.lines().filter(|line| !line.starts_with('#') && !line.contains("KUBE-"));
        for line in theirs {
            text.push_str(line.split(" [").next().unwrap_or(line));
            text.push('\n');
        }
    }
    Ok(text)
}

/// Everything that should work does, and what the others forbid does not.
fn works(product: &Product, node: u8) -> Result<()> {
    let lab = &product.lab;
    let (here, pod, far) = (Place::Node(node), Place::Pod(node, 2), Place::Pod(node % 3 + 1, 2));
    for family in [Family::V4, Family::V6] {
        let at = |place: Place, port| SocketAddr::new(place.address(family), port);
        // Who asks, what, and whom the answering pod must see; `None` = nobody answers.
        let cases = [
            (pod, web(family), Some(pod)),
            (here, web(family), Some(here)),
            (Place::Outside, at(here, WEB_NODE_PORT), Some(here)),
            (pod, at(here, WEB_NODE_PORT), Some(here)),
            // Docker's published port, the plug-in's host port, and firewalld's redirect.
            (Place::Outside, at(here, 18080), Some(Place::Outside)),
            (Place::Outside, at(here, 18081), Some(here)),
            (Place::Outside, at(here, 18082), Some(Place::Outside)),
            // No Service: left alone, and forbidden by Calico.
            (far, at(pod, POD_PORT), Some(far)),
            (far, at(pod, OTHER_POD_PORT), None),
        ];
        let ask = |(from, to, seen): (Place, SocketAddr, Option<Place>)| -> Result<()> {
            let outcome = probe(lab, from, Transport::Tcp, to)?;
            let good = match (&outcome, seen) {
                (Outcome::Answered { source, .. }, Some(place)) => place.owns(*source),
                (Outcome::Timeout, None) => true,
                _ => false,
            };
            ensure!(good, "{from} -> {to}: {outcome}, expected: {seen:?}\n{}", product.logs());
            Ok(())
        };
        std::thread::scope(|scope| {
            let running: Vec<_> = cases.into_iter().map(|case| scope.spawn(move || ask(case))).collect();
            running
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
    }
    Ok(())
}

fn same(when: &str, node: u8, before: &str, after: &str) -> Result<()> {
    let other = |one: &str, two: &str| one.lines().find(|line| !two.contains(line)).map(str::to_owned);
    ensure!(
        before == after,
        "node{node}, {when}: foreign rules changed (or their order); gone: {:?}, new: {:?}",
        other(before, after),
        other(after, before)
    );
    Ok(())
}

fn before_us(product: &mut Product) -> Result<()> {
    (1..=3).try_for_each(|node| load(product, node))?;
    product.start()
}

fn after_us(product: &mut Product) -> Result<()> {
    product.start()?;
    (1..=3).try_for_each(|node| load(product, node))
}

/// Every node in another mode. The foreign rules are there in both flavours of iptables at once,
/// which is the most that can be.
fn coexist(load_and_start: impl FnOnce(&mut Product) -> Result<()>) -> Result<()> {
    let mut product = product(&Mode::ALL)?;
    load_and_start(&mut product)?;
    let before: Vec<_> = (1..=3).map(|node| foreign(&product, node)).collect::<Result<_>>()?;
    for (node, rules) in (1..).zip(&before) {
        for part in ["cali-policy", "DOCKER-USER", "CNI-HOSTPORT-DNAT", "18082", "192.0.2.77"] {
            ensure!(rules.contains(part), "{part} is not there:\n{rules}");
        }
        works(&product, node).with_context(|| format!("in {}", Mode::ALL[usize::from(node) - 1].name()))?;
    }

    let out = [Place::Pod(2, 2)];
    product.change(|product| product.write_manifest("roll.yaml", &fixture::roll_manifest(&out)))?;
    for (node, rules) in (1..).zip(&before) {
        same("after a change", node, rules, &foreign(&product, node)?)?;
    }

    // Each node in the mode of the next one.
    for (node, rules) in (1..).zip(&before) {
        let mode = Mode::ALL[usize::from(node) % 3];
        product.agent(node)?.kill()?;
        product.set_mode(node, mode);
        product.start_agent(node)?;
        product.agent(node)?.wait_for_log("removed the rules of a mode")?;
        product.wait_verified(0)?;
        same("after another mode", node, rules, &foreign(&product, node)?)?;
        works(&product, node).with_context(|| format!("after a switch to {}", mode.name()))?;
    }

    for (node, rules) in (1..).zip(&before) {
        product.agent(node)?.terminate()?;
        product.cleanup(node)?;
        same("after cleanup", node, rules, &foreign(&product, node)?)?;
    }
    Ok(())
}

#[test]
fn rules_of_others_that_were_there_first_stay_and_services_work_beside_them() -> Result<()> {
    coexist(before_us)
}

#[test]
fn rules_of_others_that_come_later_stay_and_services_work_beside_them() -> Result<()> {
    coexist(after_us)
}
