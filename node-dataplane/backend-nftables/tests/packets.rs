//! What packets experience: a node, two pods and a client outside, each a network
//! namespace. Needs root.
#![allow(clippy::unwrap_used)] // a test states its expectations with unwrap

mod support;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lockstep_backend_nftables::Nftables;
use lockstep_kernel::netns;
use lockstep_model::Protocol;
use lockstep_view::{Action, Backend, ForwardingPlan, Frontend, Pool, PortPlan, Surface};
use support::*;

/// Longer than the second after which TCP sends a SYN again: between namespaces the ICMP
/// error can come back while connect() still holds the socket, and then does not end it.
const PATIENCE: Duration = Duration::from_millis(2500);

/// A namespace that `ip netns` made; deleted when dropped.
struct Namespace(String);

impl Namespace {
    /// Linked to this thread's namespace: `net`.2 there, `net`.1 here, default route here.
    fn linked(role: &str, net: &str, net6: &str) -> Self {
        let name = format!("ls-nft-{}-{:?}-{role}", std::process::id(), thread::current().id())
            .replace(['(', ')'], "");
        run("ip", &["netns", "add", &name]);
        netns::run_in(&name, use_addresses_at_once).unwrap();
        let here = format!("to-{role}");
        run("ip", &["link", "add", &here, "type", "veth", "peer", "name", "eth0", "netns", &name]);
        run("ip", &["addr", "add", &format!("{net}.1/24"), "dev", &here]);
        run("ip", &["addr", "add", &format!("{net6}::1/64"), "dev", &here, "nodad"]);
        run("ip", &["link", "set", &here, "up"]);
        let inside = |arguments: &[&str]| run("ip", &[&["-n", &name][..], arguments].concat());
        inside(&["link", "set", "lo", "up"]);
        inside(&["addr", "add", &format!("{net}.2/24"), "dev", "eth0"]);
        inside(&["addr", "add", &format!("{net6}::2/64"), "dev", "eth0", "nodad"]);
        inside(&["link", "set", "eth0", "up"]);
        inside(&["route", "add", "default", "via", &format!("{net}.1")]);
        inside(&["-6", "route", "add", "default", "via", &format!("{net6}::1")]);
        Self(name)
    }

    /// Answers every TCP connection to port 8080 with the client's address, and every UDP
    /// packet to port 5353 likewise.
    fn serve(&self) {
        // A socket stays in the namespace it was made in, whoever uses it.
        let (tcp, udp) = netns::run_in(&self.0, || {
            (TcpListener::bind("[::]:8080").unwrap(), UdpSocket::bind("[::]:5353").unwrap())
        })
        .unwrap();
        thread::spawn(move || {
            for connection in tcp.incoming() {
                let Ok(mut connection) = connection else { return };
                let from = connection.peer_addr().map(|address| address.ip().to_canonical().to_string());
                let _ = connection.write_all(from.unwrap_or_default().as_bytes());
            }
        });
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(from.ip().to_canonical().to_string().as_bytes(), from);
            }
        });
    }

    /// Dials from here; what came back: the address the server saw.
    fn dial(&self, address: &str) -> Result<IpAddr, ErrorKind> {
        netns::run_in(&self.0, || dial(address)).unwrap()
    }

    fn dial_udp(&self, address: &str) -> Result<IpAddr, ErrorKind> {
        netns::run_in(&self.0, || {
            let any = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.connect(address).unwrap();
            let mut buffer = [0; 64];
            socket.send(b"?").map_err(|error| error.kind())?;
            let length = socket.recv(&mut buffer).map_err(|error| error.kind())?;
            Ok(std::str::from_utf8(&buffer[..length]).unwrap().parse().unwrap())
        })
        .unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn dial(address: &str) -> Result<IpAddr, ErrorKind> {
    let address: SocketAddr = address.parse().unwrap();
    answer(TcpStream::connect_timeout(&address, PATIENCE).map_err(|error| error.kind())?)
}

fn answer(mut connection: TcpStream) -> Result<IpAddr, ErrorKind> {
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).map_err(|error| error.kind())?;
    Ok(answer.parse().unwrap())
}

struct World {
    pod1: Namespace,
    pod2: Namespace,
    client: Namespace,
}

/// No duplicate address detection: until it ends, a node cannot even look for its neighbours.
fn use_addresses_at_once() {
    std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
}

/// Runs a test on a node that the backend has programmed.
fn on_node(plan: &ForwardingPlan, test: impl FnOnce(&World, &mut Nftables) + Send) {
    let done = netns::run_in_new(|| {
        run("ip", &["link", "set", "lo", "up"]);
        use_addresses_at_once();
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        let world = World {
            pod1: Namespace::linked("pod1", "10.244.1", "fd00:10:244:1"),
            pod2: Namespace::linked("pod2", "10.244.2", "fd00:10:244:2"),
            client: Namespace::linked("client", "192.168.9", "fd00:9"),
        };
        // As on every node: without a route there, it would not even ask the rules. Not by
        // way of the client, who would get redirects that use up its allowance of ICMP.
        let _uplink = Namespace::linked("uplink", "172.31.0", "fd00:31");
        run("ip", &["route", "add", "default", "via", "172.31.0.2"]);
        run("ip", &["-6", "route", "add", "default", "via", "fd00:31::2"]);
        world.pod1.serve();
        world.pod2.serve();
        let mut backend = Nftables::open().unwrap();
        assert_eq!(backend.sync(plan).unwrap().failures, []);
        assert_eq!(backend.verify().unwrap(), []);
        test(&world, &mut backend);
    });
    done.expect("these tests need root");
}

fn to_pod(n: u8) -> lockstep_view::Target {
    target(&format!("10.244.{n}.2"), 8080)
}

fn one(name: &str, cluster: Vec<lockstep_view::Target>, frontends: Vec<Frontend>) -> PortPlan {
    let mut port = port_plan(Protocol::Tcp, 80, cluster, frontends);
    port.name = name.into();
    port
}

#[test]
fn a_cluster_ip_reaches_its_endpoint_and_masquerades_only_what_is_not_a_pod() {
    let v6 = one("v6", vec![target("fd00:10:244:2::2", 8080)], vec![cluster_ip("fd00:96::1", 80)]);
    let v4 = one("v4", vec![to_pod(2)], vec![cluster_ip("10.96.0.1", 80)]);
    let udp =
        port_plan(Protocol::Udp, 53, vec![target("10.244.2.2", 5353)], vec![cluster_ip("10.96.0.1", 53)]);
    on_node(&plan([service("web", vec![v4, v6, udp])]), |world, _| {
        assert_eq!(world.pod1.dial("10.96.0.1:80"), Ok(ip("10.244.1.2")));
        assert_eq!(world.client.dial("10.96.0.1:80"), Ok(ip("10.244.2.1")));
        assert_eq!(dial("10.96.0.1:80"), Ok(ip("10.244.2.1")), "from the node itself");
        assert_eq!(world.pod1.dial("[fd00:96::1]:80"), Ok(ip("fd00:10:244:1::2")));
        assert_eq!(world.client.dial("[fd00:96::1]:80"), Ok(ip("fd00:10:244:2::1")));
        assert_eq!(world.pod1.dial_udp("10.96.0.1:53"), Ok(ip("10.244.1.2")));
        assert_eq!(world.client.dial_udp("10.96.0.1:53"), Ok(ip("10.244.2.1")));
    });
}

/// What nat sees as a pod's, the chain that refuses by source must see as a pod's.
#[test]
fn pods_told_by_their_interface_are_the_same_for_forwarding_and_for_refusing() {
    let from_pods_only = |number| {
        let actions = [forward(Pool::Cluster, false), Action::Reject, Action::Drop];
        vec![frontend(Surface::ExternalIp(ip("192.0.2.9")), number, actions)]
    };
    let others_only = |number| {
        let actions = [Action::Reject, forward(Pool::Cluster, true), forward(Pool::Cluster, true)];
        vec![frontend(Surface::NodePort, number, actions)]
    };
    let mut desired = plan([
        service("web", vec![one("", vec![to_pod(2)], vec![cluster_ip("10.96.0.1", 80)])]),
        service("pods", vec![one("", vec![to_pod(2)], from_pods_only(80))]),
        service("others", vec![one("", vec![to_pod(2)], others_only(30009))]),
        service(
            "v6",
            vec![one("", vec![target("fd00:10:244:2::2", 8080)], vec![cluster_ip("fd00:96::1", 80)])],
        ),
    ]);
    let refused = Err(ErrorKind::ConnectionRefused);
    for (name, prefix) in [("to-pod", true), ("to-pod1", false)] {
        pods_by_interface(&mut desired, name, prefix);
        on_node(&desired, |world, _| {
            assert_eq!(world.pod1.dial("10.96.0.1:80"), Ok(ip("10.244.1.2")), "{name}");
            assert_eq!(world.pod1.dial("[fd00:96::1]:80"), Ok(ip("fd00:10:244:1::2")), "{name}");
            assert_eq!(world.client.dial("10.96.0.1:80"), Ok(ip("10.244.2.1")), "{name}");
            assert_eq!(dial("10.96.0.1:80"), Ok(ip("10.244.2.1")), "{name}: from the node itself");
            assert_eq!(world.pod1.dial("192.0.2.9:80"), Ok(ip("10.244.1.2")), "{name}");
            assert_eq!(dial("192.0.2.9:80"), refused, "{name}: at OUTPUT");
            assert_eq!(world.client.dial("192.0.2.9:80"), Err(ErrorKind::TimedOut), "{name}: at FORWARD");
            assert_eq!(world.pod1.dial("192.168.9.1:30009"), refused, "{name}: at INPUT");
            assert_eq!(world.client.dial("192.168.9.1:30009"), Ok(ip("10.244.2.1")), "{name}");
            // Only the one interface is named, or both.
            let pod2 = world.pod2.dial("192.168.9.1:30009");
            assert_eq!(pod2.is_ok(), !prefix, "{name}: {pod2:?}");
        });
    }
}

#[test]
fn every_endpoint_gets_its_share_also_after_one_is_replaced() {
    let port = |targets| one("", targets, vec![cluster_ip("10.96.0.1", 80)]);
    let mut desired = plan([service("web", vec![port(vec![to_pod(1), to_pod(2)])])]);
    on_node(&desired.clone(), |world, backend| {
        // The masquerade address tells which pod it was.
        let seen = |world: &World| {
            let mut seen: Vec<_> = (0..40).map(|_| world.client.dial("10.96.0.1:80").unwrap()).collect();
            seen.sort();
            seen.dedup();
            seen
        };
        assert_eq!(seen(world), [ip("10.244.1.1"), ip("10.244.2.1")]);
        desired.services.insert(key("web"), service("web", vec![port(vec![to_pod(2)])]));
        backend.apply(&desired, &[key("web")]).unwrap();
        assert_eq!(backend.verify().unwrap(), []);
        assert_eq!(seen(world), [ip("10.244.2.1")]);
    });
}

#[test]
fn node_ports_masquerade_or_keep_the_client_as_planned() {
    let cluster = one("cluster", vec![to_pod(2)], vec![external(Surface::NodePort, 30001)]);
    let mut local = one(
        "local",
        vec![to_pod(2)],
        vec![
            external_local(
                Surface::NodePort,
                30002,
                Action::Forward { pool: Pool::Local, masquerade: false },
            ),
            external_local(Surface::NodePort, 30003, Action::Drop),
        ],
    );
    local.local = vec![to_pod(1)];
    on_node(&plan([service("web", vec![cluster, local])]), |world, _| {
        assert_eq!(world.client.dial("192.168.9.1:30001"), Ok(ip("10.244.2.1")));
        assert_eq!(world.client.dial("192.168.9.1:30002"), Ok(ip("192.168.9.2")), "the client's own address");
        assert_eq!(world.pod1.dial("192.168.9.1:30002"), Ok(ip("10.244.1.2")), "short circuit");
        assert_eq!(dial("192.168.9.1:30002"), Ok(ip("10.244.2.1")), "short circuit from the node");
        assert_eq!(world.client.dial("192.168.9.1:30003"), Err(ErrorKind::TimedOut), "dropped");
        assert_eq!(world.pod1.dial("192.168.9.1:30003"), Ok(ip("10.244.1.2")));
        assert_eq!(dial("127.0.0.1:30001"), Err(ErrorKind::ConnectionRefused), "never on loopback");
    });
}

/// Who answers a client that is masqueraded: the node's address on the link to the pod.
fn who(dialled: Result<IpAddr, ErrorKind>) -> IpAddr {
    dialled.unwrap()
}

#[test]
fn a_client_keeps_its_endpoint_at_every_kind_of_address() {
    let both = || vec![to_pod(1), to_pod(2)];
    let both_v6 = || vec![target("fd00:10:244:1::2", 8080), target("fd00:10:244:2::2", 8080)];
    let both_udp = || vec![target("10.244.1.2", 5353), target("10.244.2.2", 5353)];
    let v4 = vec![
        cluster_ip("10.96.0.5", 80),
        external(Surface::NodePort, 30005),
        external(Surface::ExternalIp(ip("198.51.100.5")), 80),
        external(Surface::LoadBalancerIp(ip("203.0.113.5")), 80),
    ];
    let v6 = vec![cluster_ip("fd00:96::5", 80), external(Surface::NodePort, 30006)];
    let udp = vec![cluster_ip("10.96.0.5", 53)];
    // Many Services: the odds that all of a client's connections meet by chance are nil.
    let mut ports = vec![
        affine(one("v4", both(), v4), 60),
        affine(one("v6", both_v6(), v6), 60),
        affine(port_plan(Protocol::Udp, 53, both_udp(), udp), 60),
    ];
    ports[2].name = "udp".into();
    on_node(&plan([service("sticky", ports)]), |world, _| {
        let tcp = ["10.96.0.5:80", "192.168.9.1:30005", "198.51.100.5:80", "203.0.113.5:80"];
        for address in tcp.into_iter().chain(["[fd00:96::5]:80", "[fd00::1]:30006"]) {
            let first = who(world.client.dial(address));
            for _ in 0..24 {
                assert_eq!(who(world.client.dial(address)), first, "{address}");
            }
        }
        let first = who(world.client.dial_udp("10.96.0.5:53"));
        for _ in 0..24 {
            assert_eq!(who(world.client.dial_udp("10.96.0.5:53")), first, "UDP");
        }
        // Who comes first is not who comes next: with 64 clients, some get the other one.
        let mut seen: Vec<IpAddr> = (1..=64)
            .map(|n| {
                let own = format!("192.0.2.{n}");
                run("ip", &["route", "replace", &format!("{own}/32"), "via", "192.168.9.2"]);
                let inside = |arguments: &[&str]| run("ip", &[&["-n", &world.client.0], arguments].concat());
                inside(&["addr", "add", &format!("{own}/32"), "dev", "lo"]);
                inside(&["route", "replace", "10.96.0.5/32", "via", "192.168.9.1", "src", &own]);
                let first = who(world.client.dial("10.96.0.5:80"));
                assert_eq!(who(world.client.dial("10.96.0.5:80")), first, "{own}");
                first
            })
            .collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 2, "both endpoints serve somebody");
    });
}

#[test]
fn an_endpoint_that_leaves_takes_its_clients_with_it_at_once_and_others_keep_theirs() {
    let frontends = || vec![cluster_ip("10.96.0.5", 80), external(Surface::NodePort, 30005)];
    let with = |pods: &[u8]| {
        let port = one("", pods.iter().map(|pod| to_pod(*pod)).collect(), frontends());
        plan([service("sticky", vec![affine(port, 3600)])])
    };
    on_node(&with(&[1, 2]), |world, backend| {
        for address in ["10.96.0.5:80", "192.168.9.1:30005"] {
            let first = who(world.client.dial(address));
            let (stays, leaves) = if first == ip("10.244.1.1") { (2, first) } else { (1, first) };
            let other = ip(&format!("10.244.{stays}.1"));
            backend.apply(&with(&[stays]), &[key("sticky")]).unwrap();
            assert_eq!(backend.verify().unwrap(), []);
            for _ in 0..4 {
                assert_eq!(who(world.client.dial(address)), other, "{address}");
            }
            // It stays where it is now when the first comes back.
            backend.apply(&with(&[1, 2]), &[key("sticky")]).unwrap();
            for _ in 0..24 {
                assert_eq!(who(world.client.dial(address)), other, "{address}: {leaves} is back");
            }
            // And for whoever starts now.
            assert_eq!(Nftables::open().unwrap().sync(&with(&[1, 2])).unwrap().objects_changed, 0);
            assert_eq!(who(world.client.dial(address)), other);
        }
    });
}

#[test]
fn clients_keep_their_endpoints_through_an_upgrade_that_adds_sets_and_chains() {
    let frontends = || vec![cluster_ip("10.96.0.5", 80), external(Surface::NodePort, 30005)];
    let port = one("", vec![to_pod(1), to_pod(2)], frontends());
    let desired = plan([service("sticky", vec![affine(port, 3600)])]);
    on_node(&desired, |world, _| {
        let addresses = ["10.96.0.5:80", "192.168.9.1:30005"];
        let first = addresses.map(|address| who(world.client.dial(address)));
        // As a release left it that had none of this.
        run(
            "nft",
            &[
                "flush chain ip lockstep filter-forward; flush chain ip lockstep filter-output; delete chain ip lockstep cluster-ips-check; delete set ip lockstep service_cidrs; delete set ip lockstep cluster_ips",
            ],
        );
        let mut next = Nftables::open().unwrap();
        assert_eq!(next.sync(&desired).unwrap().failures, []);
        assert_eq!(next.verify().unwrap(), []);
        for _ in 0..24 {
            assert_eq!(addresses.map(|address| who(world.client.dial(address))), first);
        }
        assert_eq!(
            world.client.dial("10.96.0.5:81"),
            Err(ErrorKind::ConnectionRefused),
            "what was added is in force"
        );
    });
}

#[test]
fn time_frees_a_client_and_every_connection_begins_it_anew() {
    let port = one("", vec![to_pod(1), to_pod(2)], vec![cluster_ip("10.96.0.5", 80)]);
    on_node(&plan([service("sticky", vec![affine(port, 4)])]), |world, _| {
        let remembered = || {
            let map = run("nft", &["list", "map", "ip", "lockstep", "affinity"]);
            map.contains("192.168.9.2 . 10.96.0.5 . tcp . 80")
        };
        // Kept alive for longer than the time.
        let first = who(world.client.dial("10.96.0.5:80"));
        let start = Instant::now();
        let mut idle = start;
        while start.elapsed() < Duration::from_secs(6) {
            assert!(remembered(), "after {:?}", start.elapsed());
            idle = Instant::now();
            assert_eq!(who(world.client.dial("10.96.0.5:80")), first);
        }
        // Left alone, it is free, and some time it gets the other one.
        while remembered() {
            assert!(idle.elapsed() < Duration::from_secs(20), "it is never forgotten");
            thread::yield_now();
        }
        assert!(idle.elapsed() > Duration::from_millis(3900), "forgotten too early: {:?}", idle.elapsed());
        let mut tries = 0;
        while who(world.client.dial("10.96.0.5:80")) == first {
            tries += 1;
            assert!(tries < 30, "it gets the same one for ever");
            run("nft", &["flush", "map", "ip", "lockstep", "affinity"]);
        }
    });
}

/// The kernel sets what is left of a client's time, and not the time in all.
#[test]
fn a_longer_time_does_not_keep_tables_from_being_made_anew() {
    let with = |seconds| {
        let port = one("", vec![to_pod(1), to_pod(2)], vec![cluster_ip("10.96.0.5", 80)]);
        plan([service("sticky", vec![affine(port, seconds)])])
    };
    on_node(&with(60), |world, backend| {
        let first = who(world.client.dial("10.96.0.5:80"));
        backend.apply(&with(10_800), &[key("sticky")]).unwrap();
        assert_eq!(who(world.client.dial("10.96.0.5:80")), first);
        // More than the sets have room for.
        let many = (0..1_500_u16).map(|n| target(&format!("10.9.{}.{}", n / 250, n % 250), 8080)).collect();
        let many = service("many", vec![one("", many, vec![cluster_ip("10.96.0.6", 80)])]);
        let mut anew = with(10_800);
        anew.services.insert(many.key.clone(), many);
        assert_eq!(backend.sync(&anew).unwrap().failures, []);
        assert_eq!(backend.verify().unwrap(), []);
        for _ in 0..24 {
            assert_eq!(who(world.client.dial("10.96.0.5:80")), first);
        }
    });
}

/// What a client was given when any endpoint was right is not right where only those of the node are.
#[test]
fn a_client_is_not_sent_to_an_endpoint_that_its_pool_has_not() {
    let addresses = ["192.168.9.1:30005", "203.0.113.5:80"];
    let with = |cluster: &[u8], elsewhere| {
        let at = |surface, number| external_local(surface, number, elsewhere);
        let frontends =
            vec![at(Surface::NodePort, 30005), at(Surface::LoadBalancerIp(ip("203.0.113.5")), 80)];
        let mut port = affine(one("", cluster.iter().map(|pod| to_pod(*pod)).collect(), frontends), 3600);
        port.local = vec![to_pod(1)];
        plan([service("sticky", vec![port])])
    };
    let (everywhere, here) = (forward(Pool::Cluster, true), forward(Pool::Local, false));
    for restarts in [false, true] {
        on_node(&with(&[2], everywhere), |world, backend| {
            assert_eq!(addresses.map(|address| who(world.client.dial(address))), [ip("10.244.2.1"); 2]);
            let local = with(&[1, 2], here);
            if restarts {
                assert_eq!(Nftables::open().unwrap().sync(&local).unwrap().failures, []);
            } else {
                backend.apply(&local, &[key("sticky")]).unwrap();
                assert_eq!(backend.verify().unwrap(), []);
            }
            let lost = "table ip lost { chain c { type filter hook forward priority 0; ip daddr 10.244.2.2 drop; }; }";
            run("nft", &[lost]);
            let own = Ok(ip("192.168.9.2"));
            assert_eq!(addresses.map(|address| world.client.dial(address)), [own; 2]);
        });
    }
}

#[test]
fn affinity_leaves_no_priority_behind() {
    let port = one("", vec![to_pod(2)], vec![cluster_ip("fd00:96::5", 80)]);
    let mut port = affine(PortPlan { family: lockstep_model::Family::V6, ..port }, 60);
    port.cluster = vec![target("fd00:10:244:2::2", 8080)];
    on_node(&plan([service("sticky", vec![port])]), |world, _| {
        // After our postrouting chain: nothing but zero goes out.
        run(
            "nft",
            &[
                "table ip6 watch { chain c { type filter hook postrouting priority 300; ip6 daddr fd00:10:244:2::2 tcp flags syn meta priority != none counter; ip6 daddr fd00:10:244:2::2 tcp flags syn counter; }; }",
            ],
        );
        assert_eq!(world.client.dial("[fd00:96::5]:80"), Ok(ip("fd00:10:244:2::1")));
        let counters = run("nft", &["list", "table", "ip6", "watch"]);
        let packets: Vec<&str> =
            counters.split("packets ").skip(1).filter_map(|rest| rest.split(' ').next()).collect();
        assert_eq!(packets, ["0", "1"], "{counters}");
    });
}

#[test]
fn an_endpoint_that_meets_itself_is_masqueraded() {
    let mut port = one("", vec![to_pod(1)], vec![cluster_ip("10.96.0.1", 80)]);
    port.hairpin = vec![to_pod(1)];
    on_node(&plan([service("web", vec![port])]), |world, _| {
        assert_eq!(world.pod1.dial("10.96.0.1:80"), Ok(ip("10.244.1.1")));
    });
}

#[test]
fn without_endpoints_it_is_refused() {
    let reject = |surface, number| frontend(surface, number, [Action::Reject; 3]);
    let v4 = vec![
        reject(Surface::ClusterIp(ip("10.96.0.3")), 80),
        reject(Surface::ExternalIp(ip("198.51.100.3")), 80),
        reject(Surface::NodePort, 30003),
    ];
    let v6 = vec![reject(Surface::ClusterIp(ip("fd00:96::3")), 80)];
    let udp = vec![reject(Surface::ClusterIp(ip("10.96.0.3")), 53)];
    let ports = vec![
        port_plan(Protocol::Tcp, 80, vec![], v4),
        port_plan(Protocol::Tcp, 80, vec![], v6),
        port_plan(Protocol::Udp, 53, vec![], udp),
    ];
    on_node(&plan([service("nobody", ports)]), |world, _| {
        let refused = Err(ErrorKind::ConnectionRefused);
        assert_eq!(world.pod1.dial("10.96.0.3:80"), refused);
        assert_eq!(world.client.dial("198.51.100.3:80"), refused);
        assert_eq!(world.client.dial("192.168.9.1:30003"), refused);
        assert_eq!(world.pod2.dial("[fd00:96::3]:80"), refused);
        assert_eq!(world.pod2.dial_udp("10.96.0.3:53"), refused);
        assert_eq!(dial("10.96.0.3:80"), refused, "from the node itself");
    });
}

#[test]
fn what_a_cluster_ip_does_not_have_is_refused_and_what_nobody_has_is_dropped() {
    let all = |address: &str, number, action| frontend(Surface::ClusterIp(ip(address)), number, [action; 3]);
    let v6 = port_plan(
        Protocol::Tcp,
        80,
        vec![target("fd00:10:244:2::2", 8080)],
        vec![cluster_ip("fd00:96::1", 80)],
    );
    let desired = plan([
        service("web", vec![one("", vec![to_pod(2)], vec![cluster_ip("10.96.0.1", 80)]), v6]),
        service("nobody", vec![one("", vec![], vec![all("10.96.0.3", 80, Action::Reject)])]),
        service("not-here", vec![one("", vec![], vec![all("10.96.0.4", 80, Action::Drop)])]),
    ]);
    on_node(&desired, |world, _| {
        let (refused, dropped) = (Err(ErrorKind::ConnectionRefused), Err(ErrorKind::TimedOut));
        assert_eq!(world.pod1.dial("10.96.0.1:80"), Ok(ip("10.244.1.2")));
        assert_eq!(world.pod1.dial("[fd00:96::1]:80"), Ok(ip("fd00:10:244:1::2")));
        for address in ["10.96.0.1:81", "[fd00:96::1]:81", "10.96.0.3:81", "10.96.0.4:81"] {
            assert_eq!(world.pod1.dial(address), refused, "{address}");
            assert_eq!(world.client.dial(address), refused, "{address}");
            assert_eq!(dial(address), refused, "{address} from the node itself");
        }
        // The port is there, for another protocol.
        for address in ["10.96.0.1:80", "[fd00:96::1]:80", "10.96.0.3:80"] {
            assert_eq!(world.pod1.dial_udp(address), refused, "{address} by UDP");
        }
        assert_eq!(world.pod1.dial("10.96.0.4:80"), dropped, "as the policy has it");
        for address in ["10.96.0.9:80", "[fd00:96::9]:80"] {
            assert_eq!(world.pod1.dial(address), dropped, "{address}");
            assert_eq!(dial(address), dropped, "{address} from the node itself");
        }
    });
}

#[test]
fn service_cidrs_take_effect_when_they_come_and_when_they_go() {
    let mut desired =
        plan([service("web", vec![one("", vec![to_pod(2)], vec![cluster_ip("10.96.0.1", 80)])])]);
    desired.node.service_cidrs.clear();
    on_node(&desired.clone(), |world, backend| {
        // Addresses of somebody who would answer.
        for address in ["10.96.0.9", "10.98.0.1"] {
            run("ip", &["-n", &world.pod2.0, "addr", "add", address, "dev", "lo"]);
            run("ip", &["route", "add", address, "via", "10.244.2.2"]);
        }
        let passes = Ok(ip("10.244.1.2"));
        assert_eq!(world.pod1.dial("10.96.0.9:8080"), passes);
        for cidrs in [&["10.96.0.0/24"][..], &["10.96.0.0/28", "10.97.0.0/16"], &["10.96.0.8/29"]] {
            desired.node.service_cidrs = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
            assert!(
                backend.sync(&desired).unwrap().objects_changed <= 6,
                "{cidrs:?}: nothing else is written"
            );
            assert_eq!(backend.verify().unwrap(), []);
            assert_eq!(world.pod1.dial("10.96.0.9:8080"), Err(ErrorKind::TimedOut), "{cidrs:?}");
            assert_eq!(world.pod1.dial("10.96.0.1:80"), passes, "{cidrs:?}");
            assert_eq!(world.pod1.dial("10.98.0.1:8080"), passes, "{cidrs:?}");
        }
        desired.node.service_cidrs.clear();
        assert_eq!(backend.sync(&desired).unwrap().objects_changed, 2);
        assert_eq!(world.pod1.dial("10.96.0.9:8080"), passes);
        assert_eq!(world.pod1.dial("10.96.0.1:81"), Err(ErrorKind::ConnectionRefused), "a Service has it");
    });
}

#[test]
fn a_flow_goes_on_at_a_port_that_the_cluster_ip_has_no_more() {
    let dns =
        port_plan(Protocol::Udp, 53, vec![target("10.244.2.2", 5353)], vec![cluster_ip("10.96.0.1", 53)]);
    let web = one("", vec![to_pod(2)], vec![cluster_ip("10.96.0.1", 80)]);
    let mut desired = plan([service("web", vec![dns, web.clone()])]);
    on_node(&desired.clone(), |world, backend| {
        let socket = netns::run_in(&world.pod1.0, || UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.connect("10.96.0.1:53").unwrap();
        let ask = || {
            socket.send(b"?").unwrap();
            socket.recv(&mut [0; 64]).map_err(|error| error.kind())
        };
        assert!(ask().is_ok());
        desired.services.insert(key("web"), service("web", vec![web]));
        backend.apply(&desired, &[key("web")]).unwrap();
        assert!(ask().is_ok(), "it is established");
        assert_eq!(world.pod1.dial_udp("10.96.0.1:53"), Err(ErrorKind::ConnectionRefused), "a new one");
    });
}

#[test]
fn only_allowed_sources_reach_a_restricted_address() {
    let mut restricted = external(Surface::LoadBalancerIp(ip("192.0.2.7")), 80);
    restricted.allowed_sources = Some(vec!["10.244.1.0/24".parse().unwrap()].into());
    let port = one("", vec![to_pod(2)], vec![restricted, cluster_ip("10.96.0.7", 80)]);
    on_node(&plan([service("restricted", vec![port])]), |world, _| {
        assert_eq!(world.pod1.dial("192.0.2.7:80"), Ok(ip("10.244.2.1")));
        assert_eq!(world.client.dial("192.0.2.7:80"), Err(ErrorKind::TimedOut));
        assert_eq!(world.client.dial("10.96.0.7:80"), Ok(ip("10.244.2.1")), "other addresses are open");
    });
}

#[test]
fn no_connection_is_lost_while_the_tables_are_made_anew() {
    let port = one("", vec![to_pod(2)], vec![cluster_ip("10.96.0.1", 80)]);
    let mut desired = plan([service("web", vec![port])]);
    on_node(&desired.clone(), |world, backend| {
        let (done, dialled) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            let dialling = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(world.pod1.dial("10.96.0.1:80"), Ok(ip("10.244.1.2")));
                    dialled.fetch_add(1, Ordering::Relaxed);
                }
            });
            let mut rounds = 0;
            while !dialling.is_finished() && (rounds < 20 || dialled.load(Ordering::Relaxed) < 50) {
                // Another mark changes rules, and so the whole table.
                rounds += 1;
                desired.node.masquerade_mark = 0x4000 << (rounds % 2);
                assert!(backend.sync(&desired).unwrap().objects_changed > 0);
            }
            done.store(true, Ordering::Relaxed);
            dialling.join().unwrap();
        });
    });
}
