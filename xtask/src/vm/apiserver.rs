//! An API server on this machine for a guest, which would take minutes to start one.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::boot::{HOST, NETWORK, files};
use super::contents::Contents;
use super::quoted;
use crate::process::{Failure, broken};
use crate::setup;

/// What it is started by.
const PROGRAM: &str = "lockstep-apiserver";

/// A server that ends with the value, or with this process.
#[derive(Debug)]
pub(crate) struct ApiServer {
    child: Child,
    directory: PathBuf,
    peers: PathBuf,
}

impl ApiServer {
    /// Starts it by the program that was built beside another one, and adds what a guest needs: access, and
    /// the real kube-proxy.
    pub(crate) fn start(beside: &Path, contents: &mut Contents) -> Result<Self, Failure> {
        let peers = setup::peers(&["etcd", "kube-apiserver", "kube-proxy"])?;
        let directory = files().join("apiserver");
        setup::create(&directory)?;
        println!("starting an API server beside the guest");
        let mut command = Command::new(beside.with_file_name(PROGRAM));
        command.arg(&directory).arg(HOST).env("LOCKSTEP_PEERS_DIR", &peers);
        let mut child = match command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() {
            Ok(child) => child,
            Err(error) => return broken(format!("{PROGRAM} cannot be run: {error}")),
        };
        let output = child.stdout.take();
        let server = Self { child, directory, peers };
        let mut line = String::new();
        if !output.is_some_and(|it| BufReader::new(it).read_line(&mut line).is_ok_and(|length| length > 0)) {
            return broken("the API server did not start");
        }
        contents.add(&server.directory)?;
        contents.add(&server.peers.join("kube-proxy"))?;
        Ok(server)
    }

    /// The beginning of a guest's command.
    pub(crate) fn environment(&self) -> String {
        let kubeconfig = self.directory.join("kubeconfig");
        format!(
            "{NETWORK}export LOCKSTEP_PEERS_DIR={}\nexport LOCKSTEP_TEST_KUBECONFIG={}\n",
            quoted(&self.peers.to_string_lossy()),
            quoted(&kubeconfig.to_string_lossy())
        )
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // It has ended already where this fails.
        let _ = self.child.wait();
    }
}
