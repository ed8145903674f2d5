//! The parts of `cargo xtask test`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::build::{self, Selection, Target, TestProgram};
use crate::process::{Failure, broken, cargo, lines, output, root, run};
use crate::summary::{Counter, Failed, Outcome, Summary};
use crate::{setup, tidy, vm};

/// Something that can be tested alone.
pub(crate) struct Part {
    /// Name on the command line.
    pub(crate) name: &'static str,
    /// What it shows.
    pub(crate) about: &'static str,
    /// Whether `test` without a part runs it.
    pub(crate) in_everything: bool,
    steps: &'static [Step],
    needs_root: bool,
}

/// A piece of a part.
enum Step {
    /// Libraries and programs from inside, and the examples in their documentation.
    Unit,
    /// `tests/` of a crate: its name and directory.
    Outside(&'static str, &'static str),
    /// `tests/` of every crate that no other part names.
    Remaining,
    /// One file in `tests/` of `integration`; programs of the product are built before.
    Integration(&'static str),
    /// Every file in `tests/` of `integration` that no other part names.
    RemainingIntegration,
    /// Everything that runs in a machine with a kernel of its own.
    Guest,
    Tidy,
    Deny(&'static [&'static str]),
    Demo,
}

/// Every part, in the order they run: the quickest answers first.
pub(crate) const PARTS: &[Part] = &[
    Part {
        name: "tidy",
        about: "formatting, lints, docs, layering, file sizes",
        in_everything: true,
        steps: &[Step::Tidy],
        needs_root: false,
    },
    Part {
        name: "unit",
        about: "tests inside the crates",
        in_everything: true,
        steps: &[Step::Unit],
        needs_root: false,
    },
    Part {
        name: "deny",
        about: "licences and sources of dependencies",
        in_everything: true,
        steps: &[Step::Deny(&["bans", "licenses", "sources"])],
        needs_root: false,
    },
    Part {
        name: "crates",
        about: "crates from outside, but for those below",
        in_everything: true,
        steps: &[Step::Remaining],
        needs_root: true,
    },
    Part {
        name: "kernel",
        about: "netlink and namespaces on this kernel",
        in_everything: true,
        steps: &[Step::Outside("lockstep-kernel", "node-dataplane/kernel")],
        needs_root: true,
    },
    Part {
        name: "nftables",
        about: "the nftables backend on this kernel",
        in_everything: true,
        steps: &[Step::Outside("lockstep-backend-nftables", "node-dataplane/backend-nftables")],
        needs_root: true,
    },
    Part {
        name: "iptables",
        about: "the iptables tools and backend on this kernel",
        in_everything: true,
        steps: &[
            Step::Outside("lockstep-xtables", "node-dataplane/xtables"),
            Step::Outside("lockstep-backend-iptables", "node-dataplane/backend-iptables"),
        ],
        needs_root: true,
    },
    Part {
        name: "apiserver",
        about: "the Kubernetes source against a real API server",
        in_everything: true,
        steps: &[Step::Integration("apiserver")],
        needs_root: true,
    },
    Part {
        name: "control-plane",
        about: "the control plane as a process: real API server, kills, TLS",
        in_everything: true,
        steps: &[Step::Integration("control_plane"), Step::Integration("tls")],
        needs_root: false,
    },
    Part {
        name: "packets",
        about: "the whole product: every scenario with real packets, every mode",
        in_everything: true,
        steps: &[Step::Integration("scenarios")],
        needs_root: true,
    },
    Part {
        name: "differential",
        about: "every scenario with the real kube-proxy, every mode of it",
        in_everything: true,
        steps: &[Step::Integration("differential"), Step::Integration("random")],
        needs_root: true,
    },
    Part {
        name: "product",
        about: "the whole product: kills under load, restarts, broken input, foreign rules, TLS",
        in_everything: true,
        steps: &[Step::RemainingIntegration],
        needs_root: true,
    },
    Part {
        name: "guest",
        about: "scenarios and crates on an older kernel, with IPVS and SCTP: vm test",
        in_everything: true,
        steps: &[Step::Guest],
        needs_root: false,
    },
    Part {
        name: "demo",
        about: "the demo, to its end",
        in_everything: true,
        steps: &[Step::Demo],
        needs_root: true,
    },
    Part {
        name: "advisories",
        about: "known faults of dependencies, from rustsec.org",
        in_everything: false,
        steps: &[Step::Deny(&["advisories"])],
        needs_root: false,
    },
];

/// The crate whose tests start the programs of the product.
pub(crate) const INTEGRATION: &str = "lockstep-integration";

/// Longest time for one test program, in seconds: a hang must end as a failure.
const TIME_LIMIT: &str = "1200";

/// Runs the named parts, or set-up and everything.
pub(crate) fn test(names: &[String]) -> Result<(), Failure> {
    let mut chosen = Vec::new();
    for name in names {
        match PARTS.iter().find(|part| part.name == name) {
            Some(part) => chosen.push(part),
            None => return Err(Failure::Usage(format!("unknown part `{name}`"))),
        }
    }
    let mut summary = Summary::default();
    let everything = chosen.is_empty();
    if everything {
        timed(&mut summary, "setup", |outcome| {
            setup::everything()?;
            outcome.check("setup", true);
            Ok(())
        });
        chosen.extend(PARTS.iter().filter(|part| part.in_everything));
    }
    let mut programs = None;
    for part in chosen {
        println!("\n== {}: {}", part.name, part.about);
        timed(&mut summary, part.name, |outcome| {
            if part.needs_root && !setup::is_root() {
                return broken("needs root: it makes network namespaces");
            }
            part.steps.iter().try_for_each(|step| step.run(everything, &mut programs, outcome))
        });
    }
    println!("{}", summary.text().trim_end());
    if summary.good() { Ok(()) } else { broken("not everything passed") }
}

/// Writes the golden files anew: runs the tests with `golden` in their path, and those in a file
/// of that name in `tests/`.
pub(crate) fn bless() -> Result<(), Failure> {
    setup::packages()?;
    let mut outcome = Outcome::default();
    for (package, directory) in directories_with_goldens()? {
        let before = outcome.passed + outcome.failed.len();
        let mut choices = vec![["--lib", "golden"]];
        if directory.join("tests/golden.rs").exists() {
            choices.push(["--test", "golden"]);
        }
        for choice in choices {
            let mut command = cargo();
            command.args(["test", "--quiet", "--package", &package]).args(choice);
            count(command.env("LOCKSTEP_BLESS", "1"), &package, &mut outcome)?;
        }
        if outcome.passed + outcome.failed.len() == before {
            return broken(format!("{package} has golden files, but no test in `golden` writes them"));
        }
    }
    if !outcome.failed.is_empty() {
        return broken(format!("not blessed, see above: {}", outcome.names().join(", ")));
    }
    println!("{} golden tests: their files are as the code is now; see git diff", outcome.passed);
    Ok(())
}

/// Crates whose source mentions the variable, with their directories, sorted.
fn directories_with_goldens() -> Result<Vec<(String, PathBuf)>, Failure> {
    let grep = ["grep", "--untracked", "--files-with-matches", "LOCKSTEP_BLESS", "--", "*.rs"];
    let files = output(Command::new("git").args(grep).current_dir(root()))?;
    let mut found = Vec::new();
    for file in files.lines().filter(|file| !file.starts_with("xtask/")) {
        let above = Path::new(file).ancestors().map(|above| root().join(above));
        let Some(directory) = above.into_iter().find(|above| above.join("Cargo.toml").is_file()) else {
            continue;
        };
        let manifest = fs::read_to_string(directory.join("Cargo.toml")).unwrap_or_default();
        let name = manifest.lines().find_map(|line| line.strip_prefix("name = \""));
        found.extend(name.map(|name| (name.trim_end_matches('"').to_owned(), directory)));
    }
    found.sort();
    found.dedup();
    if found.is_empty() { broken("no crate with golden files was found") } else { Ok(found) }
}

/// Runs one part; a failure to run is a failed check of that part, and the rest goes on.
pub(crate) fn timed(
    summary: &mut Summary,
    name: &'static str,
    work: impl FnOnce(&mut Outcome) -> Result<(), Failure>,
) {
    let start = Instant::now();
    let mut outcome = Outcome::default();
    if let Err(failure) = work(&mut outcome) {
        eprintln!("{name}: {failure}");
        outcome.failed.push(Failed::new(failure.to_string()));
    }
    summary.add(name, outcome, start.elapsed());
}

impl Step {
    fn run(
        &self,
        everything: bool,
        programs: &mut Option<Vec<TestProgram>>,
        outcome: &mut Outcome,
    ) -> Result<(), Failure> {
        // With everything to run, one build serves all; alone, a part builds what it needs.
        let mut built = |selection: &Selection| -> Result<Vec<TestProgram>, Failure> {
            if !everything {
                return build::tests(selection);
            }
            if programs.is_none() {
                *programs = Some(build::tests(&Selection::Everything)?);
            }
            Ok(programs.clone().unwrap_or_default())
        };
        match self {
            Step::Tidy => tidy::check(outcome),
            Step::Deny(checks) => deny(checks, outcome),
            Step::Demo => {
                if everything {
                    // Its programs are part of the one build.
                    built(&Selection::Everything)?;
                    crate::run_demo(&[], &setup::peers(&["grpcurl"])?)?;
                } else {
                    crate::demo(&[])?;
                }
                outcome.check("demo", true);
                Ok(())
            }
            Step::Guest => vm::into(&mut built, outcome),
            Step::Unit => {
                let of_unit = built(&Selection::Everything)?;
                run_all(of_unit.iter().filter(|program| program.target == Target::Unit), &[], outcome)?;
                doc_tests(outcome)
            }
            Step::Outside(package, directory) => {
                let of_package = built(&Selection::Files { names: test_files(directory)?, programs: false })?;
                let wanted = |program: &&TestProgram| program.package == *package;
                run_all(of_package.iter().filter(outside).filter(wanted), &[], outcome)
            }
            Step::Remaining => {
                let all = built(&Selection::Everything)?;
                let wanted = |program: &&TestProgram| !named_elsewhere(&program.package);
                run_all(all.iter().filter(outside).filter(wanted), &[], outcome)
            }
            Step::Integration(name) => {
                let names = vec![(*name).to_owned()];
                let of_integration = built(&Selection::Files { names, programs: true })?;
                let wanted = |program: &&TestProgram| program.package == INTEGRATION && program.name == *name;
                run_all(of_integration.iter().filter(outside).filter(wanted), &setup::ALL_PEERS, outcome)
            }
            Step::RemainingIntegration => {
                let mut names = test_files("integration")?;
                names.retain(|name| !is_part_of_integration(name));
                let of_integration = built(&Selection::Files { names, programs: true })?;
                let wanted = |program: &&TestProgram| {
                    program.package == INTEGRATION && !is_part_of_integration(&program.name)
                };
                run_all(of_integration.iter().filter(outside).filter(wanted), &setup::ALL_PEERS, outcome)
            }
        }
    }
}

fn outside(program: &&TestProgram) -> bool {
    program.target == Target::Outside
}

/// True where another part than the remaining ones runs the tests of this crate.
fn named_elsewhere(package: &str) -> bool {
    package == INTEGRATION
        || PARTS.iter().flat_map(|part| part.steps).any(|step| match step {
            Step::Outside(named, _) => *named == package,
            _ => false,
        })
}

/// Names of the test programs in `tests/` of a directory, sorted.
fn test_files(directory: &str) -> Result<Vec<String>, Failure> {
    let tests = root().join(directory).join("tests");
    let entries = match fs::read_dir(&tests) {
        Ok(entries) => entries,
        Err(error) => return broken(format!("{}: {error}", tests.display())),
    };
    let files = entries.flatten().map(|entry| entry.path());
    let sources = files.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let stems = sources.filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()));
    let mut names: Vec<String> = stems.collect();
    names.sort();
    Ok(names)
}

/// True where a part of its own runs this file of `integration`.
fn is_part_of_integration(file: &str) -> bool {
    let steps = PARTS.iter().flat_map(|part| part.steps);
    vm::only_here(file)
        || steps.into_iter().any(|step| matches!(step, Step::Integration(name) if *name == file))
}

fn run_all<'a>(
    programs: impl Iterator<Item = &'a TestProgram>,
    peers: &[&str],
    outcome: &mut Outcome,
) -> Result<(), Failure> {
    let peers = setup::peers(peers)?;
    for program in programs {
        let name = format!("{} {}", program.package, program.name);
        println!("\n-- {name}");
        let mut command = Command::new("timeout");
        // It signals the test alone, not its group: what the test started dies with it, and the shells
        // that clean up after it are to live on.
        command.args(["--foreground", "--kill-after=10", TIME_LIMIT]).arg(&program.executable);
        command.current_dir(&program.directory);
        if program.package == INTEGRATION {
            // What a test measured is part of the report.
            command.arg("--show-output");
        }
        command.env("CARGO_MANIFEST_DIR", &program.directory).env("LOCKSTEP_PEERS_DIR", &peers);
        count(&mut command, &name, outcome)?;
    }
    Ok(())
}

fn doc_tests(outcome: &mut Outcome) -> Result<(), Failure> {
    println!("\n-- examples in documentation");
    count(cargo().args(["test", "--workspace", "--doc", "--quiet"]), "documentation", outcome)
}

fn count(command: &mut Command, name: &str, outcome: &mut Outcome) -> Result<(), Failure> {
    let mut counter = Counter::default();
    let success = lines(command, |line| {
        println!("{line}");
        counter.line(line);
    })?;
    counter.add_to(outcome, name, success);
    Ok(())
}

fn deny(checks: &[&str], outcome: &mut Outcome) -> Result<(), Failure> {
    let program = setup::cargo_deny()?;
    for check in checks {
        let mut command = Command::new(&program);
        command.args(["--all-features", "check", "--hide-inclusion-graph", check]).current_dir(root());
        outcome.check(check, run(&mut command).is_ok());
    }
    Ok(())
}
