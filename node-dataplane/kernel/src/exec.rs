//! Running a program: input on stdin, both outputs captured, a deadline that kills it.

use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// What a program left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit status; `None` where a signal ended it.
    pub status: Option<i32>,
    /// Everything it wrote to stdout.
    pub stdout: Vec<u8>,
    /// Everything it wrote to stderr.
    pub stderr: Vec<u8>,
}

/// A program that could not be run to its end. What it did before is unknown on `TimedOut` and `Io`.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// There is no such program.
    #[error("{program}: not installed")]
    NotFound {
        /// As it was called.
        program: String,
    },
    /// It did not end in time and was killed.
    #[error("{program}: killed, because it did not end within {limit:?}")]
    TimedOut {
        /// As it was called.
        program: String,
        /// The deadline.
        limit: Duration,
    },
    /// Starting it or talking to it failed.
    #[error("{program}: {source}")]
    Io {
        /// As it was called.
        program: String,
        /// The cause.
        source: io::Error,
    },
}

/// Runs programs. The seam for fakes: one models the tables behind `iptables-restore`.
pub trait Run: Send + Sync {
    /// Runs `program` with `arguments`, feeds it `stdin`, waits for its end, at most `limit`.
    /// A non-zero exit status is an [`Output`], not an error.
    fn run(
        &self,
        program: &str,
        arguments: &[&str],
        stdin: &[u8],
        limit: Duration,
    ) -> Result<Output, ExecError>;
}

/// The real thing: a child process in the network namespace of the calling thread, in a
/// process group of its own, so that the deadline also ends what it started.
#[derive(Debug, Clone, Copy, Default)]
pub struct Processes;

impl Run for Processes {
    fn run(
        &self,
        program: &str,
        arguments: &[&str],
        stdin: &[u8],
        limit: Duration,
    ) -> Result<Output, ExecError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => ExecError::NotFound { program: program.to_owned() },
            _ => ExecError::Io { program: program.to_owned(), source },
        };
        let mut child = Command::new(program)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let captured = converse(&mut child, stdin, limit);
        if captured.is_none() {
            kill_group(&child);
        }
        let status = child.wait().map_err(failed)?;
        let Some(captured) = captured else {
            return Err(ExecError::TimedOut { program: program.to_owned(), limit });
        };
        let (stdout, stderr) = captured.map_err(failed)?;
        debug_assert!(status.code().is_some() || status.signal().is_some());
        Ok(Output { status: status.code(), stdout, stderr })
    }
}

type Captured = io::Result<(Vec<u8>, Vec<u8>)>;

/// Feeds and drains the child. `None` = the deadline passed first.
fn converse(child: &mut Child, input: &[u8], limit: Duration) -> Option<Captured> {
    let (mut stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let pid = child.id();
    std::thread::scope(|scope| {
        let (done, ended) = mpsc::channel();
        // A child that ends without reading its input is no fault of the transport.
        scope.spawn(move || stdin.as_mut().map(|pipe| pipe.write_all(input)));
        let errors = scope.spawn(move || drain(stderr));
        let outputs = {
            let done = done.clone();
            scope.spawn(move || {
                let output = drain(stdout);
                let errors = errors.join().unwrap_or_else(|_| Err(io::Error::other("reader panicked")));
                let _ = done.send(());
                Ok((output?, errors?))
            })
        };
        drop(done);
        let in_time = ended.recv_timeout(limit).is_ok();
        if !in_time {
            kill_pid(pid); // closes the pipes, which ends the readers
        }
        let captured = outputs.join().unwrap_or_else(|_| Err(io::Error::other("reader panicked")));
        in_time.then_some(captured)
    })
}

fn drain(pipe: Option<impl Read>) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    if let Some(mut pipe) = pipe {
        pipe.read_to_end(&mut all)?;
    }
    Ok(all)
}

fn kill_group(child: &Child) {
    kill_pid(child.id());
}

fn kill_pid(pid: u32) {
    let Ok(pid) = i32::try_from(pid) else { return };
    // SAFETY: kill takes plain numbers. The child has not been waited for, so its number, which
    // is also that of its process group, cannot belong to anybody else.
    unsafe { libc::kill(-pid, libc::SIGKILL) };
}

impl Output {
    /// True where the program said that it succeeded.
    pub fn success(&self) -> bool {
        self.status == Some(0)
    }

    /// What it wrote to stderr, trimmed.
    pub fn complaint(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }
}

/// Has the kernel kill the program (SIGKILL) when the **thread** that starts it ends, and so also
/// however its process ends. Start it from a thread that lives for as long as the program may.
///
/// Does not hold for programs with set-user-ID or file capabilities, nor for what the program starts.
pub fn die_with_thread(command: &mut Command) -> &mut Command {
    let parent = std::process::id();
    let prepare = move || {
        // SAFETY: prctl(PR_SET_PDEATHSIG) takes plain numbers and concerns the calling process only.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: getppid takes nothing and cannot fail.
        if u32::try_from(unsafe { libc::getppid() }) != Ok(parent) {
            // It ended before the kernel was asked, and nobody would send the signal.
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: between fork and exec `prepare` makes two system calls and allocates nothing: an
    // `io::Error` of an errno is plain numbers.
    unsafe { command.pre_exec(prepare) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn input_outputs_and_status() {
        let input = vec![b'x'; 1 << 20]; // more than a pipe holds
        let output = Processes.run("sh", &["-c", "cat; echo fault >&2; exit 3"], &input, LIMIT).unwrap();
        assert_eq!(output.status, Some(3));
        assert_eq!(output.stdout.len(), input.len());
        assert_eq!(output.complaint(), "fault");
    }

    #[test]
    fn a_child_that_reads_nothing_is_no_error() {
        let output = Processes.run("true", &[], &vec![0; 1 << 20], LIMIT).unwrap();
        assert!(output.success());
    }

    #[test]
    fn the_deadline_also_ends_grandchildren() {
        let started = Instant::now();
        let error =
            Processes.run("sh", &["-c", "sleep 100 & wait"], b"", Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, ExecError::TimedOut { .. }), "{error}");
        assert!(started.elapsed() < LIMIT);
    }

    #[test]
    fn a_program_dies_with_the_thread_that_started_it() {
        let started = Instant::now();
        let start = || die_with_thread(Command::new("sleep").arg("100")).spawn().unwrap();
        let mut child = std::thread::scope(|scope| scope.spawn(start).join().unwrap());
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert!(started.elapsed() < LIMIT);
    }

    #[test]
    fn a_missing_program_is_told_apart() {
        let error = Processes.run("lockstep-no-such-program", &[], b"", LIMIT).unwrap_err();
        assert_eq!(error.to_string(), "lockstep-no-such-program: not installed");
    }
}
