//! Packets through the rules, in namespaces of their own: pod and server behind a node, and a
//! client outside. Needs root, iptables and iproute2; fails without.
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use lockstep_backend_iptables::Iptables;
use lockstep_kernel::exec::Processes;
use lockstep_kernel::netns;
use lockstep_model::{Family, Port, Protocol, ServiceKey};
use lockstep_view::backend::Backend;
use lockstep_view::{
    Action, ForwardingPlan, Frontend, InterfaceName, NodePlan, NodePortScope, PodSources, Pool, PortPlan,
    ServicePlan, Surface, Target,
};
use lockstep_xtables::Flavour;

const LIMIT: Duration = Duration::from_secs(5);
/// What is not answered for so long is dropped.
const SILENCE: Duration = Duration::from_secs(1);

/// Names of the three namespaces; they go when this does.
struct Net(String);

impl Net {
    fn new(tag: &str) -> Self {
        let net = Net(format!("lsipt{}{tag}", std::process::id()));
        net.sh("for n in NETn NETp NETc; do ip netns add $n; ip -n $n link set lo up; done
            ip -n NETn link add pod type veth peer name eth0 netns NETp
            ip -n NETn link add out type veth peer name eth0 netns NETc
            for a in 'NETn pod 10.244.0.1/24 fd00:244::1/64' 'NETp eth0 10.244.0.5/24 fd00:244::5/64' \
                     'NETn out 192.0.2.1/24 2001:db8::1/64' 'NETc eth0 192.0.2.9/24 2001:db8::9/64'; do
                set -- $a; ip -n $1 address add $3 dev $2; ip -n $1 address add $4 dev $2 nodad; ip -n $1 link set $2 up
            done
            ip -n NETp route add default via 10.244.0.1; ip -n NETp -6 route add default via fd00:244::1
            ip -n NETc route add default via 192.0.2.1; ip -n NETc -6 route add default via 2001:db8::1
            ip -n NETn link add uplink type veth peer name void; ip -n NETn link set void up; ip -n NETn link set uplink up
            ip -n NETn address add 198.51.100.1/32 dev uplink; ip -n NETn address add 2001:db8:5::1/128 dev uplink nodad
            ip -n NETn route add default dev uplink; ip -n NETn -6 route add default dev uplink
            ip netns exec NETn sh -ec 'cd /proc/sys/net; echo 1 >ipv4/ip_forward; echo 1 >ipv6/conf/all/forwarding
                echo 0 >ipv4/icmp_ratelimit; echo 0 >ipv6/icmp/ratelimit'");
        net
    }

    fn sh(&self, script: &str) {
        let script = script.replace("NET", &self.0);
        let output = Command::new("sh").args(["-ec", &script]).output().unwrap();
        assert!(output.status.success(), "needs root: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn run<T: Send>(&self, which: char, work: impl FnOnce() -> T + Send) -> T {
        netns::run_in(&format!("{}{which}", self.0), work).unwrap()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for which in ['n', 'p', 'c'] {
            let name = format!("{}{which}", self.0);
            let _ = Command::new("ip").args(["netns", "delete", &name]).status();
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn port(number: u16) -> Port {
    Port::new(number).unwrap()
}

struct Addresses {
    family: Family,
    pod: IpAddr,
    vip: IpAddr,
    refused: IpAddr,
    odd: IpAddr,
    node: IpAddr,
    client: IpAddr,
}

fn addresses(family: Family) -> Addresses {
    let [pod, vip, refused, odd, node, client] = match family {
        Family::V4 => ["10.244.0.5", "10.96.0.10", "10.96.0.11", "10.96.0.12", "192.0.2.1", "192.0.2.9"],
        Family::V6 => ["fd00:244::5", "fd00:96::a", "fd00:96::b", "fd00:96::c", "2001:db8::1", "2001:db8::9"],
    }
    .map(ip);
    Addresses { family, pod, vip, refused, odd, node, client }
}

/// `odd` treats every class of sources in another way, at an address for each family.
fn plan(pods: PodSources) -> ForwardingPlan {
    let kept = Action::Forward { pool: Pool::Cluster, masquerade: false };
    let masqueraded = Action::Forward { pool: Pool::Cluster, masquerade: true };
    let frontend = |surface, number, [from_pod, from_node, from_elsewhere]: [Action; 3]| Frontend {
        surface,
        port: port(number),
        from_pod,
        from_node,
        from_elsewhere,
        allowed_sources: None,
    };
    let mut services = Vec::new();
    for name in ["web", "none", "odd"] {
        let mut ports = Vec::new();
        for (family, protocol) in
            Family::ALL.into_iter().flat_map(|f| [(f, Protocol::Tcp), (f, Protocol::Udp)])
        {
            let at = addresses(family);
            let target = vec![Target { address: at.pod, port: port(8080) }];
            let (cluster, frontends) = match name {
                "web" => (
                    target,
                    vec![
                        frontend(Surface::ClusterIp(at.vip), 80, [kept, masqueraded, masqueraded]),
                        frontend(Surface::NodePort, 30080, [masqueraded; 3]),
                    ],
                ),
                "odd" => {
                    let classes = [kept, Action::Reject, Action::Drop];
                    let others = [Action::Reject, masqueraded, masqueraded];
                    let at_node = frontend(Surface::NodePort, 30082, others);
                    (target, vec![frontend(Surface::ExternalIp(at.odd), 80, classes), at_node])
                }
                _ => (
                    Vec::new(),
                    vec![
                        frontend(Surface::ClusterIp(at.refused), 80, [Action::Reject; 3]),
                        frontend(Surface::NodePort, 30081, [Action::Reject; 3]),
                    ],
                ),
            };
            ports.push(PortPlan {
                family,
                protocol,
                port: port(80),
                name: protocol.name().into(),
                hairpin: cluster.clone(),
                serving: Vec::new(),
                cluster,
                local: Vec::new(),
                frontends,
                affinity_seconds: None,
            });
        }
        let key = ServiceKey::new("default", name);
        let (required_features, conflicts) = (Vec::new(), Vec::new());
        services.push(ServicePlan {
            key,
            ports,
            required_features,
            health_check: None,
            conflicts,
            cluster_ips: Vec::new(),
        });
    }
    let node = NodePlan {
        pods: Some(pods),
        node_ports_v4: NodePortScope::AllLocal,
        node_ports_v6: NodePortScope::AllLocal,
        localhost_node_ports: false,
        masquerade_mark: 0x4000,
        service_cidrs: Vec::new(),
        node_addresses: Vec::new(),
    };
    ForwardingPlan { node, services: services.into_iter().map(|s| (s.key.clone(), Arc::new(s))).collect() }
}

/// Servers that answer with the address they see.
fn serve(net: &Net, family: Family) {
    let here = SocketAddr::new(addresses(family).pod, 8080);
    let (tcp, udp) = net.run('p', || (TcpListener::bind(here).unwrap(), UdpSocket::bind(here).unwrap()));
    std::thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.unwrap();
            let seen = stream.peer_addr().unwrap().ip().to_string();
            let _ = stream.write_all(seen.as_bytes());
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 16];
        while let Ok((_, from)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(from.ip().to_string().as_bytes(), from);
        }
    });
}

fn tcp(to: SocketAddr) -> Result<IpAddr, ErrorKind> {
    let mut stream = TcpStream::connect_timeout(&to, LIMIT).map_err(|error| error.kind())?;
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|error| error.kind())?;
    Ok(ip(&answer))
}

fn udp(to: SocketAddr) -> Result<IpAddr, ErrorKind> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    // What is refused on the way out of the sender's own host fails in the call that sends.
    socket.send(b"?").map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => ErrorKind::ConnectionRefused,
        other => other,
    })?;
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer).map_err(|error| error.kind())?;
    Ok(ip(std::str::from_utf8(&buffer[..length]).unwrap()))
}

/// What nat takes for a pod's, the chains that refuse by source must take for a pod's.
fn classes(net: &Net, what: &str) {
    for at in Family::ALL.map(addresses) {
        let dial = |which, address| net.run(which, || tcp(SocketAddr::new(address, 80)));
        let refused = Err(ErrorKind::ConnectionRefused);
        assert!(dial('p', at.odd).is_ok(), "{what}: a pod");
        assert_eq!(dial('n', at.odd), refused, "{what}: the node, at OUTPUT");
        let at_node = |which| net.run(which, || tcp(SocketAddr::new(at.node, 30082)));
        assert_eq!(at_node('p'), refused, "{what}: a pod, at INPUT");
        assert!(at_node('c').is_ok() && at_node('n').is_ok(), "{what}: all others");
    }
    let to = SocketAddr::new(addresses(Family::V4).odd, 80);
    let outside = net.run('c', || TcpStream::connect_timeout(&to, SILENCE).map_err(|error| error.kind()));
    assert_eq!(outside.err(), Some(ErrorKind::TimedOut), "{what}: elsewhere, at FORWARD");
}

fn packets(flavour: Flavour) {
    let net = Net::new(flavour.name());
    Family::ALL.into_iter().for_each(|family| serve(&net, family));
    let program = |pods: PodSources| {
        net.run('n', || {
            let mut backend = Iptables::open(Arc::new(Processes), flavour).unwrap();
            assert_eq!(backend.sync(&plan(pods)).unwrap().failures, []);
            assert_eq!(backend.verify().unwrap(), []);
        });
    };
    let name = |text| InterfaceName::new(text).unwrap();
    for pods in [PodSources::Interface(name("pod")), PodSources::InterfacePrefix(name("po"))] {
        let told = format!("{flavour}, {pods:?}");
        program(pods);
        classes(&net, &told);
    }
    let cidrs = ["10.244.0.0/16", "fd00:244::/64"].map(|cidr| cidr.parse().unwrap());
    program(PodSources::Cidrs(cidrs.into()));
    classes(&net, flavour.name());
    for at in Family::ALL.map(addresses) {
        let gateway = if at.family == Family::V4 { ip("10.244.0.1") } else { ip("fd00:244::1") };
        for (protocol, dial) in [("tcp", tcp as fn(SocketAddr) -> _), ("udp", udp)] {
            let dial = |which, address, number| net.run(which, || dial(SocketAddr::new(address, number)));
            let what = format!("{flavour} {:?} {protocol}", at.family);
            assert_eq!(dial('c', at.vip, 80), Ok(gateway), "{what}: cluster IP from outside is masqueraded");
            assert_eq!(dial('c', at.node, 30080), Ok(gateway), "{what}: node port is masqueraded");
            assert_eq!(dial('n', at.vip, 80), Ok(gateway), "{what}: cluster IP from the node");
            assert_eq!(dial('p', at.vip, 80), Ok(gateway), "{what}: a pod that meets itself is masqueraded");
            let refused = Err(ErrorKind::ConnectionRefused);
            for which in ['c', 'n', 'p'] {
                assert_eq!(dial(which, at.refused, 80), refused, "{what}: no endpoints, from {which}");
                assert_eq!(dial(which, at.node, 30081), refused, "{what}: node port, from {which}");
            }
            assert_eq!(dial('c', at.pod, 8080), Ok(at.client), "{what}: what is no Service is left alone");
        }
    }
}

#[test]
fn packets_through_legacy() {
    packets(Flavour::Legacy);
}

#[test]
fn packets_through_nft() {
    packets(Flavour::Nft);
}
