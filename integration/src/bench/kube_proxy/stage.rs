//! One proxy on the one node of a network of its own, at an API server that all networks share.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::outside::CLIENT;
use super::usage;
use crate::apiserver::Server;
use crate::kube_proxy;
use crate::lab::{Family, Lab, Place};
use crate::product::{self, GRPC_PORT, Mode, Process, Product, wait_until};
use crate::relay::Relay;

const HTTP_PORT: u16 = 8080;
const LOAD_PATIENCE: Duration = Duration::from_secs(120);

/// How kube-proxy is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settings {
    /// As kubeadm deploys it.
    Usual,
    /// With [`PROMPT`](kube_proxy::PROMPT) in the place of a second.
    Prompt,
}

/// A network whose pods answer, and what runs in it. Fields end in order.
#[derive(Debug)]
pub(super) struct Stage {
    node: Option<Process>,
    control_plane: Option<Process>,
    relay: Relay,
    product: Product,
    mode: Mode,
}

impl Stage {
    /// Nothing runs on the node yet, and nothing ever did.
    pub(super) fn new(server: &Server, mode: Mode) -> Result<Self> {
        let Place::Pod(nodes, pods) = CLIENT else { anyhow::bail!("{CLIENT} is not a pod") };
        let mut product = Product::new(Lab::new(nodes, pods)?, &[mode])?;
        product.secure()?;
        let relay = Relay::open(&product.lab, server.kubeconfig())?;
        Ok(Self { node: None, control_plane: None, relay, product, mode })
    }

    /// The network.
    pub(super) fn lab(&self) -> &Lab {
        &self.product.lab
    }

    /// Starts kube-proxy on the node.
    pub(super) fn start_kube_proxy(&mut self, settings: Settings) -> Result<()> {
        let (lab, kubeconfig) = (&self.product.lab, self.relay.kubeconfig());
        self.node = Some(match settings {
            Settings::Usual => kube_proxy::start(lab, 1, self.mode, kubeconfig)?,
            Settings::Prompt => kube_proxy::start_prompt(lab, 1, self.mode, kubeconfig)?,
        });
        Ok(())
    }

    /// Starts Lockstep's control plane at the API server; it does not serve yet.
    pub(super) fn start_control_plane(&mut self) -> Result<()> {
        let program = product::program(&product::binaries()?, "lockstep-control-plane")?;
        let address = Place::Fabric.address(Family::V4);
        let mut line = vec![program.display().to_string(), "--source=kubernetes".to_owned()];
        line.push(format!("--kubeconfig={}", self.relay.kubeconfig().display()));
        line.push(format!("--listen={address}:{GRPC_PORT}"));
        line.push(format!("--http=127.0.0.1:{HTTP_PORT}"));
        line.extend(self.product.secrets()?.control_plane.server_flags(true));
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        self.control_plane = Some(self.product.spawn("control-plane", Place::Fabric, &line)?);
        Ok(())
    }

    /// Waits until the control plane serves state.
    pub(super) fn wait_control_plane(&self) -> Result<()> {
        let served = wait_until("the control plane serves state", LOAD_PATIENCE, || {
            let answer = self.product.http_get(Place::Fabric, HTTP_PORT, "/readyz");
            Ok(answer.ok().filter(|(status, _)| *status == 200).map(drop))
        });
        served.with_context(|| self.logs())
    }

    /// Starts Lockstep's agent on the node.
    pub(super) fn start_agent(&mut self) -> Result<()> {
        self.node = Some(self.product.spawn_agent(1, &Place::Node(1).to_string())?);
        Ok(())
    }

    /// Ends the agent, and leaves nothing of it in the kernel and on disk.
    pub(super) fn forget_agent(&mut self) -> Result<()> {
        self.node = None;
        self.product.cleanup(1)?;
        let state = self.product.state_directory(1, &Place::Node(1).to_string());
        fs::remove_dir_all(&state).with_context(|| state.display().to_string())
    }

    /// Ends every program; the rules stay in force, and the pods go on to answer.
    pub(super) fn stop(&mut self) {
        self.node = None;
        self.control_plane = None;
    }

    /// CPU of the node's process and of the control plane so far, with their children.
    pub(super) fn cpu(&self) -> Result<Duration> {
        self.node.iter().chain(&self.control_plane).map(|process| usage::cpu(process.pid())).sum()
    }

    /// Peak of resident memory in MiB: the node's process and, where there is one, the control plane.
    pub(super) fn peaks(&self) -> Result<(f64, Option<f64>)> {
        let node = self.node.as_ref().context("nothing runs on the node")?;
        let control_plane = self.control_plane.as_ref().map(|process| usage::peak(process.pid()));
        Ok((usage::peak(node.pid())?, control_plane.transpose()?))
    }

    /// The ends of the logs, for whoever reads a failure.
    pub(super) fn logs(&self) -> String {
        let processes = self.node.iter().chain(&self.control_plane);
        let end = |log: String| log.lines().rev().take(8).map(|line| format!("{line}\n")).collect::<String>();
        processes.map(|process| format!("--- newest first\n{}", end(process.log()))).collect()
    }
}
