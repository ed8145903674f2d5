//! iptables mode: how much of the time is our own, and how much is written for one change.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lockstep_backend_iptables::Iptables;
use lockstep_kernel::exec::{ExecError, Output, Processes, Run};
use lockstep_kernel::netns;
use lockstep_view::Backend;
use lockstep_xtables::Flavour;

use super::cluster::{Replaced, Upstream};
use super::node::{session, view};

/// What one size gives.
#[derive(Debug, Default)]
pub struct Measured {
    /// Full programming of an empty namespace.
    pub full: Vec<Share>,
    /// One endpoint replaced.
    pub change: Vec<Share>,
    /// What was written for it read back.
    pub verify: Vec<Duration>,
}

/// A time and whose it was.
#[derive(Debug, Default, Clone, Copy)]
pub struct Share {
    /// From the plan to committed.
    pub total: Duration,
    /// During which no tool ran.
    pub own: Duration,
    /// Input of all tools together.
    pub bytes: usize,
}

impl Share {
    /// Our own part, in percent.
    pub fn percent(&self) -> f64 {
        100.0 * super::ratio(self.own, self.total)
    }
}

/// One run of a tool.
#[derive(Debug, Clone, Copy)]
struct Call {
    start: Instant,
    end: Instant,
    bytes: usize,
}

/// Runs the tools and keeps the time.
#[derive(Default)]
struct Timed(Mutex<Vec<Call>>);

impl Run for Timed {
    fn run(
        &self,
        program: &str,
        arguments: &[&str],
        stdin: &[u8],
        limit: Duration,
    ) -> Result<Output, ExecError> {
        let start = Instant::now();
        let output = Processes.run(program, arguments, stdin, limit);
        let call = Call { start, end: Instant::now(), bytes: stdin.len() };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(call);
        output
    }
}

impl Timed {
    /// Times `work`, which must succeed. The tools of both families run side by side.
    fn share(&self, work: impl FnOnce() -> Result<()>) -> Result<Share> {
        let calls = || std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        drop(calls());
        let start = Instant::now();
        work()?;
        let total = start.elapsed();
        let mut calls = calls();
        calls.sort_by_key(|call| call.start);
        let (mut tools, mut until) = (Duration::ZERO, start);
        for call in &calls {
            tools += call.end.saturating_duration_since(call.start.max(until));
            until = until.max(call.end);
        }
        let bytes = calls.iter().map(|call| call.bytes).sum();
        Ok(Share { total, own: total.saturating_sub(tools), bytes })
    }
}

/// The middle one by our own part.
pub fn median(mut shares: Vec<Share>) -> Share {
    shares.sort_by(|a, b| a.percent().total_cmp(&b.percent()));
    shares.get(shares.len() / 2).copied().unwrap_or_default()
}

/// Programs a cluster of this size, each time in a namespace of its own, and in the last one
/// replaces single endpoints.
pub fn measure(services: u32, flavour: Flavour, loads: usize, changes: usize) -> Result<Measured> {
    let mut measured = Measured::default();
    for load in 1..=loads {
        program(services, flavour, if load == loads { changes } else { 0 }, &mut measured)?;
    }
    Ok(measured)
}

fn program(services: u32, flavour: Flavour, changes: usize, measured: &mut Measured) -> Result<()> {
    let mut upstream = Upstream::new(services);
    let mut session = session(upstream.greeting()?)?;
    netns::run_in_new(|| -> Result<()> {
        let timed = Arc::new(Timed::default());
        let mut backend = Iptables::open(timed.clone(), flavour).context("open")?;
        let mut view = view(session.node().clone())?;
        let keys: Vec<_> = session.state().service_keys().cloned().collect();
        view.update(session.state(), &keys);
        measured.full.push(timed.share(|| {
            let applied = backend.sync(view.plan()).context("sync")?;
            ensure!(applied.failures.is_empty(), "{:?}", applied.failures.first());
            Ok(())
        })?);
        for _ in 0..changes {
            let event = upstream.replace(Replaced::ONE);
            let frames = upstream.publish(event)?;
            measured.change.push(timed.share(|| {
                let services = super::node::take(&mut session, frames)?;
                let changed = view.update(session.state(), &services);
                let applied = backend.apply(view.plan(), &changed.services).context("apply")?;
                ensure!(applied.failures.is_empty() && applied.objects_changed > 0, "{applied:?}");
                Ok(())
            })?);
            let start = Instant::now();
            let drift = backend.verify().context("verify")?;
            ensure!(drift.is_empty(), "{drift:?}");
            measured.verify.push(start.elapsed());
        }
        Ok(())
    })?
}
