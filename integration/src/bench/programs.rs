//! The real programs over a whole cluster: control plane on a directory of manifests, stream,
//! agent, kernel; in a network namespace that ends with the measurement.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lockstep_kernel::exec;
use lockstep_kernel::netns;
use lockstep_kernel::nf_tables::{self, Family, Kernel, Step};

use crate::leftovers::Directory;

use super::cluster::{CLUSTER_CIDR, ENDPOINTS, NODE, Upstream, replacement};

/// Table of the agent.
pub const TABLE: &str = "lockstep";
/// Where the control plane answers.
pub const LISTEN: &str = "127.0.0.1:7000";
const HTTP: &str = "127.0.0.1:7001";
/// How long anything may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(200);

/// Both programs, with every endpoint in the kernel.
pub struct Programs {
    /// The agent of one node.
    pub agent: Program,
    /// What it talks to.
    pub control_plane: Program,
    /// This namespace's nf_tables.
    pub kernel: Kernel,
    services: u32,
    upstream: Upstream,
    directory: PathBuf,
}

/// Resident memory in MiB.
#[derive(Debug, Clone, Copy)]
pub struct Resident {
    /// At this moment.
    pub now: f64,
    /// The most there was since the program started or [`Program::forget_peak`].
    pub peak: f64,
}

/// A child that ends with its owner.
pub struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself, which is no fault here.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Program {
    fn start(binary: &Path, arguments: &[&str], log: &Path) -> Result<Self> {
        let log = fs::File::create(log)?;
        let mut command = Command::new(binary);
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // Started from the thread that has the namespace, and that is the one that ends it.
        exec::die_with_thread(&mut command);
        Ok(Self(command.spawn().with_context(|| format!("start {}", binary.display()))?))
    }

    /// What it holds.
    pub fn resident(&self) -> Result<Resident> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let field = |name: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
            Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
        };
        Ok(Resident { now: field("VmRSS:")?, peak: field("VmHWM:")? })
    }

    /// The peak is counted from now on.
    pub fn forget_peak(&self) -> Result<()> {
        Ok(fs::write(format!("/proc/{}/clear_refs", self.0.id()), "5")?)
    }
}

/// Loads this many Services from files, through a control plane and a stream, into the kernel;
/// then does the work there. `binaries` is where both programs are.
pub fn run<T: Send>(
    services: u32,
    binaries: &Path,
    work: impl FnOnce(&mut Programs) -> Result<T> + Send,
) -> Result<T> {
    let directory = Directory::new("lockstep-bench-")?;
    let upstream = Upstream::new(services);
    in_network(|| work(&mut Programs::start(services, upstream, binaries, directory.path())?))
}

/// Runs `work` in a network namespace of its own that has its loopback.
pub(super) fn in_network<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    netns::run_in_new(|| {
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("ip")?;
        ensure!(up.success(), "ip link set lo up failed");
        work()
    })?
}

impl Programs {
    fn start(services: u32, upstream: Upstream, binaries: &Path, directory: &Path) -> Result<Self> {
        let manifests = directory.join("manifests");
        fs::create_dir(&manifests)?;
        write_manifests(&upstream, services, &manifests, None)?;
        let source = format!("files:{}", manifests.display());
        let control_plane = Program::start(
            &binaries.join("lockstep-control-plane"),
            &["--source", &source, "--listen", LISTEN, "--http", HTTP, "--insecure"],
            &directory.join("control-plane.log"),
        )?;
        until("the control plane to be ready", POLL, || ready(HTTP))
            .with_context(|| tail(&directory.join("control-plane.log")))?;
        let state = directory.join("state");
        let url = format!("http://{LISTEN}");
        let agent = Program::start(
            &binaries.join("lockstep-node"),
            &[
                "--control-plane",
                &url,
                "--node-name",
                NODE,
                "--mode",
                "nftables",
                "--cluster-cidr",
                CLUSTER_CIDR,
                "--state-dir",
                &state.to_string_lossy(),
                "--healthz",
                "127.0.0.1:7002",
                "--metrics",
                "127.0.0.1:7003",
                "--conntrack-max-per-core",
                "0",
                "--insecure",
            ],
            &directory.join("node.log"),
        )?;
        let directory = directory.to_owned();
        let mut this = Self { agent, control_plane, kernel: Kernel::open()?, services, upstream, directory };
        this.until_targets("every endpoint to be in the kernel", services * ENDPOINTS, |_| true)?;
        Ok(this)
    }

    /// Replaces one endpoint of every Service by another pod, all at once, and waits until the
    /// kernel has them.
    pub fn burst(&mut self) -> Result<()> {
        let elsewhere = self.directory.join("burst");
        fs::create_dir(&elsewhere)?;
        write_manifests(&self.upstream, self.services, &elsewhere, Some(1))?;
        for file in fs::read_dir(&elsewhere)? {
            let file = file?;
            fs::rename(file.path(), self.directory.join("manifests").join(file.file_name()))?;
        }
        let replaced = replacement(0)..;
        self.until_targets("every replaced endpoint to be in the kernel", self.services, |target| {
            replaced.contains(&target)
        })
    }

    /// Waits until the kernel holds so many targets of this kind.
    fn until_targets(&mut self, what: &str, wanted: u32, kind: impl Fn(Ipv4Addr) -> bool) -> Result<()> {
        let (kernel, wanted) = (&mut self.kernel, usize::try_from(wanted)?);
        until(what, POLL, || {
            if !nf_tables::table_exists(kernel, Family::Ipv4, TABLE)? {
                return Ok(false);
            }
            let mut found = 0;
            nf_tables::elements(kernel, Family::Ipv4, TABLE, "endpoints", &mut |step| match step {
                Step::Begin => found = 0,
                Step::Element(element) => {
                    let address = element.bytes().and_then(|bytes| bytes.first_chunk::<4>().copied());
                    found += usize::from(address.is_some_and(|address| kind(address.into())));
                }
            })?;
            Ok(found >= wanted)
        })
        .with_context(|| tail(&self.directory.join("node.log")))
    }
}

/// Asks again and again until it is done.
pub fn until(what: &str, poll: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        if start.elapsed() > PATIENCE {
            bail!("waited {} s for {what}", PATIENCE.as_secs());
        }
        std::thread::sleep(poll);
    }
    Ok(())
}

fn ready(address: &str) -> Result<bool> {
    let Ok(mut stream) = TcpStream::connect(address) else { return Ok(false) };
    stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.starts_with("HTTP/1.1 200"))
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    format!("its log ends: {}", lines.into_iter().rev().collect::<Vec<_>>().join(" / "))
}

/// A Node and, per 500 Services, one file of Services and EndpointSlices. `replaced`: the first
/// endpoint of each Service is another pod, numbered from this on.
fn write_manifests(
    upstream: &Upstream,
    services: u32,
    directory: &Path,
    replaced: Option<u32>,
) -> Result<()> {
    let node = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {NODE}, uid: {NODE}}}\n\
         status: {{addresses: [{{type: InternalIP, address: 192.0.2.1}}]}}\n"
    );
    fs::write(directory.join("nodes.yaml"), node)?;
    for first in (0..services).step_by(500) {
        let mut text = String::new();
        for index in first..services.min(first + 500) {
            let (service, set) = upstream.objects(index, replaced.map(|from| from + index));
            let (namespace, name) = (&service.key.namespace, &service.key.name);
            let cluster_ip = service.cluster_ips.first().context("no cluster IP")?;
            writeln!(
                text,
                "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: {namespace}, name: {name}}}\n\
                 spec: {{type: ClusterIP, clusterIP: {cluster_ip}, clusterIPs: [{cluster_ip}], \
                 ports: [{{name: http, protocol: TCP, port: 80}}]}}\n---\n\
                 apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
                 metadata: {{namespace: {namespace}, name: {}, labels: {{kubernetes.io/service-name: {name}}}}}\n\
                 ports: [{{name: http, protocol: TCP, port: 8080}}]\nendpoints:",
                set.key.slice
            )?;
            for endpoint in &set.endpoints {
                let node = endpoint.node_name.as_deref().unwrap_or_default();
                writeln!(
                    text,
                    "- {{addresses: [{}], nodeName: {node}, conditions: {{ready: true}}}}",
                    endpoint.address
                )?;
            }
        }
        fs::write(directory.join(format!("services-{first:05}.yaml")), text)?;
    }
    Ok(())
}
