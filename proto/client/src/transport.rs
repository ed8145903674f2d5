//! The edge: keeps one stream to one of several servers, and moves messages.
//!
//! ```text
//! run(): dial ──> Connected(Outbox) ──> Frame .. Frame ──> Lost ──> wait ──┐
//!          ^                                                               │
//!          └────────────────── next server, backoff ──────────────────────┘
//! ```
//!
//! It decides nothing about state: that is the [`Session`](crate::Session)'s. It looks at
//! messages only to set its own pace: a stream that brought the client up to date and lasted
//! resets the backoff, a Goodbye says how long to stay away.
//!
//! Both channels are bounded. When the owner is busy, events wait, the stream is not read, and
//! HTTP/2 makes the server wait; the connection stays alive meanwhile.

mod backoff;
mod credentials;
mod dial;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use lockstep_wire::{raw, v1};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::Channel;

use backoff::Backoff;
pub use credentials::{CredentialsError, Files};
pub use dial::{ConfigError, Security, Servers};

/// Requests that may wait for the network: Hello, a few reports, a Refetch.
const OUTBOX: usize = 16;
/// A stream that lasted this long shows that its server is well.
const SETTLED: Duration = Duration::from_secs(10);
/// Opening a stream takes at most this long.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
/// What the last requests may take to leave.
const FAREWELL: Duration = Duration::from_secs(1);
/// In TLS 1.3 a client is done before the server has seen its certificate, and the server's reason
/// can get lost behind the end of the connection.
const UNEXPLAINED: &str = "; a server that wants a client certificate, and gets none that it trusts, ends connections \
                           like this: are the client certificate and its key right?";
/// A message has at most 1 MiB.
const MAX_MESSAGE_BYTES: usize = 2 * 1024 * 1024;

/// What happens on the connection, in order: `Connected`, then `Frame`s, then `Lost`.
#[derive(Debug)]
pub enum Event {
    /// A connection is up; the owner sends Hello.
    Connected(Outbox),
    /// A message of the server.
    Frame(Box<raw::SyncResponse>),
    /// The connection is gone, and why.
    Lost(String),
}

/// The way to the server. Dropping it ends the connection.
#[derive(Debug)]
pub struct Outbox {
    requests: mpsc::Sender<v1::SyncRequest>,
    /// Tells the transport when the outbox is dropped.
    _alive: oneshot::Sender<()>,
}

/// The request was not taken: the network is slower than the owner, or gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many requests are waiting for the network")]
pub struct Congested;

impl Outbox {
    /// An outbox and what comes out of it: for a stream that is not this module's, and for tests.
    pub fn pair() -> (Self, mpsc::Receiver<v1::SyncRequest>) {
        let (requests, queue) = mpsc::channel(OUTBOX);
        // Nobody waits for this outbox to be dropped: the queue tells.
        let (alive, _) = oneshot::channel();
        (Self { requests, _alive: alive }, queue)
    }

    /// Sends a request, without waiting.
    pub fn send(&self, request: v1::SyncRequest) -> Result<(), Congested> {
        self.requests.try_send(request).map_err(|_| Congested)
    }
}

/// How a connection ended.
struct Ended {
    why: String,
    /// The client was brought up to date.
    useful: bool,
    /// Stay away for this long.
    away: Option<Duration>,
    /// Another agent with this node's name is connected.
    superseded: bool,
    /// The connection went away before the server had said anything, and nothing says why.
    cut: bool,
}

impl Ended {
    fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), useful: false, away: None, superseded: false, cut: false }
    }
}

/// Keeps a stream to one of `servers` until the receiver of `events` is dropped. `node_name` is
/// for the log.
pub async fn run<E: From<Event>>(mut servers: Servers, node_name: &str, events: mpsc::Sender<E>) {
    let mut backoff = Backoff::default();
    let mut turn = fastrand::usize(..servers.len());
    let mut state = LogState::Start;
    loop {
        let server = servers.get(turn).clone();
        let dialled = Instant::now();
        let ended = match server.connect().await {
            Ok(channel) => {
                let mut ended = follow(channel, &events, || {
                    state = LogState::Connected;
                    tracing::info!(node = node_name, server = %server, "connected to the control plane");
                })
                .await;
                if ended.cut && server.is_protected() {
                    ended.why.push_str(UNEXPLAINED);
                }
                if events.send(Event::Lost(ended.why.clone()).into()).await.is_err() {
                    return;
                }
                ended
            }
            Err(error) => Ended::new(format!("cannot connect: {}", chain(&error))),
        };
        state = state.report(node_name, &server.to_string(), &ended);
        turn += 1;
        // A server that greets and falls over, again and again, is not to be met at full speed.
        if ended.useful && dialled.elapsed() >= SETTLED {
            backoff.reset();
        }
        let wait = backoff.next(ended.away, ended.superseded);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = events.closed() => return,
        }
    }
}

/// Follows one stream to its end. `connected` is called when the server has answered.
async fn follow<E: From<Event>>(
    channel: Channel,
    events: &mpsc::Sender<E>,
    connected: impl FnOnce(),
) -> Ended {
    let (requests, queue) = mpsc::channel(OUTBOX);
    let (alive, mut dropped) = oneshot::channel();
    if events.send(Event::Connected(Outbox { requests, _alive: alive }).into()).await.is_err() {
        return Ended::new("the client ends");
    }
    let mut client = raw::sync_service_client::SyncServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let opened = tokio::time::timeout(OPEN_TIMEOUT, client.sync(ReceiverStream::new(queue))).await;
    let mut stream = match opened {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return refused(&status),
        Err(_) => return Ended::new(format!("no answer for {} s", OPEN_TIMEOUT.as_secs())),
    };
    let mut connected = Some(connected);
    let mut ended = Ended::new("");
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            _ = &mut dropped => {
                ended.why = "the client gave the connection up".to_owned();
                farewell(stream).await;
                return ended;
            }
        };
        match message {
            Ok(Some(frame)) => {
                // Not before its first message: a refusal can come after the headers.
                if let Some(connected) = connected.take() {
                    connected();
                }
                ended.observe(&frame);
                if events.send(Event::Frame(Box::new(frame)).into()).await.is_err() {
                    ended.why = "the client ends".to_owned();
                    return ended;
                }
            }
            Ok(None) => {
                if ended.why.is_empty() {
                    ended.why = "the server ended the stream".to_owned();
                }
                return ended;
            }
            Err(status) => {
                let refused = refused(&status);
                return Ended {
                    cut: refused.cut && connected.is_some(),
                    useful: ended.useful,
                    away: ended.away.or(refused.away),
                    superseded: ended.superseded || refused.superseded,
                    why: if ended.why.is_empty() { refused.why } else { ended.why },
                };
            }
        }
    }
}

/// Lets what is in the outbox reach the server, which then ends the stream from its side.
async fn farewell(mut stream: tonic::Streaming<raw::SyncResponse>) {
    let rest = async { while let Ok(Some(_)) = stream.message().await {} };
    // A server that does not end it has had its time.
    let _ = tokio::time::timeout(FAREWELL, rest).await;
}

fn refused(status: &tonic::Status) -> Ended {
    let mut ended = Ended::new(format!("{}: {}", status.code(), status.message()));
    if let Some(source) = std::error::Error::source(status) {
        ended.why = format!("{}: {}", ended.why, chain(source));
        ended.cut = !ended.why.contains("alert");
    }
    ended.superseded = status.code() == Code::AlreadyExists;
    ended
}

impl Ended {
    /// Takes from a message what sets the pace.
    fn observe(&mut self, frame: &raw::SyncResponse) {
        match &frame.kind {
            Some(raw::sync_response::Kind::Update(update)) => self.useful |= update.commit,
            Some(raw::sync_response::Kind::Welcome(welcome)) => {
                self.useful |= welcome.resume_mode() == v1::ResumeMode::InSync;
            }
            Some(raw::sync_response::Kind::Goodbye(goodbye)) => {
                self.away = goodbye.reconnect_after.and_then(|after| after.try_into().ok());
                self.superseded = goodbye.reason() == v1::GoodbyeReason::Superseded;
                let text = goodbye.message.as_str();
                let text = if text.is_empty() { goodbye.reason().as_str_name() } else { text };
                self.why = format!("the server said goodbye: {text}");
            }
            _ => {}
        }
    }
}

/// What the log said last: a line is written when that changes, not for every try.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LogState {
    Start,
    Connected,
    Unreachable,
    Superseded,
}

impl LogState {
    fn report(self, node_name: &str, server: &str, ended: &Ended) -> Self {
        let why = &ended.why;
        if ended.superseded {
            if self != LogState::Superseded {
                tracing::error!(
                    node = node_name,
                    server,
                    why,
                    "another agent runs under this node's name and is newer; this one keeps its rules and waits"
                );
            }
            return LogState::Superseded;
        }
        if self != LogState::Unreachable {
            tracing::warn!(node = node_name, server, why, "no connection to the control plane, trying again");
        }
        LogState::Unreachable
    }
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
