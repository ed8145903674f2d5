//! A cluster's network on one machine, from network namespaces.
//!
//! ```text
//!            fabric (bridge; 10.200.0.1, fd00:200::1) ── outside (…100, …::100)
//!           /       |        \                   knows: cluster IPs via node 1,
//!       node1     node2     node3                external addresses of `via N` via node N
//!      …11, ::11   …12       …13
//!       /   \      /  \      /  \       pod P of node N: 10.244.N.P, fd00:244:N::P
//!   n1p1   n1p2  n2p1 …    n3p1 …       one routed link each, as most CNI plug-ins do it
//! ```
//!
//! Every namespace has a name of this run only. Whatever ends this process, also kill -9, a
//! companion shell ends what runs in the namespaces and removes them.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use lockstep_kernel::netns;

/// IP family of a probe or an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Where something runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// The network between the nodes; the control plane lives here.
    Fabric,
    /// A client that belongs to no node.
    Outside,
    /// A node, from 1.
    Node(u8),
    /// A pod of a node, both from 1.
    Pod(u8, u8),
}

/// The namespaces of one cluster. Ends with the value.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    nodes: u8,
    pods: u8,
    directory: PathBuf,
    companion: Child,
    // Its end is what the companion waits for.
    alive: Option<ChildStdin>,
    /// Source ports that clients were given so far.
    pub(crate) source_ports: AtomicU32,
}

/// Pods of the cluster, both families.
pub const POD_CIDRS: &str = "10.244.0.0/16,fd00:244::/32";

/// Waits for the end of its input, that is of the process that started it, then cleans up.
/// `$1` is the prefix of the namespaces, `$2` the directory of the run.
const COMPANION: &str = r#"
trap '' INT TERM HUP QUIT
cat >/dev/null
# Where another run ends at the same time, ip complains of what it finds half gone.
for name in $(ip netns list 2>/dev/null | cut -d' ' -f1 | grep "^$1"); do
    for pid in $(ip netns pids "$name"); do kill -KILL "$pid" 2>/dev/null; done
    ip netns del "$name"
done
rm -rf "$2"
"#;

impl Lab {
    /// Builds the network: `nodes` nodes with `pods` pods each.
    pub fn new(nodes: u8, pods: u8) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("ls-{:x}-{count}-", std::process::id());
        let directory = std::env::temp_dir().join(format!("lockstep-{}", prefix.trim_end_matches('-')));
        std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        let mut companion = Command::new("sh")
            .args(["-c", COMPANION, "sh", &prefix])
            .arg(&directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("start the shell that cleans up")?;
        let alive = companion.stdin.take();
        let source_ports = AtomicU32::new(0);
        let lab = Self { prefix, nodes, pods, directory, companion, alive, source_ports };
        lab.build().context("build the network (needs root, iproute2)")?;
        Ok(lab)
    }

    /// Files of this run. Removed with the lab.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Number of nodes.
    pub fn nodes(&self) -> u8 {
        self.nodes
    }

    /// Every pod, sorted.
    pub fn pods(&self) -> impl Iterator<Item = Place> + '_ {
        (1..=self.nodes).flat_map(|node| (1..=self.pods).map(move |pod| Place::Pod(node, pod)))
    }

    /// The namespace of a place, as `ip netns` knows it.
    pub fn namespace(&self, place: Place) -> String {
        format!("{}{place}", self.prefix)
    }

    /// Runs `work` inside a place.
    pub fn inside<T: Send>(&self, place: Place, work: impl FnOnce() -> T + Send) -> Result<T> {
        Ok(netns::run_in(&self.namespace(place), work)?)
    }

    /// Runs a tool inside a place and returns what it prints.
    pub fn tool(&self, place: Place, arguments: &[&str]) -> Result<String> {
        let output = self
            .command(place, arguments[0])
            .args(&arguments[1..])
            .output()
            .with_context(|| format!("{place}: {}", arguments.join(" ")))?;
        ensure!(
            output.status.success(),
            "{place}: {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A command that will run inside a place; its process id is the program's own. A place has a lock
    /// of iptables-legacy of its own, as a machine has: with one for all, nodes wait for each other.
    pub fn command(&self, place: Place, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(place)]).arg(program);
        command.env("XTABLES_LOCKFILE", self.directory.join(format!("xtables-{place}.lock")));
        command
    }

    fn build(&self) -> Result<()> {
        let mut places = vec![Place::Fabric, Place::Outside];
        places.extend((1..=self.nodes).map(Place::Node));
        places.extend(self.pods());
        let mut names = String::new();
        for place in &places {
            let _ = writeln!(names, "netns add {}", self.namespace(*place));
        }
        batch(Command::new("ip"), &names)?;
        for place in &places {
            self.settings(*place)?;
        }
        self.script(Place::Fabric, &self.fabric())?;
        self.script(Place::Outside, &self.outside())?;
        for node in 1..=self.nodes {
            self.script(Place::Node(node), &self.node(node))?;
        }
        for pod in self.pods() {
            self.script(pod, &pod_links(pod))?;
        }
        Ok(())
    }

    /// Kernel settings, before any link exists to which the defaults would not reach.
    fn settings(&self, place: Place) -> Result<()> {
        let mut settings = vec![
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
            ("ipv6/conf/all/accept_dad", "0"),
            ("ipv6/conf/default/accept_dad", "0"),
            // One refusal per second and destination is the kernel's default; tests ask faster.
            ("ipv4/icmp_ratelimit", "0"),
            ("ipv6/icmp/ratelimit", "0"),
            // A node that is told where it should have sent to would not ask its gateway again.
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/default/send_redirects", "0"),
            ("ipv4/conf/all/accept_redirects", "0"),
            ("ipv4/conf/default/accept_redirects", "0"),
            ("ipv6/conf/all/accept_redirects", "0"),
            ("ipv6/conf/default/accept_redirects", "0"),
        ];
        if matches!(place, Place::Node(_)) {
            settings.push(("ipv4/ip_forward", "1"));
            settings.push(("ipv6/conf/all/forwarding", "1"));
        }
        self.inside(place, || {
            for (name, value) in settings {
                let path = Path::new("/proc/sys/net").join(name);
                std::fs::write(&path, value).with_context(|| path.display().to_string())?;
            }
            Ok(())
        })?
    }

    fn fabric(&self) -> String {
        let mut script =
            "link set lo up\nlink add br0 type bridge mcast_snooping 0\nlink set br0 up\n".to_owned();
        let _ = writeln!(script, "addr add {}/24 dev br0", v4(Place::Fabric));
        let _ = writeln!(script, "addr add {}/64 dev br0 nodad", v6(Place::Fabric));
        let everybody = (1..=self.nodes).map(Place::Node).chain([Place::Outside]);
        for place in everybody {
            let namespace = self.namespace(place);
            let _ = writeln!(script, "link add {place} type veth peer name eth0 netns {namespace}");
            let _ = writeln!(script, "link set {place} master br0 up");
        }
        script
    }

    fn outside(&self) -> String {
        let mut script = on_fabric(Place::Outside);
        for (range, node) in
            [("10.96.0.0/16", 1), ("192.0.2.0/24", 1), ("198.51.100.0/24", 2), ("203.0.113.0/24", 3)]
        {
            if node <= self.nodes {
                let _ = writeln!(script, "route add {range} via {}", v4(Place::Node(node)));
            }
        }
        for (range, node) in
            [("fd00:96::/64", 1), ("2001:db8:1::/48", 1), ("2001:db8:2::/48", 2), ("2001:db8:3::/48", 3)]
        {
            if node <= self.nodes {
                let _ = writeln!(script, "route add {range} via {}", v6(Place::Node(node)));
            }
        }
        script
    }

    fn node(&self, node: u8) -> String {
        let mut script = on_fabric(Place::Node(node));
        // Service addresses must have a route, or the node itself could not send to them.
        let _ = writeln!(script, "route add default via {}", v4(Place::Fabric));
        let _ = writeln!(script, "route add default via {}", v6(Place::Fabric));
        for other in (1..=self.nodes).filter(|other| *other != node) {
            let _ = writeln!(script, "route add 10.244.{other}.0/24 via {}", v4(Place::Node(other)));
            let _ = writeln!(script, "route add fd00:244:{other}::/48 via {}", v6(Place::Node(other)));
        }
        for pod in 1..=self.pods {
            let place = Place::Pod(node, pod);
            let namespace = self.namespace(place);
            let _ = writeln!(script, "link add {place} type veth peer name eth0 netns {namespace}");
            let _ = writeln!(script, "addr add {}/32 dev {place}", gateway_v4(node));
            let _ = writeln!(script, "addr add {}/128 dev {place} nodad", gateway_v6(node));
            let _ = writeln!(script, "link set {place} up");
            let _ = writeln!(script, "route add {} dev {place}", v4(place));
            let _ = writeln!(script, "route add {} dev {place}", v6(place));
        }
        script
    }

    fn script(&self, place: Place, script: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["-netns", &self.namespace(place)]);
        batch(command, script).with_context(|| place.to_string())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        drop(self.alive.take());
        // Nothing to be done about a shell that cannot be waited for.
        let _ = self.companion.wait();
    }
}

/// Runs many `ip` commands in one process.
fn batch(mut ip: Command, script: &str) -> Result<()> {
    let mut child = ip.args(["-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("ip: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn on_fabric(place: Place) -> String {
    format!(
        "link set lo up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\nlink set eth0 up\n",
        v4(place),
        v6(place)
    )
}

fn pod_links(pod: Place) -> String {
    let Place::Pod(node, _) = pod else { return String::new() };
    let mut script = on_fabric(pod).replace("/24 dev", "/32 dev").replace("/64 dev", "/128 dev");
    let _ = writeln!(script, "route add {} dev eth0", gateway_v4(node));
    let _ = writeln!(script, "route add default via {}", gateway_v4(node));
    let _ = writeln!(script, "route add {} dev eth0", gateway_v6(node));
    let _ = writeln!(script, "route add default via {}", gateway_v6(node));
    script
}

/// The node's address on the links to its pods.
fn gateway_v4(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, 254)
}

fn gateway_v6(node: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x244, u16::from(node), 0, 0, 0, 0, 0xffff)
}

fn v4(place: Place) -> Ipv4Addr {
    match place {
        Place::Fabric => Ipv4Addr::new(10, 200, 0, 1),
        Place::Outside => Ipv4Addr::new(10, 200, 0, 100),
        Place::Node(node) => Ipv4Addr::new(10, 200, 0, 10 + node),
        Place::Pod(node, pod) => Ipv4Addr::new(10, 244, node, pod),
    }
}

fn v6(place: Place) -> Ipv6Addr {
    let fabric = |last: u16| Ipv6Addr::new(0xfd00, 0x200, 0, 0, 0, 0, 0, last);
    match place {
        Place::Fabric => fabric(1),
        Place::Outside => fabric(0x100),
        Place::Node(node) => fabric(0x10 + u16::from(node)),
        Place::Pod(node, pod) => Ipv6Addr::new(0xfd00, 0x244, u16::from(node), 0, 0, 0, 0, u16::from(pod)),
    }
}

impl Place {
    /// Its address.
    pub fn address(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => v4(self).into(),
            Family::V6 => v6(self).into(),
        }
    }

    /// True where `address` is one of its own.
    pub fn owns(self, address: IpAddr) -> bool {
        if address == v4(self) || address == v6(self) {
            return true;
        }
        match self {
            Place::Node(node) => address == gateway_v4(node) || address == gateway_v6(node),
            _ => false,
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Fabric => f.write_str("fabric"),
            Place::Outside => f.write_str("outside"),
            Place::Node(node) => write!(f, "node{node}"),
            Place::Pod(node, pod) => write!(f, "n{node}p{pod}"),
        }
    }
}

impl std::str::FromStr for Place {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = match text {
            "fabric" => Some(Place::Fabric),
            "outside" => Some(Place::Outside),
            _ => match (
                text.strip_prefix("node"),
                text.strip_prefix('n').and_then(|rest| rest.split_once('p')),
            ) {
                (Some(node), _) => node.parse().ok().map(Place::Node),
                (None, Some((node, pod))) => {
                    node.parse().ok().and_then(|node| Some(Place::Pod(node, pod.parse().ok()?)))
                }
                _ => None,
            },
        };
        parsed.with_context(|| format!("{text:?}: not a place; fabric, outside, node1 or n1p1 are"))
    }
}

impl Family {
    /// The one that it is not.
    pub fn other(self) -> Self {
        match self {
            Family::V4 => Family::V6,
            Family::V6 => Family::V4,
        }
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_reads_as_it_is_written() {
        for place in [Place::Fabric, Place::Outside, Place::Node(2), Place::Pod(3, 1)] {
            assert_eq!(place.to_string().parse::<Place>().unwrap(), place);
        }
        assert!("nowhere".parse::<Place>().is_err());
    }

    #[test]
    fn a_node_owns_its_addresses_and_no_pods() {
        assert!(Place::Node(1).owns(Place::Node(1).address(Family::V6)));
        assert!(Place::Node(1).owns(gateway_v4(1).into()));
        assert!(!Place::Node(1).owns(Place::Pod(1, 1).address(Family::V4)));
    }
}
