//! A real Kubernetes API server with its etcd, and nothing else of a cluster: tests play
//! kubelet and controllers themselves.
//!
//! ```text
//! ApiServer ── etcd (one, stays) <── kube-apiserver (killed, restarted, a second one beside it)
//!     └────── Cluster: create, patch, delete Services, EndpointSlices, Nodes
//! ```
//!
//! The programs are those that `integration/peers/go.mod` pins, in the directory that
//! `LOCKSTEP_PEERS_DIR` names. Everything listens on loopback, keeps its files in a temporary
//! directory and ends with the value that started it, or with this process. No root is needed.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

use crate::guest::{self, patient};
use crate::leftovers::{self, Directory};

/// Directory of `etcd`, `kube-apiserver`, `kube-proxy` and `grpcurl`.
pub const PEERS_DIR: &str = "LOCKSTEP_PEERS_DIR";

/// The kubeconfig of a server on another machine, for tests in the guest, which is too slow for one.
pub const KUBECONFIG: &str = "LOCKSTEP_TEST_KUBECONFIG";

const TOKEN: &str = "lockstep-test-token";
/// Cold starts on a busy machine with two cores take up to 20 seconds.
const START_TIMEOUT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

/// Path of one of the real programs; fails with what to do where it is not there.
pub fn peer(program: &str) -> Result<PathBuf> {
    let directory = std::env::var_os(PEERS_DIR).with_context(|| {
        format!("{PEERS_DIR} is not set: `cargo xtask test` builds the real programs and sets it")
    })?;
    let path = Path::new(&directory).join(program);
    ensure!(path.is_file(), "{} is not there: `cargo xtask test` builds it", path.display());
    Ok(path)
}

/// An API server and its etcd.
#[derive(Debug)]
pub struct ApiServer {
    // Dropped in this order: nobody writes to a directory that is gone.
    server: Option<Process>,
    _etcd: Process,
    etcd_url: String,
    port: u16,
    arguments: Vec<String>,
    directory: Directory,
}

/// A second API server on the same etcd, on a port of its own. Ends when dropped.
#[derive(Debug)]
pub struct SecondServer {
    _process: Process,
    cluster: Cluster,
}

impl ApiServer {
    /// Starts both and waits until they are ready.
    pub async fn start() -> Result<Self> {
        Self::start_with(&[]).await
    }

    /// Like [`start`](Self::start), with further arguments of `kube-apiserver`, as
    /// `--feature-gates=WatchList=false`.
    pub async fn start_with(arguments: &[&str]) -> Result<Self> {
        let directory = Directory::new("lockstep-apiserver-")?;
        write_keys(directory.path())?;
        let (etcd, etcd_url) = start_etcd(directory.path()).await?;
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let mut this = Self { server: None, _etcd: etcd, etcd_url, port: 0, arguments, directory };
        let (server, port) = this.start_server("kube-apiserver", None).await?;
        this.server = Some(server);
        this.port = port;
        Ok(this)
    }

    /// Port on 127.0.0.1. Stays the same over restarts.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A kubeconfig for an administrator, for `--kubeconfig`.
    pub fn kubeconfig(&self) -> PathBuf {
        self.kubeconfig_of(self.port)
    }

    /// Writes `kubeconfig` and what belongs to it into a directory, for programs of another machine that has
    /// these files at the same place and reaches this one's loopback at `host`.
    pub fn write_access(&self, directory: &Path, host: &str) -> Result<()> {
        let authority = directory.join("server.crt");
        fs::copy(self.directory.path().join("server.crt"), &authority)?;
        let text = kubeconfig(&SocketAddr::new(host.parse()?, self.port), &authority);
        fs::write(directory.join("kubeconfig"), text)?;
        Ok(())
    }

    /// A client of the server. Outlives restarts.
    pub async fn cluster(&self) -> Result<Cluster> {
        Cluster::connect(&self.kubeconfig()).await
    }

    /// Process id of the server that runs.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(|server| server.0.id())
    }

    /// Kills the server with SIGKILL; etcd goes on. Nothing to do where it does not run.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Starts the server again, on the port it had, and waits until it is ready.
    pub async fn restart(&mut self) -> Result<()> {
        self.kill();
        self.server = Some(self.start_server("kube-apiserver", Some(self.port)).await?.0);
        Ok(())
    }

    /// A second server on the same data: what is changed through it while the first is dead
    /// is what a client of the first misses.
    pub async fn second(&self) -> Result<SecondServer> {
        let (process, port) = self.start_server("second-apiserver", None).await?;
        let cluster = Cluster::connect(&self.kubeconfig_of(port)).await?;
        Ok(SecondServer { _process: process, cluster })
    }

    /// Starts a server on `port`, or on whatever port is free: another program may take one
    /// between its choice and its use, so that is tried again.
    async fn start_server(&self, name: &str, port: Option<u16>) -> Result<(Process, u16)> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let chosen = port.map_or_else(free_port, Ok)?;
            self.write_kubeconfig(chosen)?;
            let mut process = self.spawn_server(name, chosen)?;
            let cluster = Cluster::connect(&self.kubeconfig_of(chosen)).await?;
            match process.ready(name, self.directory.path(), async || cluster.is_ready().await).await {
                Ok(()) => return Ok((process, chosen)),
                Err(error) if attempts < 3 && error.to_string().contains("address already in use") => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn spawn_server(&self, name: &str, port: u16) -> Result<Process> {
        let file = |name: &str| self.directory.path().join(name).display().to_string();
        let mut command = Command::new(peer("kube-apiserver")?);
        command
            .arg(format!("--etcd-servers={}", self.etcd_url))
            .arg("--bind-address=127.0.0.1")
            .arg(format!("--secure-port={port}"))
            // Not that of an interface of this machine, which may have none.
            .arg("--advertise-address=192.0.2.1")
            .arg("--endpoint-reconciler-type=none")
            .arg(format!("--tls-cert-file={}", file("server.crt")))
            .arg(format!("--tls-private-key-file={}", file("server.key")))
            .arg(format!("--token-auth-file={}", file("tokens.csv")))
            .arg("--service-cluster-ip-range=10.96.0.0/12,fd00:96::/112")
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg(format!("--service-account-key-file={}", file("service-account.pub")))
            .arg(format!("--service-account-signing-key-file={}", file("service-account.key")))
            .arg("--authorization-mode=RBAC")
            .arg("--disable-admission-plugins=ServiceAccount")
            .args(&self.arguments);
        Process::spawn(command, name, self.directory.path())
    }

    fn kubeconfig_of(&self, port: u16) -> PathBuf {
        self.directory.path().join(format!("kubeconfig-{port}"))
    }

    fn write_kubeconfig(&self, port: u16) -> Result<()> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let text = kubeconfig(&address, &self.directory.path().join("server.crt"));
        Ok(fs::write(self.kubeconfig_of(port), text)?)
    }
}

/// The one that tests and kube-proxies use: of this process, or in the guest the one beside it.
#[derive(Debug)]
pub struct Server {
    kubeconfig: PathBuf,
    /// What runs here, where it does.
    _own: Option<ApiServer>,
}

impl Server {
    /// Starts it, where it is not there already.
    pub async fn find() -> Result<Self> {
        if guest::is_here() {
            let missing =
                || format!("{KUBECONFIG} is not set: a part of `cargo xtask vm test` with kube-proxy does");
            let kubeconfig = std::env::var_os(KUBECONFIG).with_context(missing)?.into();
            return Ok(Self { kubeconfig, _own: None });
        }
        let own = ApiServer::start().await?;
        Ok(Self { kubeconfig: own.kubeconfig(), _own: Some(own) })
    }

    /// How to reach it from this process.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A client of it.
    pub async fn cluster(&self) -> Result<Cluster> {
        Cluster::connect(&self.kubeconfig).await
    }
}

/// A kubeconfig for an administrator. JSON is YAML. The certificate has this name wherever the server is
/// reached.
fn kubeconfig(address: &SocketAddr, authority: &Path) -> String {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {
            "server": format!("https://{address}"),
            "tls-server-name": "localhost",
            "certificate-authority": authority,
        }}],
        "users": [{"name": "admin", "user": {"token": TOKEN}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        "current-context": "test",
    });
    config.to_string()
}

impl SecondServer {
    /// A client of this server.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }
}

async fn start_etcd(directory: &Path) -> Result<(Process, String)> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let client = format!("http://127.0.0.1:{}", free_port()?);
        let peers = format!("http://127.0.0.1:{}", free_port()?);
        let mut command = Command::new(peer("etcd")?);
        command
            .arg(format!("--data-dir={}", directory.join("etcd").display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peers}"))
            .arg(format!("--initial-advertise-peer-urls={peers}"))
            .arg(format!("--initial-cluster=default={peers}"))
            .arg("--unsafe-no-fsync")
            .arg("--log-level=warn");
        let mut process = Process::spawn(command, "etcd", directory)?;
        let address = client.trim_start_matches("http://").to_owned();
        let listens = async || tokio::net::TcpStream::connect(&address).await.is_ok();
        match process.ready("etcd", directory, listens).await {
            Ok(()) => return Ok((process, client)),
            Err(error) if attempts < 3 && error.to_string().contains("address already in use") => {
                let _ = fs::remove_dir_all(directory.join("etcd"));
            }
            Err(error) => return Err(error),
        }
    }
}

/// The server's certificate is its own authority.
fn write_keys(directory: &Path) -> Result<()> {
    let server = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned(), "localhost".to_owned()])?;
    fs::write(directory.join("server.crt"), server.cert.pem())?;
    fs::write(directory.join("server.key"), server.signing_key.serialize_pem())?;
    let accounts = rcgen::KeyPair::generate()?;
    fs::write(directory.join("service-account.key"), accounts.serialize_pem())?;
    fs::write(directory.join("service-account.pub"), accounts.public_key_pem())?;
    fs::write(directory.join("tokens.csv"), format!("{TOKEN},admin,admin,\"system:masters\"\n"))?;
    Ok(())
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// A program that is killed, by its own id, when this goes.
#[derive(Debug)]
struct Process(Child);

impl Process {
    fn spawn(mut command: Command, name: &str, directory: &Path) -> Result<Self> {
        let log = File::create(directory.join(format!("{name}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Self(leftovers::spawn(command).with_context(|| format!("starting {name}"))?))
    }

    /// Waits for `ready`; fails with the end of the program's log where it ends first.
    async fn ready(&mut self, name: &str, directory: &Path, ready: impl AsyncFn() -> bool) -> Result<()> {
        let deadline = Instant::now() + patient(START_TIMEOUT);
        let log = || {
            let text = fs::read_to_string(directory.join(format!("{name}.log"))).unwrap_or_default();
            let lines: Vec<_> = text.lines().rev().take(20).collect();
            lines.into_iter().rev().collect::<Vec<_>>().join("\n")
        };
        while !ready().await {
            if let Some(status) = self.0.try_wait()? {
                bail!("{name} ended with {status} before it was ready:\n{}", log());
            }
            ensure!(Instant::now() < deadline, "{name} is not ready after {START_TIMEOUT:?}:\n{}", log());
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only where it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The kinds that tests make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A Service.
    Service,
    /// An EndpointSlice.
    EndpointSlice,
    /// A Node; its namespace counts for nothing.
    Node,
    /// A ServiceCIDR, likewise.
    ServiceCidr,
}

/// A client that writes objects as JSON.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cluster")
    }
}

impl Cluster {
    /// A client of the cluster that a kubeconfig names.
    pub async fn connect(kubeconfig: &Path) -> Result<Self> {
        let file = Kubeconfig::read_from(kubeconfig)?;
        let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        Ok(Self { client: Client::try_from(config)? })
    }

    /// The client underneath.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// True where the server says that it is ready, and has made what every cluster has.
    pub async fn is_ready(&self) -> bool {
        for path in ["/readyz", "/api/v1/namespaces/default/services/kubernetes"] {
            let Ok(request) = http::Request::get(path).body(Vec::new()) else { return false };
            if self.client.request_text(request).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Creates an object. `apiVersion` and `kind` are filled in; the namespace of what has
    /// one is `default` where the object does not say.
    pub async fn create(&self, kind: Kind, mut object: Value) -> Result<Value> {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default").to_owned();
        object["apiVersion"] = kind.api_version().into();
        object["kind"] = kind.name().into();
        self.send("POST", &kind.path(&namespace), Some(&object)).await
    }

    /// Puts an object in the place of the one of that name, whatever has become of it since.
    pub async fn replace(&self, kind: Kind, namespace: &str, name: &str, object: &Value) -> Result<Value> {
        self.send("PUT", &format!("{}/{name}", kind.path(namespace)), Some(object)).await
    }

    /// Merges a patch into an object.
    pub async fn patch(&self, kind: Kind, namespace: &str, name: &str, patch: Value) -> Result<Value> {
        self.send("PATCH", &format!("{}/{name}", kind.path(namespace)), Some(&patch)).await
    }

    /// Merges a patch into an object's status: `{"status": ...}`.
    pub async fn patch_status(&self, kind: Kind, namespace: &str, name: &str, patch: Value) -> Result<Value> {
        self.send("PATCH", &format!("{}/{name}/status", kind.path(namespace)), Some(&patch)).await
    }

    /// Deletes an object.
    pub async fn delete(&self, kind: Kind, namespace: &str, name: &str) -> Result<()> {
        self.send("DELETE", &format!("{}/{name}", kind.path(namespace)), None).await?;
        Ok(())
    }

    /// Every object of a kind, of all namespaces.
    pub async fn list(&self, kind: Kind) -> Result<Vec<Value>> {
        let path = kind.path("").replace("namespaces//", "");
        let mut list = self.send("GET", &path, None).await?;
        match list["items"].take() {
            Value::Array(items) => Ok(items),
            _ => Ok(Vec::new()),
        }
    }

    /// One object.
    pub async fn get(&self, kind: Kind, namespace: &str, name: &str) -> Result<Value> {
        self.send("GET", &format!("{}/{name}", kind.path(namespace)), None).await
    }

    async fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let content = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let request = http::Request::builder().method(method).uri(path).header("content-type", content);
        let request = request.body(body.map(Value::to_string).unwrap_or_default().into_bytes())?;
        self.client.request(request).await.with_context(|| format!("{method} {path}"))
    }
}

impl Kind {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::Node => "Node",
            Kind::ServiceCidr => "ServiceCIDR",
        }
    }

    fn api_version(self) -> &'static str {
        match self {
            Kind::Service | Kind::Node => "v1",
            Kind::EndpointSlice => "discovery.k8s.io/v1",
            Kind::ServiceCidr => "networking.k8s.io/v1",
        }
    }

    fn path(self, namespace: &str) -> String {
        match self {
            Kind::Service => format!("/api/v1/namespaces/{namespace}/services"),
            Kind::EndpointSlice => {
                format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices")
            }
            Kind::Node => "/api/v1/nodes".to_owned(),
            Kind::ServiceCidr => "/apis/networking.k8s.io/v1/servicecidrs".to_owned(),
        }
    }
}
