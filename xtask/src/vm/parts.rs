//! The parts of `cargo xtask vm test`: test programs that run in one guest, one after the other.

use std::path::Path;

use super::apiserver::ApiServer;
use super::contents::Contents;
use super::kernel::Kernel;
use super::{Options, boot, environment, prepare, quoted};
use crate::build::{self, Selection, Target, TestProgram};
use crate::parts::INTEGRATION;
use crate::process::{Failure, broken};
use crate::setup;
use crate::summary::{Counter, Outcome, Summary};

/// Something that can be tested alone in a guest.
pub(crate) struct Part {
    /// Name on the command line.
    pub(crate) name: &'static str,
    /// What it shows.
    pub(crate) about: &'static str,
    tests: Tests,
    /// What of it is run with all other tests: a choice that takes minutes, or all where it is empty.
    everyday: &'static [&'static str],
    /// Whether the real kube-proxy is in the guest, and an API server beside it.
    kube_proxy: bool,
}

enum Tests {
    /// Files in `tests/` of `integration`.
    Integration(&'static [&'static str]),
    /// The same, of those that other kernels may have no use for: no other part runs them.
    IntegrationHere(&'static str),
    /// `tests/` of every crate that has a feature `guest`: what needs this kernel. Tests that run on
    /// every kernel run too, on an older one for once.
    Crates,
}

/// Every part.
pub(crate) const PARTS: &[Part] = &[
    Part {
        name: "crates",
        about: "crates with a feature `guest`, from outside",
        tests: Tests::Crates,
        everyday: &[],
        kube_proxy: false,
    },
    Part {
        name: "packets",
        about: "every scenario with real packets, every mode, also those that need what the host lacks",
        tests: Tests::Integration(&["scenarios"]),
        // What other kernels do differently shows where other parts of them are used.
        everyday: &["ipvs/,sctp,/cluster-ip,/node-port,/session-affinity,/source-ranges"],
        kube_proxy: false,
    },
    Part {
        name: "ipvs",
        about: "the whole product in IPVS mode: what no scenario can show",
        tests: Tests::IntegrationHere("ipvs_mode"),
        everyday: &[],
        kube_proxy: false,
    },
    Part {
        name: "continuity",
        about: "kills and changes of mode under load, IPVS among the modes",
        tests: Tests::Integration(&["continuity", "switches"]),
        everyday: &["takes_over"],
        kube_proxy: false,
    },
    // Before the other one of them: it leaves the API server as it was.
    Part {
        name: "takeover",
        about: "from the real kube-proxy to Lockstep under load, one of both in IPVS mode",
        tests: Tests::Integration(&["takeover"]),
        everyday: &[],
        kube_proxy: true,
    },
    Part {
        name: "differential",
        about: "scenarios with the real kube-proxy in IPVS mode",
        tests: Tests::Integration(&["differential"]),
        // As many as are played at the same time.
        everyday: &["hairpin,load-balancer,masquerade,node-port-addresses,internal-policy-local,\
            external-policy-local,wrong-port,topology-hints,no-endpoints-everywhere,IPv4/terminating"],
        kube_proxy: true,
    },
];

/// True where only a guest can run this file in `tests/` of `integration`.
pub(crate) fn only_here(file: &str) -> bool {
    PARTS.iter().any(|part| matches!(part.tests, Tests::IntegrationHere(name) if name == file))
}

/// Programs of the product and of `integration` that tests start.
pub(crate) const STARTED: [&str; 4] =
    ["lockstep-control-plane", "lockstep-node", "lockstep-pod", "lockstepctl"];

/// Longest time for one test program, in seconds.
const TIME_LIMIT: &str = "2400";

/// Before what the guest says about its own progress.
const SIGN: &str = "lockstep-vm: ";

/// Where built test programs come from.
pub(crate) type Builder<'a> = dyn FnMut(&Selection) -> Result<Vec<TestProgram>, Failure> + 'a;

/// Runs the named parts, or all without kube-proxy. What comes after `--` goes to every test program: which
/// tests to run.
pub(crate) fn test(options: &Options, arguments: &[String]) -> Result<(), Failure> {
    let mut halves = arguments.splitn(2, |argument| argument == "--");
    let (names, filters) = (halves.next().unwrap_or_default(), halves.next().unwrap_or_default());
    let mut chosen: Vec<&Part> = Vec::new();
    for name in names {
        match PARTS.iter().find(|part| part.name == name) {
            Some(part) => chosen.push(part),
            None => return Err(Failure::Usage(format!("unknown part `{name}` of vm test"))),
        }
    }
    if chosen.is_empty() {
        chosen.extend(PARTS.iter().filter(|part| !part.kube_proxy));
    }
    let mut summary = Summary::default();
    crate::parts::timed(&mut summary, "guest", |outcome| {
        let chosen = chosen.iter().map(|part| (*part, filters.to_vec())).collect();
        run(options, chosen, &mut build::tests, outcome)
    });
    println!("{}", summary.text().trim_end());
    if summary.good() { Ok(()) } else { broken("not everything passed") }
}

/// Runs what is for every day of every part, as one of the parts of `cargo xtask test`.
pub(crate) fn into(built: &mut Builder<'_>, outcome: &mut Outcome) -> Result<(), Failure> {
    let options = Options { limits: super::LIMITS, with: Vec::new() };
    let words = |words: &[&str]| words.iter().copied().map(str::to_owned).collect();
    let everyday = PARTS.iter().map(|part| (part, words(part.everyday))).collect();
    run(&options, everyday, built, outcome)
}

fn run(
    options: &Options,
    parts: Vec<(&Part, Vec<String>)>,
    built: &mut Builder<'_>,
    outcome: &mut Outcome,
) -> Result<(), Failure> {
    setup::packages()?;
    setup::guest_packages()?;
    let kernel = Kernel::get()?;
    // An API server takes its share of this machine, so other parts have a guest without.
    let (with, without): (Vec<_>, Vec<_>) = parts.into_iter().partition(|(part, _)| part.kube_proxy);
    for parts in [without, with].into_iter().filter(|parts| !parts.is_empty()) {
        in_one(&kernel, options, parts, built, outcome)?;
    }
    Ok(())
}

/// Runs parts in one guest.
fn in_one(
    kernel: &Kernel,
    options: &Options,
    parts: Vec<(&Part, Vec<String>)>,
    built: &mut Builder<'_>,
    outcome: &mut Outcome,
) -> Result<(), Failure> {
    let mut limits = options.limits;
    if parts.iter().any(|(part, _)| part.kube_proxy) {
        limits.network = true;
        limits.memory = limits.memory.max(super::WITH_KUBE_PROXY.memory);
    }
    let (mut programs, mut filters) = (Vec::new(), Vec::new());
    for (part, words) in parts {
        programs.extend(part.programs(built)?);
        filters.resize(programs.len(), words);
    }
    if programs.is_empty() {
        println!("no test program is there to be run");
        return Ok(());
    }
    let mut contents = prepare(kernel, &options.with)?;
    if programs.iter().any(|program| program.package == INTEGRATION) {
        for name in STARTED {
            contents.add(&build::program(name))?;
        }
    }
    let built = build::program(STARTED[0]);
    let server = if limits.network { Some(ApiServer::start(&built, &mut contents)?) } else { None };
    let before = server.as_ref().map(ApiServer::environment).unwrap_or_default();
    add_tests(&mut contents, &before, &programs, &filters)?;
    println!("starting a guest with kernel {}", kernel.release);
    let mut report = Report::new(&programs, outcome);
    let status = boot::boot(kernel, contents, limits, Some(&mut |chunk: &[u8]| report.take(chunk)));
    report.end();
    match status? {
        0 => Ok(()),
        status => broken(format!("the guest's list of tests ended with {status}")),
    }
}

impl Part {
    fn programs(&self, built: &mut Builder<'_>) -> Result<Vec<TestProgram>, Failure> {
        match self.tests {
            Tests::Crates => build::guest_tests(),
            Tests::Integration(names) => of_integration(names, built),
            Tests::IntegrationHere(name) => of_integration(&[name], built),
        }
    }
}

fn of_integration(names: &[&str], built: &mut Builder<'_>) -> Result<Vec<TestProgram>, Failure> {
    let files = names.iter().map(|name| (*name).to_owned()).collect();
    let mut programs = built(&Selection::Files { names: files, programs: true })?;
    programs.retain(|program| {
        program.package == INTEGRATION
            && names.contains(&program.name.as_str())
            && program.target == Target::Outside
    });
    Ok(programs)
}

/// The programs, and a command that runs one after the other, each with its filters and what comes
/// before all of them, and says where it is.
fn add_tests(
    contents: &mut Contents,
    before: &str,
    programs: &[TestProgram],
    filters: &[Vec<String>],
) -> Result<(), Failure> {
    let mut script = environment() + before;
    for (index, (program, filters)) in programs.iter().zip(filters).enumerate() {
        let filters: Vec<String> = filters.iter().map(|filter| quoted(filter)).collect();
        contents.add(&program.executable)?;
        let directory = quoted(&program.directory.to_string_lossy());
        script.push_str(&format!(
            "echo '{SIGN}begin {index}'\n\
             cd {directory}\n\
             CARGO_MANIFEST_DIR={directory} timeout --foreground --kill-after=10 {TIME_LIMIT} {} --show-output {}\n\
             printf '\\n{SIGN}end {index} %s\\n' $?\n",
            quoted(&program.executable.to_string_lossy()),
            filters.join(" ")
        ));
    }
    script.push_str("exit 0\n");
    contents.add_text(Path::new("/command"), script);
    Ok(())
}

/// Shows what a guest says, and counts.
struct Report<'a> {
    programs: &'a [TestProgram],
    outcome: &'a mut Outcome,
    /// Without its end yet.
    line: Vec<u8>,
    /// Which program runs, and what it said.
    running: Option<(String, Counter)>,
}

impl<'a> Report<'a> {
    fn new(programs: &'a [TestProgram], outcome: &'a mut Outcome) -> Self {
        Self { programs, outcome, line: Vec::new(), running: None }
    }

    fn take(&mut self, chunk: &[u8]) {
        for byte in chunk {
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                self.whole(String::from_utf8_lossy(&line).trim_end_matches('\r'));
            } else {
                self.line.push(*byte);
            }
        }
    }

    fn whole(&mut self, line: &str) {
        let words: Vec<&str> = line.strip_prefix(SIGN).unwrap_or_default().split(' ').collect();
        match (words.as_slice(), &mut self.running) {
            (["begin", index], _) => {
                let name = self.name(index);
                println!("\n-- {name}, in the guest");
                self.running = Some((name, Counter::default()));
            }
            (["end", _, status], _) => self.finish(*status == "0"),
            (_, running) => {
                println!("{line}");
                if let Some((_, counter)) = running {
                    counter.line(line);
                }
            }
        }
    }

    fn name(&self, index: &str) -> String {
        let program = index.parse().ok().and_then(|index: usize| self.programs.get(index));
        program.map_or_else(|| index.to_owned(), |program| format!("{} {}", program.package, program.name))
    }

    fn finish(&mut self, success: bool) {
        if let Some((name, counter)) = self.running.take() {
            counter.add_to(self.outcome, &format!("{name}, in the guest"), success);
        }
    }

    /// There is no guest any more: what ran until then has failed.
    fn end(&mut self) {
        self.finish(false);
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn outcome_of(said: &str) -> Outcome {
        let program = TestProgram {
            package: "lockstep-kernel".to_owned(),
            target: Target::Outside,
            name: "ipvs".to_owned(),
            executable: PathBuf::new(),
            directory: PathBuf::new(),
        };
        let mut outcome = Outcome::default();
        let programs = [program];
        let mut report = Report::new(&programs, &mut outcome);
        // As a serial line brings it: in pieces.
        for piece in said.as_bytes().chunks(7) {
            report.take(piece);
        }
        report.end();
        outcome
    }

    #[test]
    fn tests_are_counted_for_their_program() {
        let outcome = outcome_of(
            "lockstep-vm: begin 0\ntest a ... ok\ntest b ... FAILED\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored\n\nlockstep-vm: end 0 101\n",
        );
        assert_eq!(outcome.passed, 1);
        assert_eq!(outcome.names(), ["lockstep-kernel ipvs, in the guest: b"]);
    }

    #[test]
    fn a_program_that_a_guest_died_with_has_failed() {
        let outcome = outcome_of("lockstep-vm: begin 0\ntest a ... ok\n");
        assert_eq!(outcome.names(), ["lockstep-kernel ipvs, in the guest: ended early"]);
    }
}
