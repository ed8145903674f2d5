//! Memory of the real programs, after a whole cluster was loaded and programmed.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lockstep_kernel::netns;
use lockstep_kernel::nf_tables::{Kernel, generation};

use super::cluster::{CLUSTER_CIDR, ENDPOINTS, NODE, Upstream};
use super::raw::Copy;

const LISTEN: &str = "127.0.0.1:7000";
const HTTP: &str = "127.0.0.1:7001";
/// How long loading may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long both programs go on after the last endpoint is in the kernel.
const SETTLING: Duration = Duration::from_secs(10);

/// Resident memory of both programs in MiB, now and at its peak.
#[derive(Debug)]
pub struct Memory {
    /// The control plane's.
    pub control_plane: (f64, f64),
    /// The agent's.
    pub agent: (f64, f64),
}

/// A child that ends with its owner.
struct Program(Child);

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
        Ok(Self(command.spawn().with_context(|| format!("start {}", binary.display()))?))
    }

    /// Resident memory in MiB: now, and the most there was.
    fn resident(&self) -> Result<(f64, f64)> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let field = |name: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
            Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
        };
        Ok((field("VmRSS:")?, field("VmHWM:")?))
    }
}

/// Loads this many Services from files, through a control plane and a stream, into the kernel.
/// `binaries` is where both programs are.
pub fn measure(services: u32, binaries: &Path) -> Result<Memory> {
    let directory = tempfile::tempdir()?;
    let manifests = directory.path().join("manifests");
    fs::create_dir(&manifests)?;
    write_manifests(&Upstream::new(services), services, &manifests)?;
    netns::run_in_new(|| inside(services, binaries, directory.path(), &manifests))?
}

fn inside(services: u32, binaries: &Path, directory: &Path, manifests: &Path) -> Result<Memory> {
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("ip")?;
    ensure!(up.success(), "ip link set lo up failed");
    let source = format!("files:{}", manifests.display());
    let control_plane = Program::start(
        &binaries.join("lockstep-control-plane"),
        &["--source", &source, "--listen", LISTEN, "--http", HTTP, "--insecure"],
        &directory.join("control-plane.log"),
    )?;
    until("the control plane to be ready", || ready(HTTP))
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
            "--insecure",
        ],
        &directory.join("node.log"),
    )?;
    let mut kernel = Kernel::open()?;
    let wanted = usize::try_from(services * ENDPOINTS)?;
    until("every endpoint to be in the kernel", || {
        Ok(generation(&mut kernel)? > 1 && Copy::read(&mut kernel)?.elements() >= wanted)
    })
    .with_context(|| tail(&directory.join("node.log")))?;
    // What follows a load takes memory too: reading back, acknowledging, writing the cache.
    std::thread::sleep(SETTLING);
    Ok(Memory { control_plane: control_plane.resident()?, agent: agent.resident()? })
}

fn until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        if start.elapsed() > PATIENCE {
            bail!("waited {} s for {what}", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(200));
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

/// A Node and, per 500 Services, one file of Services and EndpointSlices.
fn write_manifests(upstream: &Upstream, services: u32, directory: &Path) -> Result<()> {
    let node = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {NODE}, uid: {NODE}}}\n\
         status: {{addresses: [{{type: InternalIP, address: 192.0.2.1}}]}}\n"
    );
    fs::write(directory.join("nodes.yaml"), node)?;
    for first in (0..services).step_by(500) {
        let mut text = String::new();
        for index in first..services.min(first + 500) {
            let (service, set) = upstream.objects(index);
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
