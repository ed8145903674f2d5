//! What a node does, from a frame's bytes to the committed transaction, against the raw limit.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use lockstep_backend_nftables::Nftables;
use lockstep_client::{Identity, Now, Session};
use lockstep_kernel::netns;
use lockstep_kernel::nf_tables::Kernel;
use lockstep_model::{NodeContext, ServiceKey, State};
use lockstep_view::{Backend, DetectLocal, View, ViewConfig};
use lockstep_wire::{batch, v1};

use super::cluster::{CLUSTER_CIDR, NODE, Replaced, Upstream};
use super::raw::Copy;

/// Times of the two, one pair per repetition.
#[derive(Debug, Default)]
pub struct Times {
    /// Lockstep's.
    pub lockstep: Vec<Duration>,
    /// The raw limit's.
    pub raw: Vec<Duration>,
    /// Lockstep's, stage by stage.
    pub stages: Stages,
}

/// Where the time of an update goes.
#[derive(Debug, Default)]
pub struct Stages {
    /// Decoding, applying the patches, checking versions and digest.
    pub session: Vec<Duration>,
    /// Planning.
    pub view: Vec<Duration>,
    /// Comparing, encoding, the kernel's transaction.
    pub backend: Vec<Duration>,
}

impl Times {
    /// From the decoded state to committed.
    pub fn programming(&self) -> Vec<Duration> {
        self.stages.view.iter().zip(&self.stages.backend).map(|(view, backend)| *view + *backend).collect()
    }
}

/// Times that one set-up of a size gives.
#[derive(Debug, Default)]
pub struct Measured {
    /// From decoded state to committed.
    pub full: Times,
    /// Of which planning.
    pub planning: Vec<Duration>,
    /// One endpoint replaced, from the frame's bytes to committed.
    pub swap: Times,
    /// [`Replaced::SPREAD`] in one transaction.
    pub spread: Times,
    /// [`Replaced::DENSE`] in one transaction.
    pub dense: Times,
    /// The raw limit's bursts back to back: nothing between them empties the caches.
    pub raw_alone: RawAlone,
    /// Elements in the kernel.
    pub elements: usize,
}

/// A thousand elements of one map, swapped raw.
#[derive(Debug, Default)]
pub struct RawAlone {
    /// Elements from all over the map.
    pub scattered: Vec<Duration>,
    /// Elements in the order in which the map was filled.
    pub in_order: Vec<Duration>,
}

/// The parts of an agent that stand between the stream and the kernel.
pub(super) struct Node<B> {
    pub(super) session: Session,
    pub(super) view: View,
    pub(super) backend: B,
}

/// A view of the node that is measured.
pub(super) fn view(node: NodeContext) -> Result<View> {
    let detect_local = DetectLocal::ClusterCidrs(vec![CLUSTER_CIDR.parse()?]);
    let config = ViewConfig { detect_local, ..ViewConfig::new(NODE) };
    let mut view = View::new(config);
    view.set_node(node);
    Ok(view)
}

/// A session that holds the whole state.
pub(super) fn session(greeting: Vec<Bytes>) -> Result<Session> {
    let mut session = Session::new(
        Identity {
            node_name: NODE.into(),
            instance_id: "bench".to_owned(),
            started: std::time::SystemTime::now(),
            boot_id: String::new(),
            agent_version: "bench".to_owned(),
            backend: v1::Backend::default(),
            features: Vec::new(),
            settings: None,
            kernel_adopted: false,
        },
        None,
    );
    session.connected(Now::read());
    for frame in greeting {
        let step = session.receive(batch::decode_response(frame)?, Now::read());
        ensure!(step.end.is_none(), "session ended: {:?}", step.end);
    }
    ensure!(session.position().is_some(), "the greeting is not complete");
    Ok(session)
}

/// Takes an update into a session; returns the Services concerned.
pub(super) fn take(session: &mut Session, frames: Vec<Bytes>) -> Result<Vec<ServiceKey>> {
    let mut services = Vec::new();
    for frame in frames {
        let step = session.receive(batch::decode_response(frame)?, Now::read());
        ensure!(step.end.is_none(), "session ended: {:?}", step.end);
        services.extend(step.committed.into_iter().flat_map(|committed| committed.services));
    }
    Ok(services)
}

/// State to committed. Returns the time, and the part of it that planning took.
pub(super) fn program(
    state: &State,
    node: NodeContext,
    backend: &mut dyn Backend,
) -> Result<(View, Duration, Duration)> {
    let keys: Vec<ServiceKey> = state.service_keys().cloned().collect();
    let start = Instant::now();
    let mut view = view(node)?;
    view.update(state, &keys);
    let planned = start.elapsed();
    let applied = backend.sync(view.plan()).context("sync")?;
    let total = start.elapsed();
    ensure!(applied.failures.is_empty(), "{:?}", applied.failures.first());
    Ok((view, total, planned))
}

impl<B: Backend> Node<B> {
    /// From the frames' bytes to committed.
    pub(super) fn receive(&mut self, frames: Vec<Bytes>, times: &mut Times) -> Result<()> {
        let start = Instant::now();
        let mut ends = [start; 3];
        for frame in frames {
            let step = self.session.receive(batch::decode_response(frame)?, Now::read());
            ensure!(step.end.is_none(), "session ended: {:?}", step.end);
            let Some(committed) = step.committed else { continue };
            ends[0] = Instant::now();
            let changed = self.view.update(self.session.state(), &committed.services);
            ends[1] = Instant::now();
            let applied = self.backend.apply(self.view.plan(), &changed.services).context("apply")?;
            ends[2] = Instant::now();
            ensure!(applied.failures.is_empty() && applied.objects_changed > 0, "{applied:?}");
        }
        times.stages.session.push(ends[0] - start);
        times.stages.view.push(ends[1] - ends[0]);
        times.stages.backend.push(ends[2] - ends[1]);
        // Letting go of what was received is part of the work.
        times.lockstep.push(start.elapsed());
        Ok(())
    }
}

/// Measures everything at one size, in namespaces that end with it.
pub fn measure(services: u32, loads: usize, swaps: usize, bursts: usize) -> Result<Measured> {
    let mut upstream = Upstream::new(services);
    let session = session(upstream.greeting()?)?;
    let mut measured = Measured::default();
    let mut copy = None;
    for repetition in 0..=loads {
        let (total, planned) = netns::run_in_new(|| -> Result<_> {
            let mut backend = Nftables::open()?;
            let (_, total, planned) = program(session.state(), session.node().clone(), &mut backend)?;
            if copy.is_none() {
                copy = Some(Copy::read(&mut Kernel::open()?)?);
            }
            Ok((total, planned))
        })??;
        let copy = copy.as_ref().context("no copy")?;
        let raw = netns::run_in_new(|| -> Result<_> {
            let mut kernel = Kernel::open()?;
            let start = Instant::now();
            copy.write(&mut kernel)?;
            let raw = start.elapsed();
            if repetition == 0 {
                ensure!(Copy::read(&mut kernel)? == *copy, "the raw limit wrote another state");
            }
            Ok(raw)
        })??;
        // The first pair warms the caches of both.
        if repetition > 0 {
            measured.full.lockstep.push(total);
            measured.full.raw.push(raw);
            measured.planning.push(planned);
        }
    }
    let copy = copy.context("nothing was loaded")?;
    measured.elements = copy.elements();
    netns::run_in_new(|| -> Result<()> {
        let mut backend = Nftables::open()?;
        let (view, ..) = program(session.state(), session.node().clone(), &mut backend)?;
        let mut node = Node { session, view, backend };
        netns::run_in_new(|| -> Result<()> {
            let mut kernel = Kernel::open()?;
            copy.write(&mut kernel)?;
            let mut raw = copy.endpoints()?;
            for (times, what, repetitions) in [
                (&mut measured.swap, Replaced::ONE, swaps),
                (&mut measured.spread, Replaced::SPREAD, bursts),
                (&mut measured.dense, Replaced::DENSE, bursts),
            ] {
                let (runs, length) = (usize::try_from(what.services)?, usize::try_from(what.endpoints)?);
                for _ in 0..repetitions {
                    let event = upstream.replace(what);
                    let frames = upstream.publish(event)?;
                    node.receive(frames, times)?;
                    times.raw.push(raw.swap(&mut kernel, runs, length)?);
                }
            }
            for _ in 0..bursts {
                measured.raw_alone.scattered.push(raw.swap(&mut kernel, 1000, 1)?);
            }
            for _ in 0..bursts {
                measured.raw_alone.in_order.push(raw.swap(&mut kernel, 1, 1000)?);
            }
            Ok(())
        })?
    })??;
    Ok(measured)
}
