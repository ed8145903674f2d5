//! One run of a guest: a machine that qemu emulates, from its kernel's start to what it brings back.
//!
//! ```text
//! first serial line  -> what the command prints, here as it comes
//! second serial line -> what the kernel says, in `kernel.log`; shown where the guest fails
//! disk               <- an archive with the command's exit code and its files
//! ```
//!
//! A guest that panics restarts, which ends qemu; one that hangs is ended from here. Neither has
//! written the archive, and that is how a failure is told from an end.

use std::fs::{self, File};
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::contents::Contents;
use super::kernel::Kernel;
use crate::build;
use crate::process::{Failure, broken, run};
use crate::setup;

/// What a guest is allowed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Memory in MiB, its file system included.
    pub(crate) memory: u32,
    /// Longest time for all.
    pub(crate) time: Duration,
    /// Longest time without a sign of life.
    pub(crate) silence: Duration,
    /// Whether it has an interface, through which it reaches this machine's loopback at [`HOST`].
    pub(crate) network: bool,
}

/// This machine's loopback, as a guest with a network sees it.
pub(crate) const HOST: &str = "10.0.2.2";
/// What the guest sets up for that: qemu itself is the other end.
pub(crate) const NETWORK: &str =
    "modprobe virtio_net\nip link set eth0 up\nip address add 10.0.2.15/24 dev eth0\n";

/// Takes what a guest prints, in pieces as they come.
pub(crate) type Text<'a> = dyn FnMut(&[u8]) + 'a;

/// Kernel messages that are shown where a guest fails.
const LAST_LINES: usize = 60;
/// For the files that come back; the file behind it is no larger than what is in it.
const DISK: u64 = 512 << 20;

/// Every core that is emulated is a thread; never KVM, which may hang where this machine is a guest itself.
/// A panic restarts at once, and a restart ends.
const MACHINE: &[&str] = &[
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-machine",
    "pc",
    "-accel",
    "tcg,thread=multi",
    "-cpu",
    "max,la57=off",
    "-smp",
    "2",
    "-display",
    "none",
];

const KERNEL_LINE: &str = "console=ttyS1 panic=-1 oops=panic mitigations=off random.trust_cpu=on";

/// Runs a command with the file system that was made for it. What it prints goes to `text`, or, where there
/// is none, to this terminal, which is its own then. Returns its exit code; its files and the kernel's log
/// are in the directory of [`results`].
pub(crate) fn boot(
    kernel: &Kernel,
    contents: Contents,
    limits: Limits,
    text: Option<&mut Text<'_>>,
) -> Result<i32, Failure> {
    let place = Place::new()?;
    let (archive, disk) = (place.directory.join("initramfs"), place.directory.join("disk"));
    contents.write(&archive)?;
    if let Err(error) = File::create(&disk).and_then(|file| file.set_len(DISK)) {
        return broken(format!("{}: {error}", disk.display()));
    }
    let log = place.directory.join("kernel.log");
    let shell = if text.is_none() { " lockstep.shell" } else { "" };
    // However this process ends, the machine ends with it.
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]).args(MACHINE);
    qemu.args(["-m", &limits.memory.to_string()]);
    if limits.network {
        qemu.args(["-netdev", "user,id=host", "-device", "virtio-net-pci,netdev=host,romfile="]);
    } else {
        qemu.args(["-net", "none"]);
    }
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&archive);
    qemu.arg("-append").arg(format!("{KERNEL_LINE}{shell}"));
    let signals = if text.is_none() { "mux=on,signal=off" } else { "signal=on" };
    qemu.args(["-chardev", &format!("stdio,id=terminal,{signals}"), "-serial", "chardev:terminal"]);
    if text.is_none() {
        qemu.args(["-mon", "chardev=terminal"]);
    }
    qemu.arg("-serial").arg(format!("file:{}", log.display()));
    qemu.arg("-drive").arg(format!("file={},format=raw,if=virtio,cache=unsafe", disk.display()));
    let ended = match text {
        Some(text) => watched(&mut qemu, limits, text),
        None => run(&mut qemu),
    };
    let outcome = ended.and_then(|()| place.bring_back(&disk));
    if outcome.is_err() {
        let said = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = said.lines().collect();
        eprintln!("the guest's kernel said at last:");
        for line in &lines[lines.len().saturating_sub(LAST_LINES)..] {
            eprintln!("  {line}");
        }
    }
    // Beside the files, also where there are none.
    let _ = fs::rename(&log, results().with_file_name("kernel.log"));
    outcome
}

/// Where the files of this run are; they are gone when its guest is.
pub(crate) fn files() -> PathBuf {
    build::target().join(format!("vm/run-{}", std::process::id()))
}

/// Where the files of the last guest are.
pub(crate) fn results() -> PathBuf {
    build::target().join("vm/results")
}

/// Runs qemu until it ends or may not go on.
fn watched(qemu: &mut Command, limits: Limits, text: &mut Text<'_>) -> Result<(), Failure> {
    let start = Instant::now();
    let mut child = match qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(error) => return broken(format!("qemu cannot be run: {error}")),
    };
    let verdict = match child.stdout.take() {
        Some(stdout) => watch(&chunks(stdout), start, limits, text),
        None => broken("qemu has no output"),
    };
    if verdict.is_err() {
        // It may have ended meanwhile.
        let _ = child.kill();
    }
    verdict.and(ended(&mut child))
}

fn watch(
    chunks: &Receiver<Vec<u8>>,
    start: Instant,
    limits: Limits,
    text: &mut Text<'_>,
) -> Result<(), Failure> {
    loop {
        let left = limits.time.saturating_sub(start.elapsed());
        match chunks.recv_timeout(left.min(limits.silence)) {
            Ok(chunk) => text(&chunk),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) if left <= limits.silence => {
                return broken(format!("the guest was not done within {} s", limits.time.as_secs()));
            }
            Err(RecvTimeoutError::Timeout) => {
                return broken(format!(
                    "the guest hangs: nothing from it for {} s",
                    limits.silence.as_secs()
                ));
            }
        }
    }
}

/// Output as it comes, whole lines or not.
fn chunks(mut from: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (to, received) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length) = from.read(&mut buffer) {
            if length == 0 || to.send(buffer[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    received
}

fn ended(child: &mut Child) -> Result<(), Failure> {
    match child.wait() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => broken(format!("qemu ended with {status}")),
        Err(error) => broken(format!("qemu: {error}")),
    }
}

/// Files of one run. The large ones go with the value.
#[derive(Debug)]
struct Place {
    directory: PathBuf,
}

impl Place {
    fn new() -> Result<Self, Failure> {
        remove_abandoned(&build::target().join("vm"));
        let directory = files();
        setup::create(&directory)?;
        Ok(Self { directory })
    }

    /// The exit code on the disk, and the files, which come in the place of those of before.
    fn bring_back(&self, disk: &Path) -> Result<i32, Failure> {
        let back = self.directory.join("back");
        setup::create(&back)?;
        // A disk that nothing was written to is an archive of nothing.
        run(Command::new("tar").arg("-x").arg("-f").arg(disk).arg("-C").arg(&back))?;
        let status = fs::read_to_string(back.join("exit")).unwrap_or_default();
        let Ok(status) = status.trim().parse() else {
            return broken("the guest ended before its command did: a panic, or out of memory");
        };
        let results = results();
        let _ = fs::remove_dir_all(&results);
        match fs::rename(back.join("files"), &results) {
            Ok(()) => Ok(status),
            Err(error) => broken(format!("{}: {error}", results.display())),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Removes what runs left that were killed.
fn remove_abandoned(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(process) = name.strip_prefix("run-") else { continue };
        if !Path::new("/proc").join(process).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Output to this terminal, at once.
pub(crate) fn show(chunk: &[u8]) {
    let mut out = std::io::stdout();
    // A terminal that is gone ends the program by a signal, or is nobody's loss.
    let _ = out.write_all(chunk);
    let _ = out.flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limits: Limits) -> (Result<(), Failure>, String) {
        let mut said = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let verdict = watched(&mut command, limits, &mut |chunk| said.extend_from_slice(chunk));
        (verdict, String::from_utf8(said).unwrap())
    }

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(300);

    fn limits(time: Duration, silence: Duration) -> Limits {
        Limits { memory: 0, time, silence, network: false }
    }

    #[test]
    fn what_is_said_comes_through() {
        let (verdict, said) = shell("echo one; echo two", limits(LONG, LONG));
        assert!(verdict.is_ok());
        assert_eq!(said, "one\ntwo\n");
    }

    #[test]
    fn silence_is_a_hang_and_is_ended() {
        let start = Instant::now();
        let (verdict, said) = shell("echo one; exec sleep 50", limits(LONG, SHORT));
        assert!(verdict.unwrap_err().to_string().contains("hangs"));
        assert_eq!(said, "one\n");
        assert!(start.elapsed() < LONG / 2);
    }

    #[test]
    fn whoever_goes_on_talking_is_ended_too() {
        let script = "while :; do echo x; sleep 0.05; done";
        let (verdict, _) = shell(script, limits(SHORT, LONG));
        assert!(verdict.unwrap_err().to_string().contains("not done"));
    }
}
