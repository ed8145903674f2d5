//! Checks of the source as text and as a build, without running any of it.

use std::fs;
use std::process::Command;

use crate::layering;
use crate::process::{Failure, cargo, output, root, run};
use crate::setup;
use crate::summary::Outcome;

/// A file longer than this wants to be two.
const RUST_LINES: usize = 700;
/// Larger files make every clone slow for ever.
const FILE_BYTES: u64 = 1024 * 1024;

/// Runs every check; a failed one does not hide the others.
pub(crate) fn check(outcome: &mut Outcome) -> Result<(), Failure> {
    setup::packages()?;
    setup::components()?;
    let packages = layering::packages()?;
    outcome.check("files", files(&tracked()?));
    outcome.check("layering", layering::check(&packages)?);
    outcome.check("formatting", step(cargo().args(["fmt", "--all", "--check"])));
    outcome.check(
        "clippy",
        step(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])),
    );
    outcome.check(
        "documentation",
        step(cargo().args(["doc", "--quiet", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings")),
    );
    // Built together, a crate may lean on features that only its neighbours ask for. All in one
    // target directory: what two crates ask of a dependency in the same way is built once.
    for name in &packages {
        let mut command = cargo();
        command.args(["check", "--quiet", "--all-targets", "--package", name]);
        outcome.check(&format!("{name} alone"), step(&mut command));
    }
    Ok(())
}

fn step(command: &mut Command) -> bool {
    match run(command) {
        Ok(()) => true,
        Err(failure) => {
            eprintln!("tidy: {failure}");
            false
        }
    }
}

/// Files under version control, relative to the root.
fn tracked() -> Result<Vec<String>, Failure> {
    let list = output(Command::new("git").args(["ls-files", "-z"]).current_dir(root()))?;
    Ok(list.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

fn files(names: &[String]) -> bool {
    let mut good = true;
    let mut complain = |name: &str, what: String| {
        eprintln!("tidy: {name}: {what}");
        good = false;
    };
    for name in names {
        let path = root().join(name);
        let Ok(bytes) = fs::read(&path) else {
            // Deleted and not yet committed.
            continue;
        };
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > FILE_BYTES {
            complain(name, format!("{} bytes, more than {FILE_BYTES}", bytes.len()));
        }
        let Ok(text) = String::from_utf8(bytes) else { continue };
        let lines = text.lines().count();
        if name.ends_with(".rs") && lines > RUST_LINES {
            complain(name, format!("{lines} lines, more than {RUST_LINES}: split it"));
        }
        for (number, line) in text.lines().enumerate() {
            if let Some(path) = machine_path(line) {
                complain(name, format!("line {}: `{path}` exists on one machine only", number + 1));
            }
        }
    }
    good
}

/// A path that is somebody's own.
fn machine_path(line: &str) -> Option<&'static str> {
    // Put together here, so that this file does not find itself.
    let places = [
        // First, because it is often inside one of the others.
        (format!("{}/", root().display()), "this checkout"),
        (format!("{}me/", "/ho"), "a home directory"),
        (format!("{}ot/", "/ro"), "root's home"),
        (format!("{}ers/", "/Us"), "a home directory"),
    ];
    for (place, name) in places {
        // At the start of a path only: the same name deeper in a path is nobody's own.
        let starts_path = |at: usize| {
            line[..at]
                .chars()
                .next_back()
                .is_none_or(|before| !before.is_alphanumeric() && !"/._-}~*".contains(before))
        };
        if line.match_indices(&place).any(|(at, _)| starts_path(at)) {
            return Some(name);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{machine_path, root};

    #[test]
    fn somebodys_own_path_is_found() {
        let line = format!("see {}me/ada/notes", "/ho");
        assert_eq!(machine_path(&line), Some("a home directory"));
    }

    #[test]
    fn the_same_name_deeper_in_a_path_is_fine() {
        assert_eq!(machine_path(&format!("target{}me/x", "/ho")), None);
    }

    #[test]
    fn the_place_of_this_checkout_is_found() {
        let line = format!("built in {}/target", root().display());
        assert_eq!(machine_path(&line), Some("this checkout"));
    }
}
