//! The demo that is interrupted leaves nothing behind. That it runs to its end is a part of
//! `cargo xtask test` by itself. Needs root.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_integration::product::{PATIENCE, wait_until};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// What is printed when namespaces, control plane, agents and rules are all there.
const IN_THE_MIDDLE: &str = "== Traffic along every path";

/// A demo that has come to its middle, in a process group of its own, as at a terminal.
struct Demo {
    child: Child,
    /// Without a reader the demo would end by itself at the next line that it prints.
    _out: BufReader<ChildStdout>,
}

impl Demo {
    fn in_the_middle() -> Result<Self> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_lockstep-demo"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let mut out = BufReader::new(child.stdout.take().context("no output")?);
        let mut line = String::new();
        while !line.starts_with(IN_THE_MIDDLE) {
            line.clear();
            if out.read_line(&mut line)? == 0 {
                bail!("the demo ended before its middle: {}", child.wait()?);
            }
        }
        let demo = Self { child, _out: out };
        ensure!(!demo.leftovers()?.is_empty(), "there would be nothing to leave behind");
        Ok(demo)
    }

    fn pid(&self) -> Result<Pid> {
        Pid::from_raw(i32::try_from(self.child.id())?).context("no process id")
    }

    /// Namespaces, files and processes of this run: all of them have its name.
    fn leftovers(&self) -> Result<Vec<String>> {
        let run = format!("ls-{:x}-", self.child.id());
        let mut found = Vec::new();
        let namespaces = Command::new("ip").args(["netns", "list"]).output()?;
        let namespaces = String::from_utf8(namespaces.stdout)?;
        found.extend(namespaces.lines().filter(|line| line.starts_with(&run)).map(str::to_owned));
        for file in std::env::temp_dir().read_dir()? {
            let path = file?.path();
            if path.to_string_lossy().contains(&run) {
                found.push(path.display().to_string());
            }
        }
        for process in Path::new("/proc").read_dir()? {
            // One that ends meanwhile has no command line any more.
            let line = std::fs::read(process?.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(&run) {
                found.push(line);
            }
        }
        Ok(found)
    }

    fn leaves_nothing(&self) -> Result<()> {
        let mut left = Vec::new();
        wait_until("nothing to be left behind", PATIENCE, || {
            left = self.leftovers()?;
            Ok(left.is_empty().then_some(()))
        })
        .with_context(|| format!("left behind: {left:?}"))
    }
}

#[test]
fn ctrl_c_in_the_middle_leaves_nothing() -> Result<()> {
    let mut demo = Demo::in_the_middle()?;
    kill_process_group(demo.pid()?, Signal::INT)?;
    let ended = demo.child.wait()?;
    ensure!(ended.signal() == Some(2), "it was not interrupted: {ended}");
    demo.leaves_nothing()
}

#[test]
fn kill_9_in_the_middle_leaves_nothing() -> Result<()> {
    let mut demo = Demo::in_the_middle()?;
    kill_process(demo.pid()?, Signal::KILL)?;
    let ended = demo.child.wait()?;
    ensure!(ended.signal() == Some(9), "it was not killed: {ended}");
    demo.leaves_nothing()
}
