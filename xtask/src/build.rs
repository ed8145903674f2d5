//! Builds the workspace and finds the test programs in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{Failure, broken, cargo, lines, output, root, run};

/// A test program that cargo built.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TestProgram {
    /// The crate: `lockstep-model`.
    pub(crate) package: String,
    /// What is tested.
    pub(crate) target: Target,
    /// Name of the target: that of the library, program, or file in `tests/`.
    pub(crate) name: String,
    /// The program.
    pub(crate) executable: PathBuf,
    /// Where it runs: the directory of its crate, as with `cargo test`.
    pub(crate) directory: PathBuf,
}

/// What a test program tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    /// A library or program from inside.
    Unit,
    /// A crate from outside: a file in `tests/`.
    Outside,
}

/// What to build.
#[derive(Debug)]
pub(crate) enum Selection {
    /// Every target of every crate.
    Everything,
    /// Files of these names in the `tests/` of any crate; `programs` = and every program.
    Files {
        /// Without `.rs`.
        names: Vec<String>,
        /// Whether tests start them.
        programs: bool,
    },
}

/// One line per thing that was built; what is wrong is shown.
const MESSAGES: &str = "--message-format=json-render-diagnostics";

/// Builds and returns the test programs, sorted. Always a build of the workspace: crates chosen
/// one by one get other features of their dependencies, and so another copy of each.
pub(crate) fn tests(selection: &Selection) -> Result<Vec<TestProgram>, Failure> {
    let mut command = cargo();
    command.args(["build", "--workspace", MESSAGES]);
    match selection {
        Selection::Everything => {
            command.arg("--all-targets");
        }
        Selection::Files { names, programs } => {
            command.args(names.iter().flat_map(|name| ["--test", name]));
            command.args(programs.then_some("--bins"));
        }
    }
    test_programs(&mut command)
}

/// Builds the `tests/` of every crate with a feature `guest`, with that feature. Each is built
/// alone: with the workspace, all that uses one of them would be built a second time.
pub(crate) fn guest_tests() -> Result<Vec<TestProgram>, Failure> {
    let mut programs = Vec::new();
    for package in packages_with_guest()? {
        let mut command = cargo();
        command.args(["build", "--package", &package, "--features", "guest", "--test", "*"]);
        programs.extend(test_programs(command.arg(MESSAGES))?);
    }
    Ok(programs)
}

/// Crates whose features have a `guest`, sorted.
fn packages_with_guest() -> Result<Vec<String>, Failure> {
    let files = output(Command::new("git").args(["ls-files", "*Cargo.toml"]).current_dir(root()))?;
    let manifests = files.lines().filter_map(|file| fs::read_to_string(root().join(file)).ok());
    let mut packages: Vec<String> =
        manifests.filter(|manifest| has_guest(manifest)).filter_map(|manifest| name(&manifest)).collect();
    packages.sort();
    Ok(packages)
}

fn has_guest(manifest: &str) -> bool {
    manifest.lines().any(|line| line.starts_with("guest = ["))
}

fn name(manifest: &str) -> Option<String> {
    Some(between(manifest, "\nname = \"", "\"")?.to_owned())
}

fn test_programs(command: &mut Command) -> Result<Vec<TestProgram>, Failure> {
    let mut programs = Vec::new();
    if !lines(command, |line| programs.extend(test_program(line)))? {
        return broken("the build failed");
    }
    programs.sort();
    Ok(programs)
}

/// Builds the programs of the product and of `integration`.
pub(crate) fn programs() -> Result<(), Failure> {
    run(cargo().args(["build", "--workspace", "--bins"]))
}

/// Where cargo puts a program.
pub(crate) fn program(name: &str) -> PathBuf {
    target().join("debug").join(name)
}

/// The same with optimisation.
pub(crate) fn optimised(name: &str) -> PathBuf {
    target().join("release").join(name)
}

/// What cargo writes to.
pub(crate) fn target() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    root().join(target)
}

/// Reads one of cargo's messages. xtask has no JSON parser, and needs none: cargo writes
/// one object per line with known names, and no value of interest holds a quote.
fn test_program(message: &str) -> Option<TestProgram> {
    if !message.starts_with(r#"{"reason":"compiler-artifact""#) {
        return None;
    }
    let profile = between(message, r#""profile":{"#, "}")?;
    if !profile.contains(r#""test":true"#) {
        return None;
    }
    let executable = PathBuf::from(between(message, r#""executable":""#, "\"")?);
    let target = between(message, r#""target":{"#, "}")?;
    let directory = Path::new(between(message, r#""manifest_path":""#, "\"")?).parent()?.to_path_buf();
    let id = between(message, r#""package_id":""#, "\"")?;
    // `path+file:///somewhere/model#lockstep-model@0.1.0`, or `...#0.1.0` where crate and
    // directory have one name.
    let package = match id.rsplit_once('#')?.1.split_once('@') {
        Some((name, _)) => name.to_owned(),
        None => directory.file_name()?.to_string_lossy().into_owned(),
    };
    let kind = between(target, r#""kind":["#, "]")?;
    Some(TestProgram {
        package,
        target: if kind == r#""test""# { Target::Outside } else { Target::Unit },
        name: between(target, r#""name":""#, "\"")?.to_owned(),
        executable,
        directory,
    })
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    let rest = &text[text.find(start)? + start.len()..];
    Some(&rest[..rest.find(end)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARTIFACT: &str = concat!(
        r#"{"reason":"compiler-artifact","package_id":"path+file:///src/proto/model#lockstep-model@0.1.0","#,
        r#""manifest_path":"/src/proto/model/Cargo.toml","target":{"kind":["KIND"],"crate_types":["bin"],"#,
        r#""name":"golden","src_path":"/src/proto/model/tests/golden.rs","edition":"2024","doc":false,"#,
        r#""doctest":false,"test":true},"profile":{"opt_level":"0","debuginfo":1,"debug_assertions":true,"#,
        r#""overflow_checks":true,"test":TEST},"features":[],"filenames":["/t/golden-1"],"#,
        r#""executable":"/t/golden-1","fresh":true}"#
    );

    #[test]
    fn a_test_target_is_found_with_its_crate_and_directory() {
        let message = ARTIFACT.replace("KIND", "test").replace("TEST", "true");
        let program = test_program(&message).unwrap();
        assert_eq!(program.package, "lockstep-model");
        assert_eq!(program.target, Target::Outside);
        assert_eq!(program.name, "golden");
        assert_eq!(program.executable, Path::new("/t/golden-1"));
        assert_eq!(program.directory, Path::new("/src/proto/model"));
    }

    #[test]
    fn a_library_built_for_its_own_tests_is_a_unit_test() {
        let message = ARTIFACT.replace("KIND", "lib").replace("TEST", "true");
        assert_eq!(test_program(&message).unwrap().target, Target::Unit);
    }

    #[test]
    fn a_crate_says_by_a_feature_that_it_has_tests_for_the_guest() {
        let manifest = "[package]\nname = \"lockstep-kernel\"\n[features]\nguest = []\n";
        assert!(has_guest(manifest));
        assert_eq!(name(manifest).as_deref(), Some("lockstep-kernel"));
        assert!(!has_guest("[features]\nguests = []\n"));
    }

    #[test]
    fn a_program_that_is_no_test_is_not_taken_for_one() {
        let message = ARTIFACT.replace("KIND", "bin").replace("TEST", "false");
        assert_eq!(test_program(&message), None);
    }
}
