//! One resource, listed and watched for ever.
//!
//! ```text
//!           ┌─ streaming list (one watch request: all objects, then changes) ─┐
//! nothing ──┤                                                                  ├──> watching ── 410 ──> nothing
//!           └─ paged list ── watch request from its revision ──────────────────┘     │  ^
//!                                                                    stream ends, fault └──┘ from the last revision
//! ```
//!
//! Written on the client's list and watch requests and not on its `watcher`, because that
//! one keeps bookmarks to itself: they are what says that a quiet API server is still there.

use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::Which;

/// The server ends a watch after this many seconds.
const WATCH_SECONDS: u32 = 290;
/// A stream that is silent for longer than the server would keep it is dead.
const WATCH_SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5);
/// A server that sends nothing of a streaming list for so long does not know what one is.
const LIST_SILENCE: Duration = Duration::from_secs(30);
/// A page of a list, or the beginning of a watch, that takes longer is asked for again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
const PAGE_SIZE: u32 = 500;
const BACKOFF: std::ops::Range<Duration> = Duration::from_millis(100)..Duration::from_secs(5);

/// What one watch tells.
#[derive(Debug)]
pub(super) struct Signal<K> {
    pub(super) which: Which,
    pub(super) news: News<K>,
}

/// News of one resource.
#[derive(Debug)]
pub(super) enum News<K> {
    /// A list begins; one that had begun before counts for nothing.
    ListBegan,
    /// An object of the list.
    Listed(K),
    /// The list is complete, as of this revision.
    ListDone(String),
    /// An object is new or has changed.
    Applied(K),
    /// An object is gone.
    Deleted(K),
    /// The watch has come this far.
    Revision(String),
    /// The API server does not have the resource (`known`), or does not say. Only of what the
    /// state is complete without.
    Absent {
        /// That there are none is certain.
        known: bool,
    },
    /// Nothing can be read, for this reason.
    Failing(String),
}

/// Why reading stopped.
#[derive(Debug)]
enum Stop {
    /// Nobody listens.
    Closed,
    /// The revision is too old: only a list helps.
    Gone,
    /// The server has no streaming lists.
    NoStreaming(String),
    /// The server does not know the field selector.
    NoFieldSelector(String),
    /// The server does not have the resource, or does not let us read it, and that is no matter.
    Absent { known: bool, reason: String },
    /// Anything else.
    Fault(String),
}

/// Lists and watches one resource.
pub(super) struct Watch<K, T> {
    pub(super) api: Api<K>,
    pub(super) which: Which,
    pub(super) labels: Option<&'static str>,
    pub(super) fields: Option<&'static str>,
    pub(super) out: mpsc::Sender<Signal<T>>,
    pub(super) wrap: fn(K) -> T,
}

/// What is known of the server.
struct Progress {
    revision: Option<String>,
    streaming: bool,
    /// Something was read since the last fault.
    heard: bool,
}

impl<K, T> Watch<K, T>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    /// Runs until nobody listens.
    pub(super) async fn run(mut self) {
        let mut progress = Progress { revision: None, streaming: true, heard: false };
        let mut faults = 0;
        let (mut failing, mut absent) = (false, false);
        loop {
            let started = Instant::now();
            let result = self.step(&mut progress).await;
            if std::mem::take(&mut progress.heard) {
                faults = 0;
                if std::mem::take(&mut failing) {
                    tracing::info!(resource = self.which.name(), "the API server answers again");
                }
                if std::mem::take(&mut absent) {
                    tracing::info!(resource = self.which.name(), "can be read now");
                }
            }
            let reason = match result {
                Err(Stop::Closed) => return,
                Ok(()) if started.elapsed() >= Duration::from_secs(1) => continue,
                Ok(()) => None,
                Err(Stop::Gone) => {
                    tracing::info!(resource = self.which.name(), "the revision is too old, listing again");
                    progress.revision = None;
                    None
                }
                Err(Stop::NoStreaming(reason)) => {
                    tracing::info!(
                        resource = self.which.name(),
                        "no streaming list, reading pages: {reason}"
                    );
                    progress.streaming = false;
                    continue;
                }
                Err(Stop::NoFieldSelector(reason)) => {
                    tracing::info!(resource = self.which.name(), "no field selector: {reason}");
                    self.fields = None;
                    continue;
                }
                Err(Stop::Absent { known, reason }) => {
                    if !std::mem::replace(&mut absent, true) {
                        tracing::info!(
                            resource = self.which.name(),
                            "going on without, until there are any: {reason}"
                        );
                    }
                    if known {
                        progress.revision = None;
                    }
                    if self.tell(News::Absent { known }).await.is_err() {
                        return;
                    }
                    None
                }
                Err(Stop::Fault(reason)) => Some(reason),
            };
            if let Some(reason) = reason {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(resource = self.which.name(), "{reason}; trying again");
                }
                if self.tell(News::Failing(reason)).await.is_err() {
                    return;
                }
            }
            let closed = self.out.closed();
            tokio::select! {
                () = closed => return,
                () = tokio::time::sleep(backoff(faults)) => faults += 1,
            }
        }
    }

    async fn step(&self, progress: &mut Progress) -> Result<(), Stop> {
        let mut parameters = WatchParams {
            label_selector: self.labels.map(str::to_owned),
            field_selector: self.fields.map(str::to_owned),
            timeout: Some(WATCH_SECONDS),
            bookmarks: true,
            send_initial_events: false,
        };
        if let Some(revision) = &progress.revision {
            let stream = self.answered(self.api.watch(&parameters, revision)).await?;
            return self.follow(stream, progress).await;
        }
        if !progress.streaming {
            return self.pages(progress).await;
        }
        // No revision means: as of now. "0" would do with what a server that lags remembers.
        parameters.send_initial_events = true;
        let stream = self.answered(self.api.watch(&parameters, "")).await?;
        self.tell(News::ListBegan).await?;
        self.follow(stream, progress).await
    }

    /// Reads a watch to its end. Until there is a revision, what it sends is the list.
    async fn follow(
        &self,
        stream: impl Stream<Item = kube::Result<WatchEvent<K>>>,
        progress: &mut Progress,
    ) -> Result<(), Stop> {
        let mut stream = std::pin::pin!(stream);
        loop {
            let listing = progress.revision.is_none();
            let silence = if listing { LIST_SILENCE } else { WATCH_SILENCE };
            let next = tokio::select! {
                next = tokio::time::timeout(silence, stream.next()) => next,
                () = self.out.closed() => return Err(Stop::Closed),
            };
            let event = match next {
                Err(_) if listing => return Err(Stop::NoStreaming("the server sends no list".into())),
                Err(_) => return Err(Stop::Fault("the watch has gone silent".into())),
                Ok(None) if listing => {
                    return Err(Stop::Fault("the list ended before it was complete".into()));
                }
                Ok(None) => return Ok(()),
                Ok(Some(event)) => event.map_err(|error| self.stop(error))?,
            };
            self.event(event, progress).await?;
        }
    }

    async fn event(&self, event: WatchEvent<K>, progress: &mut Progress) -> Result<(), Stop> {
        let listing = progress.revision.is_none();
        let (news, revision) = match event {
            WatchEvent::Error(status) => return Err(self.stop(kube::Error::Api(status))),
            WatchEvent::Bookmark(bookmark) => {
                let revision = bookmark.metadata.resource_version;
                let complete = bookmark.metadata.annotations.contains_key("k8s.io/initial-events-end");
                if !listing || complete {
                    progress.revision = Some(revision.clone());
                }
                match (listing, complete) {
                    (true, true) => (News::ListDone(revision), None),
                    (true, false) => return Ok(()),
                    (false, _) => (News::Revision(revision), None),
                }
            }
            WatchEvent::Added(object) | WatchEvent::Modified(object) if listing => {
                (News::Listed(object), None)
            }
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                let revision = object.resource_version();
                (News::Applied(object), revision)
            }
            WatchEvent::Deleted(object) => {
                let revision = object.resource_version();
                (News::Deleted(object), revision)
            }
        };
        progress.heard = true;
        self.tell(news).await?;
        if let Some(revision) = revision.filter(|_| !listing) {
            progress.revision = Some(revision.clone());
            self.tell(News::Revision(revision)).await?;
        }
        Ok(())
    }

    /// Reads the list page by page. Pages come from one moment: a list whose moment the
    /// server has forgotten begins anew.
    async fn pages(&self, progress: &mut Progress) -> Result<(), Stop> {
        let mut parameters = ListParams {
            label_selector: self.labels.map(str::to_owned),
            field_selector: self.fields.map(str::to_owned),
            limit: Some(PAGE_SIZE),
            ..ListParams::default()
        };
        self.tell(News::ListBegan).await?;
        loop {
            let page = self.answered(self.api.list(&parameters)).await?;
            progress.heard = true;
            for object in page.items {
                self.tell(News::Listed(object)).await?;
            }
            parameters.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if parameters.continue_token.is_some() {
                continue;
            }
            let revision = page.metadata.resource_version.filter(|revision| !revision.is_empty());
            let revision = revision.ok_or_else(|| Stop::Fault("the list has no resourceVersion".into()))?;
            progress.revision = Some(revision.clone());
            return self.tell(News::ListDone(revision)).await;
        }
    }

    /// A request's answer, or why there is none.
    async fn answered<R>(&self, request: impl Future<Output = kube::Result<R>>) -> Result<R, Stop> {
        match tokio::time::timeout(ANSWER_TIMEOUT, request).await {
            Ok(answer) => answer.map_err(|error| self.stop(error)),
            Err(_) => Err(Stop::Fault(format!("the API server does not answer within {ANSWER_TIMEOUT:?}"))),
        }
    }

    async fn tell(&self, news: News<K>) -> Result<(), Stop> {
        let news = match news {
            News::ListBegan => News::ListBegan,
            News::Listed(object) => News::Listed((self.wrap)(object)),
            News::ListDone(revision) => News::ListDone(revision),
            News::Applied(object) => News::Applied((self.wrap)(object)),
            News::Deleted(object) => News::Deleted((self.wrap)(object)),
            News::Revision(revision) => News::Revision(revision),
            News::Absent { known } => News::Absent { known },
            News::Failing(reason) => News::Failing(reason),
        };
        self.out.send(Signal { which: self.which, news }).await.map_err(|_| Stop::Closed)
    }

    /// What an error of the client means here.
    fn stop(&self, error: kube::Error) -> Stop {
        let status = match error {
            kube::Error::Api(status) => status,
            other => return Stop::Fault(causes(&other)),
        };
        let reason = format!("{} ({})", status.message, status.code);
        let unknown = matches!(status.code, 400 | 422);
        // A revision that lies ahead is one of a data store that was since set back.
        if status.code == 410 || status.message.contains("Too large resource version") {
            Stop::Gone
        } else if self.which.is_optional() && matches!(status.code, 403 | 404) {
            Stop::Absent { known: status.code == 404, reason }
        } else if unknown && self.fields.is_some() && status.message.contains("field label not supported") {
            Stop::NoFieldSelector(reason)
        } else if unknown && status.message.contains("sendInitialEvents") {
            Stop::NoStreaming(reason)
        } else {
            Stop::Fault(reason)
        }
    }
}

/// An error with all its causes, because the client's own text stops at the first.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// How long to wait after so many faults in a row: half of it is chance, so that a thousand
/// clients of one server do not come back as one.
fn backoff(faults: u32) -> Duration {
    let full = BACKOFF.start.saturating_mul(1 << faults.min(16)).min(BACKOFF.end);
    full.mul_f64(0.5 + fastrand::f64() / 2.0)
}
