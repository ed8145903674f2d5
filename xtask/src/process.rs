//! Running other programs.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why a chore ended early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line is wrong; the usage text follows.
    Usage(String),
    /// Something that should work did not.
    Broken(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(text) | Failure::Broken(text) => f.write_str(text),
        }
    }
}

/// Shorthand for [`Failure::Broken`].
pub(crate) fn broken<T>(text: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Broken(text.into()))
}

/// The directory of the workspace.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// How the variables begin that say which crate is built or run.
const OF_CARGO: [&str; 2] = ["CARGO_MANIFEST_", "CARGO_PKG_"];

/// The cargo that runs this program.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Set by the cargo that runs xtask, for xtask; a cargo below must not take it for its own. Build
    // scripts of dependencies look at some: with them set, all would be built anew after a `cargo build`.
    let names = std::env::vars_os().map(|(name, _)| name);
    for name in
        names.filter(|name| name.to_str().is_some_and(|name| OF_CARGO.iter().any(|it| name.starts_with(it))))
    {
        command.env_remove(name);
    }
    command.current_dir(root());
    command
}

/// A command line as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy();
    let mut text = program.into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Runs a command on this terminal.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    let text = shown(command);
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => broken(format!("`{text}` ended with {status}")),
        Err(error) => broken(format!("`{text}` cannot be run: {error}")),
    }
}

/// Runs a command and returns what it printed; what it complains about is shown.
pub(crate) fn output(command: &mut Command) -> Result<String, Failure> {
    let text = shown(command);
    match command.stderr(Stdio::inherit()).output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => broken(format!("`{text}` ended with {}", output.status)),
        Err(error) => broken(format!("`{text}` cannot be run: {error}")),
    }
}

/// Runs a command, hands every line it prints to `line`, and says whether it succeeded.
pub(crate) fn lines(command: &mut Command, mut line: impl FnMut(&str)) -> Result<bool, Failure> {
    let text = shown(command);
    let mut child = match command.stdout(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(error) => return broken(format!("`{text}` cannot be run: {error}")),
    };
    if let Some(stdout) = child.stdout.take() {
        for part in BufReader::new(stdout).split(b'\n') {
            match part {
                Ok(bytes) => line(&String::from_utf8_lossy(&bytes)),
                Err(error) => return broken(format!("`{text}`: its output cannot be read: {error}")),
            }
        }
    }
    match child.wait() {
        Ok(status) => Ok(status.success()),
        Err(error) => broken(format!("`{text}`: {error}")),
    }
}
