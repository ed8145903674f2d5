//! The product in a lab: pods that answer, the control plane on a directory of manifests, one
//! agent per node.
//!
//! Everything is observed from outside: log files, the gRPC contract, the kernel.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lockstep_wire::v1::status_service_client::StatusServiceClient;
use lockstep_wire::v1::{self, AckLevel};
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::certificates::{Authority, Secret};
use crate::guest;
use crate::lab::{Family, Lab, POD_CIDRS, Place};
use crate::leftovers;
use crate::traffic::{OTHER_POD_PORT, POD_PORT};

/// Port of the control plane's gRPC server.
pub const GRPC_PORT: u16 = 7443;
/// How long anything may take that normally takes milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// How an agent programs its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `--mode nftables`.
    Nftables,
    /// `--mode iptables --iptables-flavour legacy`.
    IptablesLegacy,
    /// `--mode iptables --iptables-flavour nft`.
    IptablesNft,
    /// `--mode ipvs`, its chains in the nft flavour. Only the guest's kernel is sure to have it.
    Ipvs,
}

/// A program that runs inside a place. Killed with the value.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

/// The product, running. Fields end in order: agents before what they talk to.
#[derive(Debug)]
pub struct Product {
    agents: Vec<Option<Process>>,
    control_plane: Option<Process>,
    _pods: Vec<Process>,
    pub(crate) modes: Vec<Mode>,
    agent_flags: Vec<String>,
    manifests: PathBuf,
    binaries: PathBuf,
    /// `None` = plaintext.
    secrets: Option<Secrets>,
    /// The network it runs in.
    pub lab: Lab,
}

/// What everybody is known by: a directory of certificates each.
#[derive(Debug)]
pub struct Secrets {
    /// Whom all trust.
    pub authority: Authority,
    /// The control plane's.
    pub control_plane: Secret,
    /// Of each node in order; the certificate names the node.
    pub nodes: Vec<Secret>,
    /// Of whoever asks.
    pub operator: Secret,
}

impl Product {
    /// Pods answer, nothing else runs yet. `modes` has one entry per node.
    pub fn new(lab: Lab, modes: &[Mode]) -> Result<Self> {
        ensure!(modes.len() == usize::from(lab.nodes()), "{} modes for {} nodes", modes.len(), lab.nodes());
        let manifests = lab.directory().join("manifests");
        fs::create_dir_all(&manifests)?;
        let binaries = binaries()?;
        let pods = start_pods(&lab, &binaries)?;
        let agents = modes.iter().map(|_| None).collect();
        let modes = modes.to_vec();
        let agent_flags = vec![format!("--cluster-cidr={POD_CIDRS}")];
        Ok(Self {
            agents,
            control_plane: None,
            _pods: pods,
            modes,
            agent_flags,
            manifests,
            binaries,
            secrets: None,
            lab,
        })
    }

    /// From now on, everybody shows a certificate and asks for one.
    pub fn secure(&mut self) -> Result<()> {
        let authority = Authority::new()?;
        let secret = |name: &str, hosts: &[&str]| {
            let pair = authority.issue(name, hosts)?;
            Secret::new(self.lab.directory().join(format!("secret-{name}")), &authority, Some(&pair))
        };
        let host = Place::Fabric.address(Family::V4).to_string();
        let control_plane = secret("control-plane", &[&host])?;
        let nodes = (1..=self.lab.nodes())
            .map(|node| secret(&format!("system:node:{}", Place::Node(node)), &[]))
            .collect::<Result<_>>()?;
        let operator = secret("operator", &[])?;
        self.secrets = Some(Secrets { authority, control_plane, nodes, operator });
        Ok(())
    }

    /// The certificates, where there are any.
    pub fn secrets(&mut self) -> Result<&mut Secrets> {
        self.secrets.as_mut().context("the product is plaintext")
    }

    /// Starts the control plane and waits until its port answers; it may not serve state yet.
    pub fn start_control_plane(&mut self) -> Result<()> {
        let mut command = self.lab.command(Place::Fabric, program(&self.binaries, "lockstep-control-plane")?);
        command.arg("--source").arg(format!("files:{}", self.manifests.display()));
        command.args(["--listen", &listen(GRPC_PORT), "--http", &listen(8080)]);
        match &self.secrets {
            None => command.arg("--insecure"),
            // Who is not let in is said to whoever looks for it only.
            Some(secrets) => command
                .args(secrets.control_plane.server_flags(true))
                .env("LOCKSTEP_LOG", "info,lockstep_server=debug"),
        };
        let mut process = Process::spawn(&self.lab, "control-plane", command)?;
        wait_until("the control plane answers", PATIENCE, || {
            let ended = process.ended()?;
            ensure!(ended.is_none(), "it ended with {}:\n{}", ended.unwrap_or_default(), process.tail());
            Ok(self.server_info().ok().map(drop))
        })?;
        self.control_plane = Some(process);
        Ok(())
    }

    /// Starts the agent of a node.
    pub fn start_agent(&mut self, node: u8) -> Result<()> {
        let process = self.spawn_agent(node, &format!("node{node}"))?;
        self.agents[usize::from(node) - 1] = Some(process);
        Ok(())
    }

    /// From the next start of its agent on, a node programs its kernel like this.
    pub fn set_mode(&mut self, node: u8, mode: Mode) {
        self.modes[usize::from(node) - 1] = mode;
    }

    /// From the next start of an agent on, these are its flags beside those that say where it is, who it is
    /// and its mode. Until then: the cluster's pods by their addresses.
    pub fn set_agent_flags(&mut self, flags: &[&str]) {
        self.agent_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    }

    /// What an agent keeps on disk.
    pub fn state_directory(&self, node: u8, name: &str) -> PathBuf {
        self.lab.directory().join(format!("state-{}-{name}", Place::Node(node)))
    }

    /// Starts an agent on a node under any name, beside the node's own.
    pub fn spawn_agent(&self, node: u8, name: &str) -> Result<Process> {
        let mut security = match &self.secrets {
            None => vec!["--insecure".to_owned()],
            Some(secrets) => secrets.nodes[usize::from(node) - 1].client_flags(true),
        };
        security.push(format!("--control-plane={}", self.url()));
        self.spawn_agent_that(node, name, &security)
    }

    /// The same, told by `security` where the control plane is and how to trust it.
    pub fn spawn_agent_that(&self, node: u8, name: &str, security: &[String]) -> Result<Process> {
        let place = Place::Node(node);
        let state = self.state_directory(node, name);
        fs::create_dir_all(&state)?;
        let mut command = self.lab.command(place, program(&self.binaries, "lockstep-node")?);
        command.args(["--node-name", name]).args(security);
        command.arg("--state-dir").arg(state).args(&self.agent_flags);
        command.args(self.modes[usize::from(node) - 1].flags());
        // The limit is one of the whole machine, which is not the lab's to change.
        command.args(["--conntrack-max-per-core", "0"]);
        if name != place.to_string() {
            command.args(["--healthz", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]);
        }
        Process::spawn(&self.lab, &format!("agent-{name}"), command)
    }

    /// Starts some other program inside a place, with a log of that name.
    pub fn spawn(&self, name: &str, place: Place, line: &[&str]) -> Result<Process> {
        let mut command = self.lab.command(place, line[0]);
        command.args(&line[1..]);
        Process::spawn(&self.lab, name, command)
    }

    /// Starts everything and waits until every node is verified at the head.
    pub fn start(&mut self) -> Result<()> {
        self.start_control_plane()?;
        for node in 1..=self.lab.nodes() {
            self.start_agent(node)?;
        }
        self.wait_verified(0)?;
        self.check_modes()
    }

    /// Fails where an agent fell back to another mode: then everything else would be shown for
    /// the wrong one.
    fn check_modes(&self) -> Result<()> {
        for (node, mode) in self.list_nodes()?.nodes.into_iter().zip(&self.modes) {
            let backend = node.backend.unwrap_or_default();
            let (kind, flavour) = match mode {
                Mode::Nftables => (v1::BackendKind::Nftables, ""),
                Mode::IptablesLegacy => (v1::BackendKind::Iptables, "legacy"),
                Mode::IptablesNft => (v1::BackendKind::Iptables, "nft"),
                Mode::Ipvs => (v1::BackendKind::Ipvs, "nft"),
            };
            ensure!(
                backend.kind() == kind && backend.version.contains(flavour),
                "{}: asked for {}, got {:?} {}\n{}",
                node.node_name,
                mode.name(),
                backend.kind(),
                backend.version,
                self.logs()
            );
        }
        Ok(())
    }

    /// The agent of a node.
    pub fn agent(&mut self, node: u8) -> Result<&mut Process> {
        self.agents[usize::from(node) - 1]
            .as_mut()
            .with_context(|| format!("node{node}: no agent was started"))
    }

    /// The control plane.
    pub fn control_plane(&mut self) -> Result<&mut Process> {
        self.control_plane.as_mut().context("no control plane was started")
    }

    /// Where the control plane's manifests are.
    pub fn manifests(&self) -> &Path {
        &self.manifests
    }

    /// Puts a manifest in place at once, as an editor or `mv` does.
    pub fn write_manifest(&self, name: &str, text: &str) -> Result<()> {
        let partial = self.lab.directory().join("manifest.partial");
        fs::write(&partial, text)?;
        Ok(fs::rename(partial, self.manifests.join(name))?)
    }

    /// Takes a manifest away.
    pub fn remove_manifest(&self, name: &str) -> Result<()> {
        Ok(fs::remove_file(self.manifests.join(name))?)
    }

    /// Node objects of all nodes, as a manifest.
    pub fn node_manifest(&self) -> String {
        node_manifest(self.lab.nodes())
    }

    /// Makes a change and waits until every node has verified the state after it.
    pub fn change(&self, change: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let after = self.take_in(change)?;
        self.wait_verified(after)
    }

    /// Makes a change and waits until the control plane has it. Returns the head then.
    pub fn take_in(&self, change: impl FnOnce(&Self) -> Result<()>) -> Result<u64> {
        let before = self.head()?;
        change(self)?;
        wait_until("the control plane takes the change in", PATIENCE, || {
            Ok(Some(self.head()?).filter(|head| *head > before))
        })
    }

    /// `GET` over plain HTTP, asked from inside a place. Returns status and body.
    pub fn http_get(&self, place: Place, port: u16, path: &str) -> Result<(u16, String)> {
        let text = self.lab.inside(place, || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: {place}\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })?;
        let text = text.with_context(|| format!("{place}: GET {path} at port {port}"))?;
        let (head, body) = text.split_once("\r\n\r\n").context("no end of the HTTP headers")?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok((status.with_context(|| format!("no status in {head:?}"))?, body.to_owned()))
    }

    /// Newest transaction of the control plane; 0 = none.
    pub fn head(&self) -> Result<u64> {
        Ok(self.server_info()?.head.unwrap_or_default().seq)
    }

    /// Waits until every node that has an agent is verified at `seq` or later and at the head,
    /// with nothing failing.
    pub fn wait_verified(&self, seq: u64) -> Result<()> {
        let mut last = Vec::new();
        let done = wait_until("every node is verified at the head", PATIENCE, || {
            let response = self.list_nodes()?;
            let head = response.head.unwrap_or_default().seq;
            last = response.nodes;
            let good = |node: &v1::NodeStatus| {
                node.connected
                    && node.verified_seq >= head
                    && node.failures.is_empty()
                    && node.backend_error.is_empty()
            };
            let all = last.len() >= usize::from(self.lab.nodes()) && last.iter().all(good);
            Ok((all && head >= seq && head > 0).then_some(()))
        });
        done.with_context(|| format!("the nodes say: {last:#?}\n{}", self.logs()))
    }

    /// What the control plane says of itself.
    pub fn server_info(&self) -> Result<v1::GetServerInfoResponse> {
        self.ask(async |mut client| client.get_server_info(v1::GetServerInfoRequest {}).await)
    }

    /// What it says of the nodes.
    pub fn list_nodes(&self) -> Result<v1::ListNodesResponse> {
        self.ask(async |mut client| client.list_nodes(v1::ListNodesRequest::default()).await)
    }

    /// What it says is wrong.
    pub fn list_failures(&self) -> Result<v1::ListFailuresResponse> {
        self.ask(async |mut client| client.list_failures(v1::ListFailuresRequest::default()).await)
    }

    /// The barrier: true where every node reached VERIFIED for the Service in time.
    pub fn wait_service(&self, namespace: &str, name: &str) -> Result<bool> {
        let service = v1::ServiceRef { namespace: namespace.to_owned(), name: name.to_owned() };
        let request = v1::WaitRequest {
            target: Some(v1::wait_request::Target::Service(service)),
            level: AckLevel::Verified.into(),
            ..Default::default()
        };
        self.ask(async |mut client| {
            let mut stream = client.wait(request.clone()).await?.into_inner();
            while let Some(progress) = stream.message().await? {
                if progress.done {
                    return Ok(tonic::Response::new(true));
                }
            }
            Ok(tonic::Response::new(false))
        })
    }

    /// `lockstepctl` inside the fabric.
    pub fn ctl(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.lab.command(Place::Fabric, program(&self.binaries, "lockstepctl")?);
        command.args(["--server", &self.url()]);
        match &self.secrets {
            None => command.arg("--insecure"),
            Some(secrets) => command.args(secrets.operator.client_flags(true)),
        };
        command.args(arguments);
        Ok(command)
    }

    /// Removes everything of Lockstep from a node's kernel.
    pub fn cleanup(&self, node: u8) -> Result<()> {
        self.cleanup_with(node, &[])
    }

    /// The same with flags.
    pub fn cleanup_with(&self, node: u8, flags: &[&str]) -> Result<()> {
        let output = self
            .lab
            .command(Place::Node(node), program(&self.binaries, "lockstep-node")?)
            .arg("cleanup")
            .args(flags)
            .output()?;
        ensure!(output.status.success(), "cleanup: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Where the control plane listens.
    pub fn url(&self) -> String {
        let scheme = if self.secrets.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address())
    }

    /// The last lines of every log, for whoever reads a failed test.
    pub fn logs(&self) -> String {
        let processes = self.agents.iter().flatten().chain(&self.control_plane);
        processes.map(|process| format!("--- {}\n{}\n", process.name, process.tail())).collect()
    }

    fn address(&self) -> SocketAddr {
        (Place::Fabric.address(Family::V4), GRPC_PORT).into()
    }

    fn ask<T: Send>(
        &self,
        call: impl AsyncFnOnce(StatusServiceClient<Channel>) -> Result<tonic::Response<T>, tonic::Status> + Send,
    ) -> Result<T> {
        self.call(async move |channel| Ok(call(StatusServiceClient::new(channel)).await?.into_inner()))
    }

    /// Calls the control plane, as whoever operates it.
    pub(crate) fn call<T: Send>(&self, call: impl AsyncFnOnce(Channel) -> Result<T> + Send) -> Result<T> {
        let mut endpoint = Endpoint::from_shared(self.url())?
            .timeout(PATIENCE)
            .connect_timeout(guest::patient(Duration::from_secs(2)));
        if let Some(Secrets { operator, .. }) = &self.secrets {
            let identity = Identity::from_pem(fs::read(operator.certificate())?, fs::read(operator.key())?);
            let ca = Certificate::from_pem(fs::read(operator.ca())?);
            endpoint = endpoint.tls_config(ClientTlsConfig::new().ca_certificate(ca).identity(identity))?;
        }
        self.lab.inside(Place::Fabric, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { call(endpoint.connect().await?).await })
        })?
    }
}

impl Process {
    pub(crate) fn spawn(lab: &Lab, name: &str, mut command: Command) -> Result<Self> {
        let log = lab.directory().join(format!("{name}.log"));
        // Appended: a restarted program goes on in the same log.
        let file = File::options().create(true).append(true).open(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = leftovers::spawn(command).with_context(|| format!("start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// `kill -TERM`, then waits for the end.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)
            .with_context(|| format!("{}: cannot be signalled", self.name))?;
        wait_until(&format!("{} ends", self.name), PATIENCE, || Ok(self.child.try_wait()?))
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Exit status, where it ended by itself.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until its log has this text.
    pub fn wait_for_log(&mut self, text: &str) -> Result<()> {
        let what = format!("{} logs {text:?}", self.name);
        let log = self.log.clone();
        let found = wait_until(&what, PATIENCE, || {
            let found = fs::read_to_string(&log)?.contains(text);
            if !found && let Some(status) = self.child.try_wait()? {
                bail!("it ended with {status}");
            }
            Ok(found.then_some(()))
        });
        found.with_context(|| format!("{}:\n{}", self.name, self.tail()))
    }

    pub(crate) fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Mode {
    /// Those that every kernel has.
    pub const ALL: [Mode; 3] = [Mode::Nftables, Mode::IptablesLegacy, Mode::IptablesNft];

    /// Those that this kernel is sure to have.
    pub fn here() -> Vec<Mode> {
        Mode::ALL.into_iter().chain(guest::is_here().then_some(Mode::Ipvs)).collect()
    }

    /// Flags of the agent.
    pub fn flags(self) -> &'static [&'static str] {
        match self {
            Mode::Nftables => &["--mode", "nftables"],
            Mode::IptablesLegacy => &["--mode", "iptables", "--iptables-flavour", "legacy"],
            Mode::IptablesNft => &["--mode", "iptables", "--iptables-flavour", "nft"],
            Mode::Ipvs => &["--mode", "ipvs", "--iptables-flavour", "nft"],
        }
    }

    /// For people and test names.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Nftables => "nftables",
            Mode::IptablesLegacy => "iptables-legacy",
            Mode::IptablesNft => "iptables-nft",
            Mode::Ipvs => "ipvs",
        }
    }
}

/// Asks again and again until there is an answer; an error or the end of `patience` ends it, which is
/// longer where the machine is slow.
pub fn wait_until<T>(
    what: &str,
    patience: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let (start, patience) = (Instant::now(), guest::patient(patience));
    loop {
        if let Some(answer) = ask().with_context(|| what.to_owned())? {
            return Ok(answer);
        }
        ensure!(start.elapsed() < patience, "not within {} s: {what}", patience.as_secs());
        std::thread::sleep(guest::patient(POLL));
    }
}

/// Node objects of all nodes, as a manifest.
pub(crate) fn node_manifest(nodes: u8) -> String {
    let mut text = String::new();
    for node in 1..=nodes {
        let place = Place::Node(node);
        let (v4, v6) = (place.address(Family::V4), place.address(Family::V6));
        text.push_str(&format!(
            "---\napiVersion: v1\nkind: Node\nmetadata:\n  name: {place}\n  uid: uid-{place}\n\
             \x20 labels: {{topology.kubernetes.io/zone: zone{node}}}\n\
             spec:\n  podCIDRs: [10.244.{node}.0/24, 'fd00:244:{node}::/48']\n\
             status:\n  addresses:\n  - {{type: InternalIP, address: {v4}}}\n  - {{type: InternalIP, address: '{v6}'}}\n"
        ));
    }
    text
}

/// Starts what answers: in every pod, and on every node, for endpoints in the host's network.
pub(crate) fn start_pods(lab: &Lab, binaries: &Path) -> Result<Vec<Process>> {
    let mut pods = Vec::new();
    for place in lab.pods().chain((1..=lab.nodes()).map(Place::Node)) {
        let mut command = lab.command(place, program(binaries, "lockstep-pod")?);
        command.args([place.to_string(), POD_PORT.to_string(), OTHER_POD_PORT.to_string()]);
        command.args(guest::is_here().then_some("--sctp"));
        pods.push(Process::spawn(lab, &format!("pod-{place}"), command)?);
    }
    for pod in &mut pods {
        pod.wait_for_log("ready")?;
    }
    Ok(pods)
}

/// Where cargo puts programs: beside this one, or above where it is a test.
pub fn binaries() -> Result<PathBuf> {
    let this = std::env::current_exe()?;
    let directory = this.parent().context("this program has no directory")?;
    let above = directory.parent().filter(|_| directory.ends_with("deps"));
    Ok(above.unwrap_or(directory).to_path_buf())
}

pub(crate) fn program(binaries: &Path, name: &str) -> Result<PathBuf> {
    let path = binaries.join(name);
    ensure!(path.is_file(), "{} is not built: `cargo build --workspace --bins`", path.display());
    Ok(path)
}

fn listen(port: u16) -> String {
    format!("{}:{port}", Place::Fabric.address(Family::V4))
}
