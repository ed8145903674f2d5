//! The source against an API server that answers as each test says: what no real one does on
//! demand. The real one is in the integration tests.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::response::Response;
use lockstep_model::Key;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::watch::{News, Signal};
use super::{Intake, Read, Which, client, run_with};
use crate::{Changes, Event, convert};

const PATIENCE: Duration = Duration::from_secs(20);
/// Longer than a test waits for anything.
const FOREVER: Duration = Duration::from_secs(3_600);

/// A request for Services that waits for its answer.
struct Asked {
    query: BTreeMap<String, String>,
    answer: oneshot::Sender<Answer>,
}

enum Answer {
    /// A body, with this status.
    Whole(u16, Value),
    /// Lines as they come; the stream ends when their sender goes.
    Lines(mpsc::UnboundedReceiver<Value>),
}

/// The stream of a watch that was answered.
struct Stream(mpsc::UnboundedSender<Value>);

impl Asked {
    fn is(&self, parameter: &str) -> &str {
        self.query.get(parameter).map_or("", String::as_str)
    }

    fn fail(self, code: u16, message: &str) {
        let status =
            json!({"kind": "Status", "status": "Failure", "code": code, "message": message, "reason": ""});
        let _ = self.answer.send(Answer::Whole(code, status));
    }

    fn page(self, names: &[(&str, u16)], revision: &str, more: &str) {
        let items: Vec<_> = names.iter().map(|(name, port)| service(name, *port, "1")).collect();
        let metadata = json!({"resourceVersion": revision, "continue": more});
        let list = json!({"kind": "ServiceList", "apiVersion": "v1", "metadata": metadata, "items": items});
        let _ = self.answer.send(Answer::Whole(200, list));
    }

    fn stream(self) -> Stream {
        let (lines, receiver) = mpsc::unbounded_channel();
        let _ = self.answer.send(Answer::Lines(receiver));
        Stream(lines)
    }
}

impl Stream {
    fn send(&self, kind: &str, object: Value) {
        self.0.send(json!({"type": kind, "object": object})).unwrap();
    }

    fn added(&self, name: &str, port: u16, revision: &str) {
        self.send("ADDED", service(name, port, revision));
    }

    fn bookmark(&self, revision: &str) {
        self.send("BOOKMARK", bookmark(revision, &json!({})));
    }

    /// The bookmark that ends a streaming list.
    fn listed(&self, revision: &str) {
        self.send("BOOKMARK", bookmark(revision, &json!({"k8s.io/initial-events-end": "true"})));
    }
}

fn bookmark(revision: &str, annotations: &Value) -> Value {
    let metadata = json!({"resourceVersion": revision, "annotations": annotations});
    json!({"kind": "Service", "apiVersion": "v1", "metadata": metadata})
}

fn service(name: &str, port: u16, revision: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": name, "uid": name, "resourceVersion": revision},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": port}]}})
}

/// The API server's end: what is asked, and how it answers for ServiceCIDRs.
#[derive(Clone)]
struct Server {
    requests: mpsc::UnboundedSender<Asked>,
    /// 200 = it has one, `kubernetes`; 0 = it does not answer.
    cidrs: Arc<AtomicU16>,
}

/// A source, and the API server it talks to.
struct Fake {
    cidrs: Arc<AtomicU16>,
    asked: mpsc::UnboundedReceiver<Asked>,
    events: mpsc::Receiver<Event>,
    _server: tokio::task::JoinSet<()>,
}

impl Fake {
    /// EndpointSlices and Nodes are listed at once and never change. There are no ServiceCIDRs.
    async fn start() -> Self {
        Self::start_with(404, PATIENCE).await
    }

    /// The same, with this answer for ServiceCIDRs and this patience for them.
    async fn start_with(cidrs: u16, patience: Duration) -> Self {
        let cidrs = Arc::new(AtomicU16::new(cidrs));
        let (requests, asked) = mpsc::unbounded_channel();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().fallback(answer).with_state(Server { requests, cidrs: cidrs.clone() });
        let mut server = tokio::task::JoinSet::new();
        server.spawn(async move { axum::serve(listener, app).await.unwrap() });
        let config = kube::Config::new(format!("http://{address}").parse().unwrap());
        let (out, events) = mpsc::channel(16);
        server.spawn(run_with(client(config).unwrap(), out, patience));
        Self { cidrs, asked, events, _server: server }
    }

    async fn asked(&mut self) -> Asked {
        timeout(PATIENCE, self.asked.recv()).await.expect("the source asks").unwrap()
    }

    async fn next(&mut self) -> Event {
        loop {
            match timeout(PATIENCE, self.events.recv()).await.expect("the source says something").unwrap() {
                Event::Alive => {}
                Event::Changes(changes) if is_empty(&changes) => {}
                event => return event,
            }
        }
    }

    async fn changes(&mut self) -> Changes {
        loop {
            match self.next().await {
                Event::Changes(changes) => return changes,
                Event::NotSynced(_) => {}
                other => panic!("expected changes, got {other:?}"),
            }
        }
    }

    /// Waits for a reason that says so; there may be others before it.
    async fn not_synced(&mut self, because: &str) {
        loop {
            match self.next().await {
                Event::NotSynced(reason) if reason.contains(because) => return,
                Event::NotSynced(_) => {}
                other => panic!("expected not to be synced because of {because}, got {other:?}"),
            }
        }
    }

    async fn synced(&mut self) {
        loop {
            match self.next().await {
                Event::Synced => return,
                Event::NotSynced(_) => {}
                other => panic!("expected to be synced, got {other:?}"),
            }
        }
    }

    /// Synced with these Services, as of revision 10. The stream goes on.
    async fn synced_with(names: &[(&str, u16)]) -> (Self, Stream) {
        let mut fake = Self::start().await;
        let stream = fake.asked().await.stream();
        names.iter().for_each(|(name, port)| stream.added(name, *port, "5"));
        stream.listed("10");
        let mut seen = 0;
        while seen < names.len() {
            seen += fake.changes().await.upserts.len();
        }
        fake.synced().await;
        (fake, stream)
    }
}

/// Nothing but revisions.
fn is_empty(changes: &Changes) -> bool {
    Changes { revisions: Vec::new(), ..changes.clone() } == Changes::default()
}

async fn answer(
    State(server): State<Server>,
    Query(query): Query<BTreeMap<String, String>>,
    request: Request,
) -> Response {
    let cidrs = server.cidrs.load(Ordering::SeqCst);
    let of_cidrs = request.uri().path() == "/apis/networking.k8s.io/v1/servicecidrs";
    let answer = if of_cidrs && cidrs == 0 {
        std::future::pending().await
    } else if of_cidrs && cidrs != 200 {
        Answer::Whole(cidrs, json!("404 page not found"))
    } else if request.uri().path() == "/api/v1/services" {
        let (answer, answered) = oneshot::channel();
        server.requests.send(Asked { query, answer }).unwrap();
        // A test that ends leaves requests behind.
        answered.await.unwrap_or(Answer::Whole(500, json!({})))
    } else {
        let (lines, receiver) = mpsc::unbounded_channel();
        let stream = Stream(lines);
        if of_cidrs {
            let metadata = json!({"name": "kubernetes", "resourceVersion": "6"});
            stream.send("ADDED", json!({"metadata": metadata, "spec": {"cidrs": ["10.96.0.0/12"]}}));
        }
        stream.listed("7");
        // Kept open for as long as the test runs.
        std::mem::forget(stream);
        Answer::Lines(receiver)
    };
    match answer {
        Answer::Whole(code, body) => {
            let response = Response::builder().status(code).header("content-type", "application/json");
            response.body(Body::from(body.to_string())).unwrap()
        }
        Answer::Lines(lines) => {
            let lines = futures_util::stream::unfold(lines, |mut lines| async {
                let line = lines.recv().await?;
                Some((Ok::<_, Infallible>(format!("{line}\n")), lines))
            });
            Response::new(Body::from_stream(lines))
        }
    }
}

fn names(changes: &Changes) -> (Vec<String>, Vec<String>) {
    let upserts = changes.upserts.iter().map(|resource| resource.key().to_string());
    (upserts.collect(), changes.removals.iter().map(Key::to_string).collect())
}

/// `+a -b` in the form of [`names`].
fn expected(upserts: &[&str], removals: &[&str]) -> (Vec<String>, Vec<String>) {
    let all = |names: &[&str]| names.iter().map(|name| format!("default/{name}")).collect();
    (all(upserts), all(removals))
}

#[tokio::test]
async fn asks_for_a_streaming_list_of_now_and_is_synced_when_all_three_are_complete() {
    let mut fake = Fake::start().await;
    fake.not_synced("waiting for the first list of services").await;
    let asked = fake.asked().await;
    assert_eq!((asked.is("watch"), asked.is("sendInitialEvents")), ("true", "true"));
    assert_eq!((asked.is("resourceVersion"), asked.is("resourceVersionMatch")), ("", "NotOlderThan"));
    assert_eq!(asked.is("allowWatchBookmarks"), "true");
    assert_eq!(asked.is("fieldSelector"), "spec.clusterIP!=None");
    assert_eq!(
        asked.is("labelSelector"),
        "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless"
    );
    let stream = asked.stream();
    stream.added("a", 80, "5");
    assert_eq!(names(&fake.changes().await), expected(&["a"], &[]));
    stream.bookmark("6");
    stream.added("b", 80, "6");
    assert_eq!(names(&fake.changes().await), expected(&["b"], &[]), "an ordinary bookmark ends no list");
    stream.listed("10");
    fake.synced().await;
}

#[tokio::test]
async fn reads_pages_where_there_is_no_streaming_list_and_again_where_they_expire() {
    let mut fake = Fake::start().await;
    let asked = fake.asked().await;
    asked.fail(422, "ListOptions is invalid: sendInitialEvents: Forbidden: the feature gate is off");
    let asked = fake.asked().await;
    assert_eq!((asked.is("watch"), asked.is("limit"), asked.is("continue")), ("", "500", ""));
    assert_eq!(asked.is("resourceVersion"), "", "as of now");
    asked.page(&[("a", 80), ("ghost", 80)], "10", "page-2");
    assert_eq!(names(&fake.changes().await), expected(&["a", "ghost"], &[]));
    let asked = fake.asked().await;
    assert_eq!(asked.is("continue"), "page-2");
    asked.fail(410, "The provided continue parameter is too old");

    let asked = fake.asked().await;
    assert_eq!((asked.is("watch"), asked.is("continue")), ("", ""));
    asked.page(&[("a", 80)], "20", "page-2");
    fake.asked().await.page(&[("b", 80)], "20", "");
    let mut all = (Vec::new(), Vec::new());
    while all.1.is_empty() {
        let (upserts, removals) = names(&fake.changes().await);
        all.0.extend(upserts);
        all.1.extend(removals);
    }
    assert_eq!(all, expected(&["b"], &["ghost"]), "what only the broken list had is gone");
    fake.synced().await;
    let asked = fake.asked().await;
    assert_eq!(
        (asked.is("watch"), asked.is("resourceVersion"), asked.is("sendInitialEvents")),
        ("true", "20", "")
    );
}

#[tokio::test]
async fn does_without_the_field_selector_where_the_server_does_not_know_it() {
    let mut fake = Fake::start().await;
    fake.asked().await.fail(400, "field label not supported: spec.clusterIP");
    let asked = fake.asked().await;
    assert_eq!((asked.is("fieldSelector"), asked.is("sendInitialEvents")), ("", "true"));
    let stream = asked.stream();
    let mut headless = service("headless", 80, "5");
    headless["spec"]["clusterIP"] = "None".into();
    stream.send("ADDED", headless);
    stream.listed("10");
    fake.synced().await;
}

#[tokio::test]
async fn a_list_that_breaks_off_is_no_list() {
    let mut fake = Fake::start().await;
    let stream = fake.asked().await.stream();
    stream.added("a", 80, "5");
    assert_eq!(names(&fake.changes().await), expected(&["a"], &[]));
    drop(stream);
    fake.not_synced("the list ended before it was complete").await;
    let asked = fake.asked().await;
    assert_eq!((asked.is("sendInitialEvents"), asked.is("resourceVersion")), ("true", ""));
    let stream = asked.stream();
    stream.added("a", 80, "5");
    stream.listed("10");
    fake.synced().await;
}

#[tokio::test]
async fn faults_are_told_and_tried_again() {
    let mut fake = Fake::start().await;
    fake.asked().await.fail(500, "etcd has no leader");
    fake.not_synced("etcd has no leader (500)").await;
    fake.asked().await.fail(403, "services is forbidden");
    fake.not_synced("services is forbidden (403)").await;
    fake.asked().await.stream().listed("10");
    fake.synced().await;
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_from_the_last_revision() {
    let (mut fake, stream) = Fake::synced_with(&[("a", 80)]).await;
    stream.added("b", 80, "11");
    assert_eq!(names(&fake.changes().await), expected(&["b"], &[]));
    drop(stream);
    let asked = fake.asked().await;
    assert_eq!((asked.is("resourceVersion"), asked.is("sendInitialEvents")), ("11", ""));
    let stream = asked.stream();
    stream.bookmark("30");
    drop(stream);
    let asked = fake.asked().await;
    assert_eq!(asked.is("resourceVersion"), "30", "a bookmark counts");
    let stream = asked.stream();
    stream.send("DELETED", service("a", 80, "31"));
    assert_eq!(names(&fake.changes().await), expected(&[], &["a"]));
}

#[tokio::test]
async fn a_new_list_tells_the_difference_and_takes_away_nothing_that_is_there() {
    let (mut fake, stream) = Fake::synced_with(&[("a", 80), ("b", 80), ("c", 80)]).await;
    stream.send("ERROR", json!({"kind": "Status", "code": 410, "message": "too old resource version", "status": "Failure", "reason": "Expired"}));
    let asked = fake.asked().await;
    assert_eq!((asked.is("sendInitialEvents"), asked.is("resourceVersion")), ("true", ""));
    let stream = asked.stream();
    stream.added("a", 80, "5");
    stream.added("b", 81, "40");
    stream.added("d", 80, "41");
    let mut upserts = names(&fake.changes().await);
    while upserts.0.len() < 2 {
        upserts.0.extend(names(&fake.changes().await).0);
    }
    assert_eq!(upserts, expected(&["b", "d"], &[]), "nothing is gone before the list is complete");
    stream.listed("50");
    assert_eq!(names(&fake.changes().await), expected(&[], &["c"]));
}

#[tokio::test]
async fn a_revision_that_lies_ahead_is_listed_again() {
    let (mut fake, stream) = Fake::synced_with(&[("a", 80), ("b", 80)]).await;
    drop(stream);
    fake.asked().await.fail(504, "Too large resource version: 10, current: 3");
    let asked = fake.asked().await;
    assert_eq!(asked.is("sendInitialEvents"), "true", "the data store was set back");
    let stream = asked.stream();
    stream.added("a", 80, "2");
    stream.listed("3");
    assert_eq!(names(&fake.changes().await), expected(&[], &["b"]));
}

#[tokio::test]
async fn a_broken_object_is_in_quarantine_and_the_rest_goes_on() {
    let (mut fake, stream) = Fake::synced_with(&[("a", 80)]).await;
    stream.added("a", 0, "11");
    let changes = fake.changes().await;
    assert!(is_empty(&Changes { quarantine: Vec::new(), ..changes.clone() }), "{changes:?}");
    assert!(format!("{:?}", changes.quarantine).contains("spec.ports[0].port"), "{changes:?}");
    stream.added("b", 80, "12");
    assert_eq!(names(&fake.changes().await), expected(&["b"], &[]));
}

#[tokio::test]
async fn goes_on_without_service_cidrs_and_takes_them_up_when_there_are_any() {
    for code in [404, 403] {
        let mut fake = Fake::start_with(code, FOREVER).await;
        let stream = fake.asked().await.stream();
        stream.listed("10");
        fake.synced().await;
        stream.added("a", 80, "11");
        assert_eq!(names(&fake.changes().await), expected(&["a"], &[]));
        fake.cidrs.store(200, Ordering::SeqCst);
        assert_eq!(names(&fake.changes().await), (vec!["kubernetes".to_owned()], vec![]));
    }
}

#[tokio::test]
async fn service_cidrs_that_are_only_slower_are_part_of_the_first_state() {
    let mut fake = Fake::start_with(500, FOREVER).await;
    fake.asked().await.stream().listed("10");
    fake.not_synced("the first list of servicecidrs is not there: ").await;
    fake.cidrs.store(200, Ordering::SeqCst);
    assert_eq!(names(&fake.changes().await).0, ["kubernetes"]);
    fake.synced().await;
}

#[tokio::test]
async fn service_cidrs_that_fail_or_hang_keep_nothing_from_being_served() {
    for code in [500, 503, 429, 0] {
        let mut fake = Fake::start_with(code, Duration::from_millis(50)).await;
        let stream = fake.asked().await.stream();
        stream.listed("10");
        fake.synced().await;
        stream.added("a", 80, "11");
        assert_eq!(names(&fake.changes().await), expected(&["a"], &[]));
        if code != 0 {
            fake.cidrs.store(200, Ordering::SeqCst);
            assert_eq!(names(&fake.changes().await), (vec!["kubernetes".to_owned()], vec![]), "{code}");
        }
    }
}

#[tokio::test]
async fn no_patience_goes_on_without_what_is_not_optional() {
    let mut fake = Fake::start_with(500, Duration::ZERO).await;
    fake.asked().await.fail(500, "etcd has no leader");
    fake.not_synced("etcd has no leader (500)").await;
    fake.asked().await.stream().listed("10");
    fake.synced().await;
}

#[test]
fn service_cidrs_stay_while_it_is_not_certain_that_they_are_gone() {
    let mut intake = Intake::new(PATIENCE);
    let mut digest = |news| {
        let signal = Signal { which: Which::ServiceCidrs, news };
        let told = intake.digest([signal].into_iter()).into_iter().find_map(|event| match event {
            Event::Changes(changes) => Some(names(&changes)),
            _ => None,
        });
        told.unwrap_or_default()
    };
    let object = serde_json::from_value(json!({"metadata": {"name": "k"}, "spec": {"cidrs": []}})).unwrap();
    digest(News::ListBegan);
    assert_eq!(digest(News::Listed(Read::ServiceCidr(Box::new(object)))).0, ["k"]);
    digest(News::ListDone("1".into()));
    assert_eq!(digest(News::Absent { known: false }), Default::default());
    assert_eq!(digest(News::Absent { known: true }).1, ["k"]);
}

fn applied(name: &str, at: Option<&str>) -> Signal<Read> {
    let mut slice: k8s_openapi::api::discovery::v1::EndpointSlice = serde_json::from_value(json!({
        "metadata": {"namespace": "default", "name": name, "labels": {convert::SERVICE_NAME_LABEL: "web"}},
        "addressType": "IPv4", "endpoints": []}))
    .unwrap();
    let annotation = at.map(|at| (super::TRIGGER_TIME.to_owned(), at.to_owned()));
    slice.metadata.annotations = annotation.map(|annotation| [annotation].into());
    Signal { which: Which::EndpointSlices, news: News::Applied(Read::EndpointSlice(Box::new(slice))) }
}

#[test]
fn what_is_ready_is_told_at_once_with_its_oldest_cause() {
    let mut intake = Intake::new(PATIENCE);
    let ready = [
        applied("c", Some("1970-01-01T00:00:07Z")),
        applied("b", Some("1970-01-01T00:00:05.000000005Z")),
        applied("a", None),
        applied("d", Some("not a time")),
    ];
    let events = intake.digest(ready.into_iter());
    let [Event::Changes(changes), Event::Alive] = &events[..] else { panic!("{events:?}") };
    assert_eq!(changes.trigger, Some(UNIX_EPOCH + Duration::new(5, 5)));
    let keys: Vec<_> = changes.upserts.iter().map(|resource| resource.key().to_string()).collect();
    assert_eq!(keys, ["default/web/a", "default/web/b", "default/web/c", "default/web/d"]);

    let events = intake.digest([applied("a", Some("1970-01-01T00:00:01Z"))].into_iter());
    assert_eq!(events, [], "an object that says the same has no cause either");

    let Signal { which, news: News::Applied(object) } = applied("e", Some("1970-01-01T00:00:01Z")) else {
        panic!()
    };
    let events = intake.digest([Signal { which, news: News::Listed(object) }].into_iter());
    let [Event::Changes(changes)] = &events[..] else { panic!("{events:?}") };
    assert_eq!(changes.trigger, None, "what a list shows may have happened long ago");
}

#[test]
fn a_bookmark_is_a_sign_of_life() {
    let mut intake = Intake::new(PATIENCE);
    let bookmark = || Signal { which: Which::Nodes, news: News::Revision("9".into()) };
    let events = intake.digest([bookmark()].into_iter());
    let [Event::Changes(changes), Event::Alive] = &events[..] else { panic!("{events:?}") };
    assert_eq!(changes.revisions, [("nodes".to_owned(), "9".to_owned())]);
    assert_eq!(intake.digest([bookmark()].into_iter()), [], "not more than one a second");
    let failing = Signal { which: Which::Nodes, news: News::Failing("gone".into()) };
    intake.told_alive = None;
    let events = intake.digest([failing].into_iter());
    assert!(matches!(&events[..], [Event::NotSynced(_)]), "a fault is none: {events:?}");
}
