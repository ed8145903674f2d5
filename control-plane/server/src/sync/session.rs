//! The server's half of a stream: a cursor that is moved when the transport asks for more.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::{Stream, StreamExt, stream};
use lockstep_store::{Position, Resume, StreamId};
use lockstep_wire::frame::Frame;
use lockstep_wire::v1;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::{Status, Streaming};

use super::inbound;
use crate::Hub;
use crate::frames::{BuildError, Built, Dialect};
use crate::hub::Admission;
use crate::link::{End, Link, Note};

/// One stream.
pub(super) struct Session {
    hub: Arc<Hub>,
    stream: StreamId,
    node: Arc<str>,
    link: Arc<Link>,
    head: watch::Receiver<u64>,
    dialect: Dialect,
    /// What the client holds once it has got what is under way; `None` = unknown.
    cursor: Option<Position>,
    /// A delta was announced and not begun: it is sent where nothing has changed, too, so that
    /// a client which lacks something hears at which position it is.
    owed: bool,
    /// The client held this seq: it is never sent an older state.
    at_least: u64,
    /// The transaction under way: its frames, and how many of them were sent. All that a client
    /// which reads slowly, or not at all, costs: the frames are shared, but kept for it alone
    /// once everybody else is past them.
    sending: Option<(Built, usize)>,
    /// Small messages that are due, each at most once.
    due: VecDeque<v1::sync_response::Kind>,
    heartbeat_at: Instant,
    ended: bool,
    inbound: JoinHandle<()>,
}

impl Session {
    pub(super) fn new(
        hub: Arc<Hub>,
        admission: Admission,
        dialect: Dialect,
        welcome: v1::Welcome,
        inbound: Streaming<v1::SyncRequest>,
    ) -> Self {
        let Admission { stream, node, link, cursor, at_least, resume, .. } = admission;
        let inbound = tokio::spawn(inbound::run(hub.clone(), stream, link.clone(), inbound));
        Self {
            head: hub.head_changes(),
            heartbeat_at: Instant::now() + hub.config.heartbeat,
            due: VecDeque::from([v1::sync_response::Kind::Welcome(welcome)]),
            sending: None,
            ended: false,
            hub,
            stream,
            node,
            link,
            dialect,
            cursor,
            owed: resume == Resume::Delta,
            at_least,
            inbound,
        }
    }

    /// The messages, each made when it is asked for.
    pub(super) fn into_stream(self) -> Pin<Box<dyn Stream<Item = Result<Frame, Status>> + Send>> {
        stream::unfold(self, |mut session| async move {
            let message = session.next().await?;
            Some((message, session))
        })
        .boxed()
    }

    async fn next(&mut self) -> Option<Result<Frame, Status>> {
        if self.ended {
            return None;
        }
        let message = match self.message().await {
            Ok(frame) => frame,
            Err(end) => {
                self.ended = true;
                // The node is gone for everybody else as of now, not when the transport is done.
                self.hub.leave(self.stream, end.why());
                match end {
                    End::Goodbye(goodbye) => response(v1::sync_response::Kind::Goodbye(goodbye)),
                    End::Failed(status) => return Some(Err(status)),
                }
            }
        };
        self.heartbeat_at = Instant::now() + self.hub.config.heartbeat;
        self.hub.counters.messages_sent.inc();
        self.hub.counters.messages_sent_bytes.add(message.bytes().len());
        Some(Ok(message))
    }

    async fn message(&mut self) -> Result<Frame, End> {
        loop {
            if let Some(end) = self.link.take_end() {
                return Err(end);
            }
            if let Some(message) = self.due.pop_front() {
                return Ok(response(message));
            }
            if let Some(frame) = self.next_frame() {
                return Ok(frame);
            }
            // Marked as seen before the store is asked, so that nothing is missed in between.
            self.head.borrow_and_update();
            match self.link.take() {
                Some(Note::End(end)) => return Err(end),
                Some(Note::Context) => self.tell_context(),
                Some(Note::Refetch(what)) => {
                    let built = match self.cursor {
                        Some(cursor) => self.hub.refetch(cursor, what, self.dialect).await,
                        None => self.hub.transaction(None, self.at_least, self.dialect).await,
                    };
                    self.begin(built)?;
                }
                None if self.is_behind() => {
                    let built = self.hub.transaction(self.cursor, self.at_least, self.dialect).await;
                    self.begin(built)?;
                }
                None => self.wait().await,
            }
        }
    }

    fn tell_context(&mut self) {
        let context = self.hub.lock().context(&self.node);
        self.due.push_back(v1::sync_response::Kind::NodeContext(context));
    }

    fn is_behind(&self) -> bool {
        let head = self.hub.lock().store.head().seq;
        self.owed || self.cursor.is_none_or(|cursor| cursor.seq != head)
    }

    fn begin(&mut self, built: Result<Built, BuildError>) -> Result<(), End> {
        let built = built.map_err(|error| End::Failed(Status::internal(error.to_string())))?;
        // Facts that changed with what is sent go before it: a node must not take an address of a
        // Service for its own and hear then that it is another node's.
        if self.link.take_context() {
            self.tell_context();
        }
        self.sending = Some((built, 0));
        self.owed = false;
        Ok(())
    }

    /// The next frame of the transaction under way.
    fn next_frame(&mut self) -> Option<Frame> {
        let (built, sent) = self.sending.as_mut()?;
        let frame = built.frames[*sent].clone();
        *sent += 1;
        if *sent == built.frames.len() {
            let to = built.to;
            self.hub.lock().nodes.sent(self.stream, to.seq);
            self.cursor = Some(to);
            self.at_least = to.seq;
            self.sending = None;
        }
        Some(frame)
    }

    async fn wait(&mut self) {
        tokio::select! {
            () = self.link.changed() => {}
            // The hub outlives its sessions, so the sender is never gone.
            _ = self.head.changed() => {}
            () = tokio::time::sleep_until(self.heartbeat_at) => {
                let heartbeat = self.heartbeat();
                self.due.push_back(v1::sync_response::Kind::Heartbeat(heartbeat));
            }
        }
    }

    fn heartbeat(&self) -> v1::Heartbeat {
        let shared = self.hub.lock();
        v1::Heartbeat {
            head: Some(shared.position(shared.store.head().seq)),
            source_fresh_at: shared.source_fresh_at.map(|at: SystemTime| at.into()),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.inbound.abort();
        if !self.ended {
            self.hub.leave(self.stream, "the connection is gone");
        }
    }
}

fn response(kind: v1::sync_response::Kind) -> Frame {
    Frame::of(&v1::SyncResponse { kind: Some(kind) })
}
