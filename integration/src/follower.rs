//! A node without a kernel: the product's own client, which holds the state it is sent and says
//! that it has verified it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use lockstep_client::transport::{self, Event, Outbox, Security, Servers};
use lockstep_client::{Change, Held, Identity, Now, Position, Report, Session, Step};
use lockstep_model::Digest;
use lockstep_wire::{raw, v1};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Follows a control plane until it is dropped.
#[derive(Debug)]
pub struct Follower {
    name: String,
    seen: watch::Receiver<Seen>,
    tasks: [JoinHandle<()>; 2],
}

/// What a follower has come to.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Keys of what it holds, as text.
    pub keys: BTreeSet<String>,
    /// Digest of what it holds.
    pub digest: Option<Digest>,
    /// Where in history that is.
    pub position: Option<Position>,
    /// How each connection began.
    pub resumed: Vec<v1::ResumeMode>,
    /// Every key that was ever taken away.
    pub removed: Vec<String>,
    /// Why connections that had been made ended.
    pub lost: Vec<String>,
    /// A connection is up, and its server has confirmed the state.
    pub confirmed: bool,
}

impl Follower {
    /// Starts to follow one of these servers.
    pub fn start(name: &str, urls: &[String], security: &Security) -> Result<Self> {
        let servers = Servers::new(urls, security)?;
        let (events, incoming) = mpsc::channel::<Event>(64);
        let (out, seen) = watch::channel(Seen::default());
        let node = name.to_owned();
        let dial = tokio::spawn(async move { transport::run(servers, &node, events).await });
        let follow = tokio::spawn(follow(Session::new(identity(name), None::<Held>), incoming, out));
        Ok(Self { name: name.to_owned(), seen, tasks: [dial, follow] })
    }

    /// What it has come to.
    pub fn seen(&self) -> Seen {
        self.seen.borrow().clone()
    }

    /// Waits until it has come to what is asked for; panics with what it has come to where that
    /// does not happen in time.
    pub async fn until(&mut self, what: &str, patience: Duration, done: impl Fn(&Seen) -> bool) -> Seen {
        let waited = tokio::time::timeout(patience, self.seen.wait_for(|seen| done(seen))).await;
        if let Ok(Ok(seen)) = waited.map(|changed| changed.map(|seen| seen.clone())) {
            return seen;
        }
        panic!("{}: never happened: {what}\n{:#?}", self.name, self.seen());
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn identity(name: &str) -> Identity {
    Identity {
        node_name: name.into(),
        instance_id: format!("{name}-{:016x}", fastrand::u64(..)),
        started: std::time::SystemTime::now(),
        boot_id: String::new(),
        agent_version: "follower".into(),
        backend: v1::Backend { kind: v1::BackendKind::External.into(), ..Default::default() },
        features: vec![
            v1::Feature::Sctp,
            v1::Feature::SessionAffinity,
            v1::Feature::LbProxyMode,
            v1::Feature::SourceRanges,
        ],
        settings: None,
        kernel_adopted: false,
    }
}

async fn follow(mut session: Session, mut events: mpsc::Receiver<Event>, out: watch::Sender<Seen>) {
    let mut outbox: Option<Outbox> = None;
    let mut report = Report::default();
    while let Some(event) = events.recv().await {
        match event {
            Event::Connected(new) => {
                // A connection that does not take Hello is lost, which is told.
                let _ = new.send(session.connected(Now::read()));
                outbox = Some(new);
            }
            Event::Frame(frame) => {
                if let Some(raw::sync_response::Kind::Welcome(welcome)) = &frame.kind {
                    out.send_modify(|seen| seen.resumed.push(welcome.resume_mode()));
                }
                let step = session.receive(*frame, Now::read());
                take(step, &mut session, &mut outbox, &mut report, &out);
            }
            Event::Lost(why) => {
                session.disconnected();
                outbox = None;
                out.send_modify(|seen| {
                    seen.lost.push(why);
                    seen.confirmed = false;
                });
            }
        }
    }
}

fn take(
    step: Step,
    session: &mut Session,
    outbox: &mut Option<Outbox>,
    report: &mut Report,
    out: &watch::Sender<Seen>,
) {
    let mut requests = Vec::from_iter(step.send);
    if let Some(committed) = step.committed {
        report.applied = Some(committed.position);
        report.verified = Some(committed.position);
        requests.extend(session.report(report));
        out.send_modify(|seen| {
            for change in committed.changes {
                match change {
                    Change::Upsert(_, resource) => {
                        seen.keys.insert(resource.key().to_string());
                    }
                    Change::Remove(key) => {
                        seen.keys.remove(&key.to_string());
                        seen.removed.push(key.to_string());
                    }
                }
            }
            seen.digest = Some(session.state().digest());
            seen.position = session.position();
            seen.confirmed = session.confirmed();
        });
    }
    if let Some(outbox) = outbox {
        // Where the network is slower than this, the next report says the same and more.
        for request in requests {
            let _ = outbox.send(request);
        }
    }
    if step.end.is_some() {
        *outbox = None;
    }
}
