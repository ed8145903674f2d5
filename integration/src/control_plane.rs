//! The control plane as a process on loopback, without a lab: for tests that need no root.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lockstep_wire::v1::status_service_client::StatusServiceClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::{Channel, Endpoint};

use crate::guest::patient;
use crate::leftovers::{self, Directory};
use crate::product;

const START_TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// What the kernel says of an address that somebody else listens at.
const TAKEN: &str = "Address already in use";

/// `lockstep-control-plane`, killed with this value.
#[derive(Debug)]
pub struct ControlPlane {
    child: Option<Child>,
    arguments: Vec<String>,
    grpc: SocketAddr,
    http: SocketAddr,
    directory: Directory,
}

impl ControlPlane {
    /// Starts it on loopback with these arguments beside its addresses, and waits until it
    /// listens; it may not serve state yet.
    pub async fn start(arguments: &[&str]) -> Result<Self> {
        /// Others look for free ports at the same time, and may find the same ones.
        const TRIES: usize = 3;
        let (mut tries, directory) = (1, Directory::new("lockstep-control-plane-")?);
        let [grpc, http] = free_addresses()?;
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let mut this = Self { child: None, arguments, grpc, http, directory };
        while let Err(error) = this.restart().await {
            ensure!(tries < TRIES && this.log().contains(TAKEN), error);
            tries += 1;
            fs::remove_file(this.log_path())?;
            [this.grpc, this.http] = free_addresses()?;
        }
        Ok(this)
    }

    /// Kills it with SIGKILL where it runs, and starts it again at the same addresses.
    pub async fn restart(&mut self) -> Result<()> {
        self.kill();
        let log = File::options().create(true).append(true).open(self.log_path())?;
        let mut command = Command::new(product::program(&product::binaries()?, "lockstep-control-plane")?);
        command.args(["--listen", &self.grpc.to_string(), "--http", &self.http.to_string()]);
        command.args(&self.arguments).env_remove("LOCKSTEP_LOG");
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.child = Some(leftovers::spawn(command).context("starting lockstep-control-plane")?);
        let deadline = Instant::now() + patient(START_TIMEOUT);
        while self.get("/livez").await.is_err() {
            if let Some(status) = self.ended()? {
                bail!("the control plane ended with {status}:\n{}", self.log());
            }
            ensure!(Instant::now() < deadline, "the control plane does not answer:\n{}", self.log());
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Kills it with SIGKILL. Nothing to do where it does not run.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Fails only where it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Process id, where it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Where nodes connect to.
    pub fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    /// Where nodes connect to, as a URL for plaintext.
    pub fn url(&self) -> String {
        format!("http://{}", self.grpc)
    }

    /// What it has logged so far, over restarts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// A client of its status service, plaintext.
    pub async fn status(&self) -> Result<StatusServiceClient<Channel>> {
        Ok(StatusServiceClient::new(Endpoint::from_shared(self.url())?.connect().await?))
    }

    /// `lockstepctl` talking to it, plaintext.
    pub fn ctl(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.ctl_at(&self.url(), arguments)?;
        command.arg("--insecure");
        Ok(command)
    }

    /// `lockstepctl` talking to it at this URL, with as many flags as the caller adds.
    pub fn ctl_at(&self, url: &str, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(product::program(&product::binaries()?, "lockstepctl")?);
        command.args(["--server", url]).args(arguments);
        Ok(command)
    }

    /// GET of a path at `--http`: status code and body.
    pub async fn get(&self, path: &str) -> Result<(u16, String)> {
        let mut stream = tokio::net::TcpStream::connect(self.http).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.http);
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let code = head.split(' ').nth(1).context("no status line")?.parse()?;
        Ok((code, body.to_owned()))
    }

    /// Waits until `/readyz` says that state is served.
    pub async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + patient(START_TIMEOUT);
        loop {
            let (code, body) = self.get("/readyz").await?;
            if code == 200 {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "not ready: {body}\n{}", self.log());
            tokio::time::sleep(POLL).await;
        }
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(match &mut self.child {
            Some(child) => child.try_wait()?,
            None => None,
        })
    }

    fn log_path(&self) -> PathBuf {
        Path::new(self.directory.path()).join("log")
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Two different ones.
fn free_addresses() -> Result<[SocketAddr; 2]> {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let [one, other] = [bind()?, bind()?];
    Ok([one.local_addr()?, other.local_addr()?])
}
