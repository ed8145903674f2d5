//! Lockstep beside the real kube-proxy: same kernel, same objects, same API server.
//!
//! ```text
//! API server <── relay ── kube-proxy ──> kernel of a node <── connections ── a client pod
//!      ^                                                                         │ all times
//!      └── relay ── control plane ── agent ──> kernel of a node <── connections ─┘
//! ```
//!
//! Each has a network of its own, and they take turns: only one runs at a time, because every
//! change at the API server is work for both, and whoever is not timed would take the CPU of the
//! other. Nothing is asked of the programs themselves but their CPU and memory.

mod goals;
mod objects;
mod outside;
mod stage;
mod usage;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::runtime::Runtime;

use self::objects::Objects;
use self::stage::{Settings, Stage};
use super::report::Report;
use crate::apiserver::Server;
use crate::guest::patient;
use crate::lab::Place;
use crate::product::Mode;

/// Changes whose CPU is counted, and how far apart they are.
const COUNTED: u32 = 1_000;
const PACE: Duration = Duration::from_millis(10);
/// After the last of them is in force: what follows takes CPU too (reading back, acknowledging,
/// deleting what is out of use), and is to be over.
const SETTLING: Duration = Duration::from_secs(3);
/// Before a change that is timed. kube-proxy programs again a second after it last did: so every
/// change is one that comes by itself, which it programs at once.
const REST: Duration = Duration::from_millis(1_200);
/// Connections of one address in a row, and how often each proxy has its turn.
const CONNECTIONS: usize = 100;
const TURNS: usize = 40;

/// What to measure.
#[derive(Debug)]
pub struct Options {
    services: Vec<u32>,
    modes: Vec<Mode>,
    changes: u32,
    rounds: u32,
}

/// What one proxy did.
#[derive(Default)]
struct Times {
    /// From nothing at all, to the last Service.
    cold: Vec<Duration>,
    /// The same, with a control plane that serves.
    beside: Vec<Duration>,
    /// From before an endpoint is changed to the first connection at the new one.
    change: Vec<Duration>,
    cpu: Duration,
    /// MiB of the node's process and of the control plane.
    peaks: (f64, Option<f64>),
    /// Connections to the first and to the last Service.
    connects: [Vec<Duration>; 2],
}

/// Both, at one size and in one mode.
struct Duel {
    services: u32,
    mode: Mode,
    kube_proxy: Times,
    lockstep: Times,
}

impl Options {
    /// Reads the command line.
    pub fn read(arguments: &[String]) -> Result<Self> {
        let mut this = Self {
            services: vec![1_000],
            modes: vec![Mode::Nftables, Mode::IptablesLegacy],
            changes: 100,
            rounds: 3,
        };
        for pair in arguments.chunks(2) {
            let [option, value] = pair else { bail!("{}: has no value", pair[0]) };
            let number = |text: &str| text.parse::<u32>().with_context(|| format!("{option} {text}"));
            match option.as_str() {
                "--services" => this.services = value.split(',').map(number).collect::<Result<_>>()?,
                "--changes" => this.changes = number(value)?,
                "--rounds" => this.rounds = number(value)?.max(1),
                "--mode" => this.modes = value.split(',').map(mode).collect::<Result<_>>()?,
                _ => bail!("{option}: unknown option"),
            }
        }
        ensure!(this.changes >= this.rounds, "--changes {}: at least one per round", this.changes);
        // Ten Services answer, and the CPU is that of changes of as many Services as can be.
        ensure!(this.services.iter().all(|services| *services >= 100), "--services: at least 100");
        Ok(this)
    }
}

fn mode(name: &str) -> Result<Mode> {
    Mode::here()
        .into_iter()
        .find(|mode| mode.name() == name)
        .with_context(|| format!("--mode {name}: unknown"))
}

/// Measures everything that was asked for.
pub fn run(report: &mut Report, options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    for services in &options.services {
        let server = runtime.block_on(Server::find())?;
        let cluster = runtime.block_on(server.cluster())?;
        let start = Instant::now();
        let objects = runtime.block_on(Objects::create(cluster, *services)).context("create the objects")?;
        note(&format!("{services} Services created in {:.1} s", start.elapsed().as_secs_f64()));
        let mut bench = Bench { runtime: &runtime, server: &server, objects };
        for mode in &options.modes {
            let duel = bench.duel(*mode, *services, options);
            match duel.with_context(|| format!("{}, {services} x 10", mode.name())) {
                Ok(duel) => goals::judge(report, &duel),
                Err(error) => {
                    report.missed(format!("{}, {services} x 10", mode.name()), format!("{error:#}"))
                }
            }
        }
        // Once is enough to see what the period does.
        if options.modes.contains(&Mode::Nftables) && Some(services) == options.services.first() {
            match bench.prompt(Mode::Nftables, options.changes.div_ceil(options.rounds)) {
                Ok(prompt) => goals::prompt(report, *services, &prompt),
                Err(error) => report.missed("kube-proxy with a shorter period", format!("{error:#}")),
            }
        }
    }
    Ok(())
}

/// Progress of what takes minutes.
fn note(text: &str) {
    use std::io::Write as _;
    // Nobody who looks is no reason to stop.
    let _ = writeln!(std::io::stderr(), "{text}");
}

struct Bench<'a> {
    runtime: &'a Runtime,
    server: &'a Server,
    objects: Objects,
}

impl Bench<'_> {
    fn duel(&mut self, mode: Mode, services: u32, options: &Options) -> Result<Duel> {
        let mut duel = Duel { services, mode, kube_proxy: Times::default(), lockstep: Times::default() };
        let rounds = options.rounds;
        for round in 0..rounds {
            let changes = options.changes / rounds + u32::from(round < options.changes % rounds);
            let counted = round == 0;
            let theirs = self.kube_proxy(mode, Settings::Usual, changes, counted, &mut duel.kube_proxy)?;
            let ours = self.lockstep(mode, changes, counted, &mut duel.lockstep)?;
            if round + 1 == rounds {
                self.connects(&theirs, &mut duel.kube_proxy, &ours, &mut duel.lockstep)?;
            }
            note(&format!("{} {services} x 10: round {} of {rounds} done", mode.name(), round + 1));
            for (who, times) in [("kube-proxy", &duel.kube_proxy), ("Lockstep", &duel.lockstep)] {
                let Times { cold, beside, change, cpu, peaks, .. } = times;
                note(&format!("{who}: {cold:.1?} {beside:.1?}, {change:.1?}, {cpu:.1?}, {peaks:.1?}"));
            }
        }
        Ok(duel)
    }

    /// kube-proxy that waits less between two programmings than it does by itself.
    fn prompt(&mut self, mode: Mode, changes: u32) -> Result<Times> {
        let mut times = Times::default();
        self.kube_proxy(mode, Settings::Prompt, changes, true, &mut times)?;
        Ok(times)
    }

    /// Returns the network with the rules in force and nothing running.
    fn kube_proxy(
        &mut self,
        mode: Mode,
        settings: Settings,
        changes: u32,
        counted: bool,
        times: &mut Times,
    ) -> Result<Stage> {
        let mut stage = Stage::new(self.server, mode)?;
        let start = Instant::now();
        stage.start_kube_proxy(settings)?;
        times.cold.push(self.until_reachable(&stage, start)?);
        self.go_on(stage, changes, counted, times)
    }

    /// The same of Lockstep: first all of it starts, then the node alone.
    fn lockstep(&mut self, mode: Mode, changes: u32, counted: bool, times: &mut Times) -> Result<Stage> {
        let mut stage = Stage::new(self.server, mode)?;
        let start = Instant::now();
        stage.start_control_plane()?;
        stage.start_agent()?;
        times.cold.push(self.until_reachable(&stage, start)?);
        stage.wait_control_plane()?;
        stage.forget_agent()?;
        let start = Instant::now();
        stage.start_agent()?;
        times.beside.push(self.until_reachable(&stage, start)?);
        self.go_on(stage, changes, counted, times)
    }

    /// What is the same for both once they are there.
    fn go_on(&mut self, mut stage: Stage, changes: u32, counted: bool, times: &mut Times) -> Result<Stage> {
        for _ in 0..changes {
            std::thread::sleep(patient(REST));
            times.change.push(self.change(&stage)?);
        }
        if counted {
            std::thread::sleep(patient(REST));
            let before = stage.cpu()?;
            self.runtime.block_on(self.objects.replace(COUNTED, PACE))?;
            // Watched in order: where this one is in force, all are.
            self.change(&stage)?;
            std::thread::sleep(patient(SETTLING));
            times.cpu = stage.cpu()? - before;
        }
        let (node, control_plane) = stage.peaks()?;
        let (most, most_of_control_plane) = times.peaks;
        times.peaks =
            (node.max(most), control_plane.map(|peak| peak.max(most_of_control_plane.unwrap_or(0.0))));
        stage.stop();
        Ok(stage)
    }

    fn until_reachable(&self, stage: &Stage, start: Instant) -> Result<Duration> {
        let reachable = outside::until_all_answer(stage.lab(), &self.objects.answering());
        Ok(reachable.with_context(|| stage.logs())? - start)
    }

    fn change(&mut self, stage: &Stage) -> Result<Duration> {
        let (address, pod) = self.objects.moved();
        std::thread::scope(|scope| {
            let client = scope.spawn(|| outside::until_answered_by(stage.lab(), address, pod));
            let start = self.runtime.block_on(self.objects.move_endpoint())?;
            let seen = client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok(seen.with_context(|| stage.logs())? - start)
        })
    }

    /// New connections by the rules of both, in turns.
    fn connects(
        &self,
        theirs: &Stage,
        kube_proxy: &mut Times,
        ours: &Stage,
        lockstep: &mut Times,
    ) -> Result<()> {
        // Before there were rules, the client asked in vain, and the kernel would know these
        // connections for two minutes: another from the same port would go the same way.
        for stage in [theirs, ours] {
            stage.lab().tool(Place::Node(1), &["conntrack", "--flush"])?;
        }
        let answering = self.objects.answering();
        let ends = [answering[0], answering[answering.len() - 1]];
        for _ in 0..TURNS {
            for (at, address) in ends.into_iter().enumerate() {
                for (who, stage, times) in
                    [("kube-proxy", theirs, &mut *kube_proxy), ("Lockstep", ours, &mut *lockstep)]
                {
                    let connected = outside::connects(stage.lab(), address, CONNECTIONS);
                    let connected = connected.with_context(|| outside::pods(stage.lab()));
                    times.connects[at].extend(connected.with_context(|| format!("by the rules of {who}"))?);
                }
            }
        }
        Ok(())
    }
}
