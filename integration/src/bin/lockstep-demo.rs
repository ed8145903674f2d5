//! The whole product on one machine, told step by step. Run by `cargo xtask demo`.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a program for people at a terminal")]

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_integration::lab::{Lab, Place};
use lockstep_integration::product::{Mode, Product};
use lockstep_integration::traffic::{Outcome, Transport, probe};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (keep, ipvs) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => (false, false),
        ["--keep"] => (true, false),
        ["--ipvs"] => (false, true),
        _ => bail!("usage: cargo xtask demo [--keep | --ipvs]"),
    };
    let modes: Vec<Mode> = Mode::ALL.into_iter().chain(ipvs.then_some(Mode::Ipvs)).collect();
    let start = Instant::now();
    let mut product = build(&modes)?;
    traffic(&product)?;
    status(&product)?;
    if ipvs {
        in_ipvs(&product)?;
    }
    changes(&product, &modes)?;
    if keep {
        return play(&product);
    }
    without_control_plane(&mut product)?;
    title("Clean up");
    for node in 1..=product.lab.nodes() {
        product.cleanup(node)?;
    }
    drop(product);
    say(&format!("rules removed, namespaces gone; {:.1} s in all", start.elapsed().as_secs_f64()));
    Ok(())
}

fn build(modes: &[Mode]) -> Result<Product> {
    let nodes = u8::try_from(modes.len())?;
    title(&format!("A cluster in network namespaces: {nodes} nodes with two pods each, a client outside"));
    let mut product = Product::new(Lab::new(nodes, 2)?, modes)?;
    for (node, mode) in (1..).zip(modes) {
        say(&format!("node{node}  {:<16} pods n{node}p1, n{node}p2", mode.name()));
    }
    title("One control plane on deploy/examples, one agent per node");
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
    for name in ["nodes.yaml", "web.yaml", "dns.yaml", "shop.yaml"] {
        product.write_manifest(name, &example(&examples, name)?)?;
        say(name);
    }
    if nodes > 3 {
        // The examples have three.
        product.write_manifest("nodes.yaml", &product.node_manifest())?;
    }
    let start = Instant::now();
    product.start()?;
    say(&format!("every node verified after {:.0?}, process start included", start.elapsed()));
    Ok(product)
}

/// A path that traffic takes.
struct Route {
    about: &'static str,
    from: Place,
    to: &'static str,
    transport: Transport,
}

const ROUTES: [Route; 8] = [
    Route {
        about: "pod -> cluster IP",
        from: Place::Pod(1, 2),
        to: "10.96.0.10:80",
        transport: Transport::Tcp,
    },
    Route {
        about: "pod -> cluster IP, UDP",
        from: Place::Pod(2, 1),
        to: "10.96.0.53:53",
        transport: Transport::Udp,
    },
    Route {
        about: "node -> cluster IP",
        from: Place::Node(3),
        to: "10.96.0.10:80",
        transport: Transport::Tcp,
    },
    Route {
        about: "outside -> node port of node1",
        from: Place::Outside,
        to: "10.200.0.11:30080",
        transport: Transport::Tcp,
    },
    Route {
        about: "outside -> node port of node2",
        from: Place::Outside,
        to: "10.200.0.12:30080",
        transport: Transport::Tcp,
    },
    Route {
        about: "outside -> load balancer",
        from: Place::Outside,
        to: "203.0.113.10:80",
        transport: Transport::Tcp,
    },
    Route {
        about: "outside -> shop, source kept",
        from: Place::Outside,
        to: "198.51.100.20:80",
        transport: Transport::Tcp,
    },
    Route {
        about: "pod -> shop, from any node",
        from: Place::Pod(3, 1),
        to: "198.51.100.20:80",
        transport: Transport::Tcp,
    },
];

fn traffic(product: &Product) -> Result<()> {
    title("Traffic along every path: real connections through each node's kernel");
    say(&format!("{:<32} {:<18} outcome, and the source address that the pod saw", "path", "to"));
    for route in &ROUTES {
        let outcome = answered(product, route)?;
        say(&format!("{:<32} {:<18} {outcome}", route.about, route.to));
    }
    Ok(())
}

fn answered(product: &Product, route: &Route) -> Result<Outcome> {
    let to: SocketAddr = route.to.parse()?;
    let outcome = probe(&product.lab, route.from, route.transport, to)?;
    ensure!(matches!(outcome, Outcome::Answered { .. }), "{}: {outcome}\n{}", route.about, product.logs());
    Ok(outcome)
}

fn status(product: &Product) -> Result<()> {
    title("lockstepctl status");
    ctl(product, &["status"])
}

fn ctl(product: &Product, arguments: &[&str]) -> Result<()> {
    let output = product.ctl(arguments)?.output()?;
    let (text, complaint) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "lockstepctl {}: {complaint}", arguments.join(" "));
    for line in text.lines() {
        say(line);
    }
    Ok(())
}

/// What a node in IPVS mode has for a Service.
fn in_ipvs(product: &Product) -> Result<()> {
    title("The node in IPVS mode: its virtual servers for web, and some of its sets and addresses");
    let node = Place::Node(product.lab.nodes());
    answered(product, &Route { about: "node -> cluster IP", from: node, ..ROUTES[2] })?;
    let servers = product.lab.tool(node, &["ipvsadm", "-L", "-n", "-t", "10.96.0.10:80"])?;
    servers.lines().for_each(say);
    let sets = product.lab.tool(node, &["ipset", "list", "KUBE-CLUSTER-IP"])?;
    sets.lines().for_each(say);
    let addresses = product.lab.tool(node, &["ip", "-brief", "address", "show", "kube-ipvs0"])?;
    addresses.lines().for_each(say);
    Ok(())
}

fn changes(product: &Product, modes: &[Mode]) -> Result<()> {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
    let web = example(&examples, "web.yaml")?;

    title("An endpoint changes: the web pod of node3 moves to n3p2");
    let moved = replaced(&web, "10.244.3.1]", "10.244.3.2]")?;
    timed_change(product, modes, "web.yaml", &moved)?;
    let mut seen = Vec::new();
    for _ in 0..48 {
        if let Outcome::Answered { by, .. } = answered(product, &ROUTES[0])? {
            ensure!(by != Place::Pod(3, 1), "a new connection reached the endpoint that is gone");
            seen.push(by);
        }
    }
    seen.sort();
    seen.dedup();
    let names: Vec<String> = seen.iter().map(Place::to_string).collect();
    say(&format!("48 new connections went to {}, none to n3p1", names.join(", ")));

    title("A Service changes: web gets port 8000");
    let port = replaced(&moved, "name: http, port: 80,", "name: http, port: 8000,")?;
    timed_change(product, modes, "web.yaml", &port)?;
    let route = Route { about: "pod -> cluster IP", to: "10.96.0.10:8000", ..ROUTES[0] };
    say(&format!("{:<32} {:<18} {}", route.about, route.to, answered(product, &route)?));
    ctl(product, &["service", "default/web"])
}

fn timed_change(product: &Product, modes: &[Mode], name: &str, text: &str) -> Result<()> {
    let start = Instant::now();
    product.change(|product| product.write_manifest(name, text))?;
    let total = start.elapsed();
    say(&format!("file written -> verified on all nodes: {total:.0?}"));
    for (node, mode) in product.list_nodes()?.nodes.into_iter().zip(modes) {
        let stats = node.last_stats.unwrap_or_default();
        let took = |part: Option<_>| part.and_then(|part| Duration::try_from(part).ok()).unwrap_or_default();
        say(&format!(
            "  {}  version {} programmed in {:.1?}, read back in {:.1?}; {} kernel objects  ({})",
            node.node_name,
            node.verified_seq,
            took(stats.program),
            took(stats.verify),
            stats.kernel_objects_changed,
            mode.name()
        ));
    }
    Ok(())
}

fn without_control_plane(product: &mut Product) -> Result<()> {
    title("The control plane is killed (kill -9)");
    product.control_plane()?.kill()?;
    let routes = [&ROUTES[1], &ROUTES[6], &ROUTES[7]];
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < Duration::from_secs(2) {
        for route in routes {
            answered(product, route)?;
            count += 1;
        }
    }
    say(&format!("{count} new connections in 2 s, every one answered"));
    title("It comes back, on the same manifests");
    let start = Instant::now();
    product.start_control_plane()?;
    let up = start.elapsed();
    product.wait_verified(0)?;
    say(&format!(
        "it answers after {up:.0?}; {:.0?} later every node has reconnected and is verified again",
        start.elapsed().saturating_sub(up)
    ));
    ctl(product, &["nodes"])
}

fn play(product: &Product) -> Result<()> {
    let script = product.lab.directory().join("in");
    std::fs::write(&script, inside(product)?)?;
    let run = format!("sh {}", script.display());
    let grpc = product.url().replace("http://", "");
    title("It is up; play with it from another terminal, as root");
    let sections: [(&str, &[String]); 4] = [
        (
            "What is programmed where",
            &[
                format!("{run} fabric lockstepctl status"),
                format!("{run} fabric lockstepctl service default/web"),
                format!("{run} fabric lockstepctl watch"),
                format!("{run} fabric grpcurl -plaintext {grpc} list"),
                format!("{run} fabric grpcurl -plaintext {grpc} lockstep.v1.StatusService/ListNodes"),
                format!("{run} fabric grpcurl -plaintext {grpc} lockstep.v1.SyncService/FetchSnapshot"),
            ],
        ),
        (
            "Traffic: a pod, a node, a client outside (curl, or any program)",
            &[
                format!("{run} n1p2 curl -s http://10.96.0.10:8000"),
                format!("{run} node3 curl -s http://10.96.0.10:8000"),
                format!("{run} outside curl -s http://198.51.100.20"),
            ],
        ),
        (
            "The kernel of each node",
            &[
                format!("{run} node1 nft list table ip lockstep"),
                format!("{run} node2 iptables-legacy -t nat -S"),
                format!("{run} node3 iptables-nft -t nat -S"),
            ],
        ),
        (
            "Change something, then wait until every node has it",
            &[
                format!("$EDITOR {}/web.yaml", product.manifests().display()),
                format!("{run} fabric lockstepctl wait default/web --level verified --timeout 30s"),
            ],
        ),
    ];
    for (about, lines) in sections {
        println!("\n   # {about}");
        for line in lines {
            say(line);
        }
    }
    println!("\nEnter or Ctrl-C here ends it and removes everything.");
    if std::io::stdin().read(&mut [0])? == 0 {
        // Nobody is there to press Enter: until it is ended by a signal.
        loop {
            std::thread::park();
        }
    }
    Ok(())
}

/// A script that runs a command in a place of the lab: `in PLACE COMMAND...`.
fn inside(product: &Product) -> Result<String> {
    let binaries = std::env::current_exe()?.parent().context("no directory")?.display().to_string();
    let peers = std::env::var("LOCKSTEP_PEERS_DIR").unwrap_or_default();
    let fabric = product.lab.namespace(Place::Fabric);
    let prefix = fabric.trim_end_matches("fabric");
    let server = product.url();
    Ok(format!(
        "# Usage: in PLACE COMMAND...; places: fabric outside node1 node2 node3 n1p1 n1p2 n2p1 ...\n\
         export PATH='{binaries}:{peers}':\"$PATH\":/usr/sbin:/sbin\n\
         export LOCKSTEP_SERVER={server} LOCKSTEP_INSECURE=true\n\
         place=$1; shift\n\
         exec ip netns exec \"{prefix}$place\" \"$@\"\n"
    ))
}

fn example(directory: &Path, name: &str) -> Result<String> {
    std::fs::read_to_string(directory.join(name)).with_context(|| format!("deploy/examples/{name}"))
}

/// Like `replace`, but an example that no longer has the text is an error.
fn replaced(text: &str, old: &str, new: &str) -> Result<String> {
    ensure!(text.contains(old), "deploy/examples/web.yaml has no {old:?} any more");
    Ok(text.replace(old, new))
}

fn title(text: &str) {
    println!("\n== {text}");
}

fn say(text: &str) {
    println!("{}", format!("   {text}").trim_end());
}
