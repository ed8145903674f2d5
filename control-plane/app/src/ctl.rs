//! `lockstepctl`, also as `kubectl lockstep`.
//!
//! ```text
//! command line ──> args ──> commands: calls of StatusService ──> view: plain structs ──> text | JSON | YAML
//!                       └──> explain: state and settings ──> the node's plan ────┘
//! ```

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use tonic::{Code, Status};

mod args;
mod client;
mod commands;
mod explain;
mod output;
#[cfg(test)]
mod tests;
mod view;

use args::Args;
use output::one_line;

/// Why a command did not succeed, and its exit code.
#[derive(Debug)]
pub(crate) enum Failure {
    /// 1: no connection, the server refused, the output could not be written.
    Error(anyhow::Error),
    /// 2: options that do not go together.
    Usage(String),
    /// 3: there is no such Service or node.
    NotFound(String),
    /// 4: a wait ended before every node was done; what was missing is written already.
    TimedOut,
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Failure::Error(_) => 1,
            Failure::Usage(_) => 2,
            Failure::NotFound(_) => 3,
            Failure::TimedOut => 4,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Failure::Error(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::Error(anyhow::Error::new(error).context("writing the output"))
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        match status.code() {
            Code::NotFound => Failure::NotFound(status.message().into()),
            // Nothing that the server said: the connection is gone. In TLS 1.3 a client is done
            // before the server has seen its certificate, so this may be all there is to know.
            _ if std::error::Error::source(&status).is_some() => Failure::Error(anyhow::anyhow!(
                "the connection ended: {}; a server that wants a client certificate, and gets none that it \
                 trusts, ends connections like this: are --cert and --key right?",
                client::chain(&status)
            )),
            code => Failure::Error(anyhow::anyhow!("the server says {code:?}: {}", status.message())),
        }
    }
}

/// The program, under the name it is called by. Exit codes are in `--help`.
pub fn main(name: &'static str) -> ExitCode {
    let matches = match Args::command().name(name).bin_name(name).try_get_matches() {
        Ok(matches) => matches,
        Err(error) => {
            // Help and version go to stdout and are no error.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let args = match Args::from_arg_matches(&matches) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(2);
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::from(error)),
    };
    match runtime.block_on(commands::run(args, &mut std::io::stdout())) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output (`| head`) has enough.
        Err(Failure::Error(error)) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn report(failure: &Failure) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {}", message(failure));
    ExitCode::from(failure.code())
}

/// For people. Some of it comes from the server and from nodes.
fn message(failure: &Failure) -> String {
    match failure {
        Failure::Error(error) => one_line(&format!("{error:#}")),
        Failure::Usage(text) => format!("{}\n\nFor more information, try '--help'.", one_line(text)),
        Failure::NotFound(text) => one_line(text),
        Failure::TimedOut => "timed out".into(),
    }
}
