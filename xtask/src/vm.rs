//! A machine of its own for tests: `cargo xtask vm run|shell|test`.
//!
//! ```text
//! kernel: Debian's for clouds, from the cache ─┐
//! contents: this machine's programs, the      ─┼─> boot: qemu without KVM, one command, its exit code
//!   checkout, what was built -> archive       ─┘     └─> target/vm/results, target/vm/kernel.log
//! ```
//!
//! The kernel is an older one than most hosts have and has IPVS, dummy interfaces and SCTP. Nothing
//! of the host's network is in it, but for the API server that kube-proxy needs, and nothing in it needs
//! root outside.

mod apiserver;
mod archive;
mod boot;
mod contents;
mod kernel;
mod parts;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::process::{Failure, broken, root};
use crate::setup;

use apiserver::ApiServer;
use boot::Limits;
use contents::Contents;
pub(crate) use kernel::Kernel;
pub(crate) use parts::{PARTS, STARTED, into, only_here};

/// How much longer everything takes where each instruction is emulated.
const PATIENCE: &str = "4";

/// Memory, time and silence that a guest is allowed where nothing else is said.
const LIMITS: Limits = Limits {
    memory: 2048,
    time: Duration::from_secs(3600),
    silence: Duration::from_secs(600),
    network: false,
};

/// The same where the real kube-proxy runs, and all that it starts.
const WITH_KUBE_PROXY: Limits = Limits { memory: 3072, network: true, ..LIMITS };

/// What comes before a command or parts.
#[derive(Debug)]
struct Options {
    limits: Limits,
    /// Files and directories that go along.
    with: Vec<PathBuf>,
}

/// Runs `vm run`, `vm shell` or `vm test`.
pub(crate) fn main(arguments: &[String]) -> Result<(), Failure> {
    let Some((verb, rest)) = arguments.split_first() else {
        return Err(Failure::Usage("vm run, vm shell or vm test?".to_owned()));
    };
    let (options, rest) = options(rest)?;
    match (verb.as_str(), rest) {
        ("run", []) => Err(Failure::Usage("vm run: which command?".to_owned())),
        ("run", [dashes, command @ ..]) if dashes == "--" => run(&options, command),
        ("run", command) => run(&options, command),
        ("shell", []) => shell(&options),
        ("shell", _) => Err(Failure::Usage("vm shell takes no command; vm run does".to_owned())),
        ("test", parts) => parts::test(&options, parts),
        (unknown, _) => Err(Failure::Usage(format!("unknown verb `vm {unknown}`"))),
    }
}

fn options(mut arguments: &[String]) -> Result<(Options, &[String]), Failure> {
    let mut options = Options { limits: LIMITS, with: Vec::new() };
    loop {
        let (name, value, rest) = match arguments {
            [] => return Ok((options, arguments)),
            [name, ..] if !name.starts_with("--") || name == "--" => return Ok((options, arguments)),
            [name, value, rest @ ..] => (name, value, rest),
            [name] => return Err(Failure::Usage(format!("{name}: no value"))),
        };
        let number = || match value.parse::<u32>() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(Failure::Usage(format!("{name} {value}: not a number"))),
        };
        match name.as_str() {
            "--memory" => options.limits.memory = number()?,
            "--time" => options.limits.time = Duration::from_secs(number()?.into()),
            "--silence" => options.limits.silence = Duration::from_secs(number()?.into()),
            "--with" => options.with.push(PathBuf::from(value)),
            unknown => return Err(Failure::Usage(format!("unknown option {unknown}"))),
        }
        arguments = rest;
    }
}

/// A file system with what every guest has, and what was asked for.
fn prepare(kernel: &Kernel, with: &[PathBuf]) -> Result<Contents, Failure> {
    let mut contents = Contents::new(kernel)?;
    for path in with {
        contents.add(&absolute(path)?)?;
    }
    contents.add_text(Path::new("/init"), include_str!("vm/init.sh").to_owned());
    Ok(contents)
}

/// Runs a command in the directory of the caller. Files that it names go along.
fn run(options: &Options, command: &[String]) -> Result<(), Failure> {
    setup::guest_packages()?;
    let kernel = Kernel::get()?;
    let mut contents = prepare(&kernel, &options.with)?;
    let server = if options.limits.network {
        Some(ApiServer::start(Path::new(&command[0]), &mut contents)?)
    } else {
        None
    };
    let before = server.as_ref().map(ApiServer::environment).unwrap_or_default();
    for word in command.iter().map(Path::new).filter(|word| word.is_file()) {
        contents.add(&absolute(word)?)?;
    }
    let here = std::env::current_dir().unwrap_or_else(|_| root());
    contents.add_directory(&here);
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    let here = quoted(&here.to_string_lossy());
    let script = format!("{}{before}cd {here}\n{}\n", environment(), words.join(" "));
    contents.add_text(Path::new("/command"), script);
    match boot::boot(&kernel, contents, options.limits, Some(&mut boot::show))? {
        0 => Ok(()),
        status => broken(format!("`{}` ended with {status} in the guest", command.join(" "))),
    }
}

/// Runs a program that was built, in the directory of this checkout; those that it starts go along.
pub(crate) fn start(program: &Path, arguments: &[&str], starts: &[PathBuf]) -> Result<(), Failure> {
    let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
    start_in(LIMITS, program, &arguments, starts)
}

/// The same with the real kube-proxy, and an API server beside the guest.
pub(crate) fn start_with_kube_proxy(
    program: &Path,
    arguments: &[String],
    starts: &[PathBuf],
) -> Result<(), Failure> {
    start_in(WITH_KUBE_PROXY, program, arguments, starts)
}

fn start_in(limits: Limits, program: &Path, arguments: &[String], starts: &[PathBuf]) -> Result<(), Failure> {
    let mut command = vec![program.to_string_lossy().into_owned()];
    command.extend_from_slice(arguments);
    run(&Options { limits, with: starts.to_vec() }, &command)
}

fn shell(options: &Options) -> Result<(), Failure> {
    setup::guest_packages()?;
    let kernel = Kernel::get()?;
    let mut contents = prepare(&kernel, &options.with)?;
    let terminal = std::env::var("TERM").unwrap_or_else(|_| "dumb".to_owned());
    let script = format!(
        "{}export TERM={}\ncd {}\necho 'exit ends the guest; Ctrl-a x ends it at once'\nexec bash\n",
        environment(),
        quoted(&terminal),
        quoted(&root().to_string_lossy())
    );
    contents.add_text(Path::new("/command"), script);
    boot::boot(&kernel, contents, options.limits, None).map(drop)
}

/// What the caller has set for tests, and how patient they are to be.
fn environment() -> String {
    let mut text = format!("export LOCKSTEP_PATIENCE={PATIENCE}\n");
    for (name, value) in std::env::vars_os() {
        let (name, value) = (name.to_string_lossy(), value.to_string_lossy());
        if ["LOCKSTEP_", "RUST_"].iter().any(|begin| name.starts_with(begin)) {
            text.push_str(&format!("export {name}={}\n", quoted(&value)));
        }
    }
    text
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    match std::path::absolute(path) {
        Ok(path) => Ok(path),
        Err(error) => broken(format!("{}: {error}", path.display())),
    }
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
