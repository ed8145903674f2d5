//! Nothing stays behind, however this process ends: programs die with it, directories are removed.
//!
//! ```text
//! any thread ──command──> starter: one thread, lives as long as the process ──> program
//!                                  (the kernel kills it when the starter ends)
//! Directory ──pipe──> a shell that waits for its end, also after kill -9, and removes the files
//! ```
//!
//! What runs in a [`Lab`](crate::lab::Lab) is also ended, with its namespaces, by the lab's own shell.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use anyhow::{Context, Result};
use lockstep_kernel::exec;
use tempfile::TempDir;

/// A command, and where its child is wanted.
type Job = (Command, Sender<io::Result<Child>>);

/// Starts a program that the kernel kills when this process ends.
///
/// The kernel ties that to the thread that starts it, and tests start programs from threads that
/// are gone long before: so one thread starts them all. It is in the namespace of the process:
/// a caller that has entered another one gets an error, not a program in the wrong place.
pub fn spawn(command: Command) -> io::Result<Child> {
    static STARTER: LazyLock<Sender<Job>> = LazyLock::new(|| {
        let (jobs, queue) = channel::<Job>();
        let start = move || {
            for (mut command, reply) in queue {
                // Whoever asked waits for it.
                let _ = reply.send(exec::die_with_thread(&mut command).spawn());
            }
        };
        // Without the thread, the queue is gone, which every caller gets to know.
        let _ = thread::Builder::new().name("starter".to_owned()).spawn(start);
        jobs
    });
    let (mine, usual) = (fs::read_link("/proc/thread-self/ns/net")?, fs::read_link("/proc/self/ns/net")?);
    if mine != usual {
        return Err(io::Error::other("the calling thread is in a network namespace of its own"));
    }
    let gone = || io::Error::other("the thread that starts programs is gone");
    let (reply, child) = channel();
    STARTER.send((command, reply)).map_err(|_| gone())?;
    child.recv().map_err(|_| gone())?
}

/// Programs that die a moment after the shell learns of it may still write.
const REMOVE: &str = r#"
trap '' INT TERM HUP QUIT
cat >/dev/null
for attempt in 1 2 3 4 5; do
    rm -rf "$1" 2>/dev/null && exit
    sleep 1
done
"#;

/// A new directory for temporary files, removed with the value.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    companion: Child,
    // Its end is what the companion waits for.
    alive: Option<ChildStdin>,
}

impl Directory {
    /// Makes one whose name begins so.
    pub fn new(prefix: &str) -> Result<Self> {
        let made = tempfile::Builder::new().prefix(prefix).tempdir()?;
        let mut companion = Command::new("sh")
            .args(["-c", REMOVE, "sh"])
            .arg(made.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("start the shell that cleans up")?;
        let alive = companion.stdin.take();
        Ok(Self { path: TempDir::keep(made), companion, alive })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        drop(self.alive.take());
        // Nothing to be done about a shell that cannot be waited for.
        let _ = self.companion.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::process::ExitStatusExt as _;
    use std::time::Instant;

    use lockstep_kernel::netns;

    use super::*;
    use crate::product::{PATIENCE, wait_until};

    /// Set for the process that the test below kills.
    const VICTIM: &str = "LOCKSTEP_TEST_VICTIM";
    /// Before the name of its directory.
    const SAYS: &str = "victim: ";

    #[test]
    fn a_program_outlives_the_thread_that_asked_for_it() {
        let mut command = Command::new("cat");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let asked = thread::spawn(|| spawn(command)).join().unwrap();
        let mut child = asked.unwrap();
        child.stdin.take().unwrap().write_all(b"still here").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), &*output.stdout), (Some(0), &b"still here"[..]));
    }

    #[test]
    fn a_program_is_not_started_in_the_wrong_place() {
        let error = netns::run_in_new(|| spawn(Command::new("true"))).unwrap().unwrap_err();
        assert!(error.to_string().contains("network namespace"), "{error}");
    }

    #[test]
    fn kill_9_leaves_no_program_and_no_directory() {
        if std::env::var_os(VICTIM).is_some() {
            return be_the_victim();
        }
        let mut victim = Command::new(std::env::current_exe().unwrap());
        let name = "leftovers::tests::kill_9_leaves_no_program_and_no_directory";
        victim.args(["--exact", name, "--nocapture"]).env(VICTIM, "1");
        victim.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut victim = spawn(victim).unwrap();
        let mut said = BufReader::new(victim.stdout.take().unwrap());
        let mut directory = None;
        while directory.is_none() {
            let mut line = String::new();
            assert_ne!(said.read_line(&mut line).unwrap(), 0, "it ended before it said anything");
            directory = line.trim_end().split_once(SAYS).map(|(_, path)| PathBuf::from(path));
        }
        let directory = directory.unwrap();
        assert!(directory.join("file").exists());
        victim.kill().unwrap();
        assert_eq!(victim.wait().unwrap().signal(), Some(9));
        // The victim's program has this pipe too: its end is the program's.
        let begun = Instant::now();
        io::copy(&mut said, &mut io::sink()).unwrap();
        assert!(begun.elapsed() < PATIENCE, "the program ended by itself only");
        wait_until("the directory is removed", PATIENCE, || Ok((!directory.exists()).then_some(()))).unwrap();
    }

    /// Says where its directory is, then stays until it is killed.
    fn be_the_victim() {
        let directory = Directory::new("lockstep-leftovers-").unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        let mut command = Command::new("sleep");
        command.arg("200");
        let mut child = spawn(command).unwrap();
        writeln!(io::stdout(), "{SAYS}{}", directory.path().display()).unwrap();
        child.wait().unwrap();
    }
}
