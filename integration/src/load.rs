//! Steady load: new connections at a fixed rate from many places at once, each of them judged.
//!
//! A stream that falls behind does not skip a connection, so the count is what was asked for.
//! A lost SYN is sent again by the client's kernel and then looks like a slow answer; therefore
//! the kernel's own count of those is part of the report.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lockstep_kernel::netns;

use crate::lab::{Lab, Place};
use crate::product::{PATIENCE, wait_until};
use crate::traffic::{Outcome, Transport, connect};

/// Who connects to what, and what must become of it.
#[derive(Debug, Clone)]
pub struct Stream {
    /// The client.
    pub from: Place,
    /// Where it connects to.
    pub to: SocketAddr,
    /// TCP or UDP.
    pub transport: Transport,
    /// Only these may answer.
    pub may_answer: BTreeSet<Place>,
    /// Whose address they must see.
    pub seen_as: Place,
}

/// A connection that was answered.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// When it was begun.
    pub begun: Instant,
    /// How long the whole of it took.
    pub took: Duration,
    /// By whom.
    pub by: Place,
}

/// What became of all connections.
#[derive(Debug, Default)]
pub struct Report {
    /// Those that were answered, misdelivered ones among them.
    pub answers: Vec<Answer>,
    /// Those that failed or went to the wrong pod, in words.
    pub faults: Vec<String>,
    /// SYNs that the clients' kernels had to send again.
    pub syns_sent_again: u64,
}

/// Streams that run until they are told to end.
#[derive(Debug)]
pub struct Load {
    begun: Instant,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<Report>>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    /// Connections made so far, by stream.
    made: Vec<AtomicUsize>,
}

impl Load {
    /// Starts the streams: together they make `per_second` connections.
    pub fn start(lab: &Lab, streams: Vec<Stream>, per_second: u32) -> Self {
        let made = streams.iter().map(|_| AtomicUsize::new(0)).collect();
        let shared = Arc::new(Shared { stop: AtomicBool::new(false), made });
        let begun = Instant::now();
        let interval = Duration::from_secs(1) * u32::try_from(streams.len()).unwrap_or(1) / per_second;
        let threads = streams
            .into_iter()
            .enumerate()
            .map(|(index, stream)| {
                let (namespace, shared) = (lab.namespace(stream.from), Arc::clone(&shared));
                thread::spawn(move || {
                    netns::run_in(&namespace, || run(&stream, index, &shared, begun, interval))?
                })
            })
            .collect();
        Self { begun, shared, threads }
    }

    /// Lets every stream make so many more connections.
    pub fn go_on(&self, connections: usize) -> Result<()> {
        let goal: Vec<usize> =
            self.shared.made.iter().map(|made| made.load(Ordering::Relaxed) + connections).collect();
        wait_until("the load goes on", PATIENCE, || {
            let reached =
                self.shared.made.iter().zip(&goal).all(|(made, goal)| made.load(Ordering::Relaxed) >= *goal);
            Ok(reached.then_some(()))
        })
    }

    /// Ends the streams. Also returns how many connections a second there were.
    pub fn finish(mut self) -> Result<(Report, f64)> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut total = Report::default();
        for thread in self.threads.drain(..) {
            let report = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            total.answers.extend(report.answers);
            total.faults.extend(report.faults);
            total.syns_sent_again += report.syns_sent_again;
        }
        let count = total.answers.len() + total.faults.len();
        let rate = f64::from(u32::try_from(count)?) / self.begun.elapsed().as_secs_f64();
        total.answers.sort_by_key(|answer| answer.begun);
        Ok((total, rate))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Report {
    /// Fails where a connection failed, went to the wrong pod, or had to knock twice.
    pub fn ensure_perfect(&self) -> Result<()> {
        let first: Vec<&str> = self.faults.iter().take(10).map(String::as_str).collect();
        ensure!(
            self.faults.is_empty(),
            "{} of {} connections failed or were misdelivered:\n{}",
            self.faults.len(),
            self.answers.len() + self.faults.len(),
            first.join("\n")
        );
        ensure!(self.syns_sent_again == 0, "{} SYNs were lost and sent again", self.syns_sent_again);
        Ok(())
    }
}

fn run(stream: &Stream, index: usize, shared: &Shared, begun: Instant, interval: Duration) -> Result<Report> {
    let mut report = Report::default();
    let again_before = syns_sent_again()?;
    let mut due = begun;
    while !shared.stop.load(Ordering::Relaxed) {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        due += interval;
        let start = Instant::now();
        let outcome = connect(stream.transport, stream.to);
        if let Some(fault) = stream.fault(&outcome) {
            report.faults.push(format!("{:.2} s: {fault}", (start - begun).as_secs_f64()));
        } else if let Outcome::Answered { by, .. } = outcome {
            report.answers.push(Answer { begun: start, took: start.elapsed(), by });
        }
        shared.made[index].fetch_add(1, Ordering::Relaxed);
    }
    report.syns_sent_again = syns_sent_again()? - again_before;
    Ok(report)
}

impl Stream {
    fn fault(&self, outcome: &Outcome) -> Option<String> {
        let what = match outcome {
            Outcome::Answered { by, .. } if !self.may_answer.contains(by) => outcome.to_string(),
            Outcome::Answered { source, .. } if !self.seen_as.owns(*source) => {
                format!("{outcome}, which is not an address of {}", self.seen_as)
            }
            Outcome::Answered { .. } => return None,
            other => other.to_string(),
        };
        Some(format!("{} -> {} {:?}: {what}", self.from, self.to, self.transport))
    }
}

/// SYNs and SYN-ACKs that the namespace of this thread sent more than once.
pub fn syns_sent_again() -> Result<u64> {
    // `/proc/net` is that of the process's first thread, which stays where it was.
    let path = "/proc/thread-self/net/netstat";
    let text = std::fs::read_to_string(path).context(path)?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let found = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == "TCPSynRetrans");
    Ok(found.with_context(|| format!("{path} has no TCPSynRetrans"))?.1.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        Stream {
            from: Place::Outside,
            to: "10.96.0.10:80".parse().unwrap(),
            transport: Transport::Tcp,
            may_answer: [Place::Pod(1, 1)].into(),
            seen_as: Place::Node(1),
        }
    }

    #[test]
    fn a_wrong_pod_a_wrong_source_and_no_answer_are_faults() {
        let answered = |by, source: [u8; 4]| Outcome::Answered { by, source: source.into() };
        assert_eq!(stream().fault(&answered(Place::Pod(1, 1), [10, 200, 0, 11])), None);
        assert!(stream().fault(&answered(Place::Pod(2, 1), [10, 200, 0, 11])).is_some());
        assert!(stream().fault(&answered(Place::Pod(1, 1), [10, 200, 0, 100])).is_some());
        assert!(stream().fault(&Outcome::Refused).is_some());
        assert!(stream().fault(&Outcome::Timeout).is_some());
    }

    #[test]
    fn a_report_with_a_fault_or_a_lost_syn_is_not_perfect() {
        assert!(Report::default().ensure_perfect().is_ok());
        assert!(Report { faults: vec!["x".to_owned()], ..Report::default() }.ensure_perfect().is_err());
        assert!(Report { syns_sent_again: 1, ..Report::default() }.ensure_perfect().is_err());
    }

    #[test]
    fn the_kernel_counts_syns() {
        assert!(syns_sent_again().is_ok());
    }
}
