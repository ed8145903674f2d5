//! Against a real gRPC server on loopback.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use lockstep_wire::batch;
use lockstep_wire::frame::Frame;
use lockstep_wire::frame::sync_service_server::{SyncService, SyncServiceServer};
use lockstep_wire::v1;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use super::{Event, Files, Security, Servers, run};
use crate::testing::{self, Server, session};

type Frames = Pin<Box<dyn Stream<Item = Result<Frame, Status>> + Send>>;

/// Answers each stream by one script step.
#[derive(Clone)]
struct Scripted {
    steps: Arc<std::sync::Mutex<Vec<Step>>>,
    requests: mpsc::Sender<v1::SyncRequest>,
}

#[derive(Clone)]
enum Step {
    Refuse(Status),
    /// These messages, then the end of the stream.
    Send(Vec<v1::SyncResponse>),
    /// What the model server says to the Hello; the stream stays open.
    Serve(Server),
}

#[tonic::async_trait]
impl SyncService for Scripted {
    type SyncStream = Frames;
    type FetchSnapshotStream = Frames;

    async fn sync(&self, request: Request<Streaming<v1::SyncRequest>>) -> Result<Response<Frames>, Status> {
        let mut requests = request.into_inner();
        let hello = requests.message().await?.ok_or_else(|| Status::invalid_argument("no Hello"))?;
        self.requests.send(hello.clone()).await.unwrap();
        let step = {
            let mut steps = self.steps.lock().unwrap();
            if steps.len() > 1 { steps.remove(0) } else { steps[0].clone() }
        };
        match step {
            Step::Refuse(status) => Err(status),
            Step::Send(messages) => {
                let frames: Vec<_> = messages.iter().map(|message| Ok(Frame::of(message))).collect();
                Ok(Response::new(Box::pin(tokio_stream::iter(frames))))
            }
            Step::Serve(server) => {
                let (mode, _) = server.answer(&hello);
                let (frames, receiver) = mpsc::channel(8);
                for frame in server.frames(mode) {
                    frames.send(Ok(frame)).await.unwrap();
                }
                let acks = self.requests.clone();
                tokio::spawn(async move {
                    while let Ok(Some(request)) = requests.message().await {
                        let _ = acks.send(request).await;
                    }
                    drop(frames);
                });
                Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
            }
        }
    }

    async fn fetch_snapshot(&self, _: Request<v1::FetchSnapshotRequest>) -> Result<Response<Frames>, Status> {
        Err(Status::unimplemented("not part of this test"))
    }
}

impl Server {
    fn frames(&self, mode: v1::ResumeMode) -> Vec<Frame> {
        let mut frames = vec![self.welcome_frame(mode)];
        if mode == v1::ResumeMode::Full {
            frames.extend(self.full_frames());
        }
        frames
    }
}

struct Running {
    url: String,
    requests: mpsc::Receiver<v1::SyncRequest>,
}

async fn serve(steps: Vec<Step>) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, requests) = mpsc::channel(64);
    let service = Scripted { steps: Arc::new(std::sync::Mutex::new(steps)), requests: sender };
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(SyncServiceServer::new(service))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    Running { url, requests }
}

fn start(urls: &[String]) -> mpsc::Receiver<Event> {
    let servers = Servers::new(urls, &Security::Plaintext).unwrap();
    let (sender, events) = mpsc::channel(8);
    tokio::spawn(async move { run(servers, "node-a", sender).await });
    events
}

async fn next(events: &mut mpsc::Receiver<Event>) -> Event {
    tokio::time::timeout(Duration::from_secs(20), events.recv()).await.expect("an event in time").unwrap()
}

#[tokio::test]
async fn a_session_follows_a_server_and_reports() {
    let model = Server::new(7, testing::cluster(20));
    let mut server = serve(vec![Step::Serve(model.clone())]).await;
    let mut events = start(std::slice::from_ref(&server.url));
    let mut session = session(None);
    let mut outbox = None;
    while session.position().is_none() {
        match next(&mut events).await {
            Event::Connected(new) => {
                new.send(session.connected(testing::at(0))).unwrap();
                outbox = Some(new);
            }
            Event::Frame(frame) => {
                session.receive(*frame, testing::at(0));
            }
            Event::Lost(why) => panic!("{why}"),
        }
    }
    assert_eq!(session.state().digest(), model.head().digest());
    let outbox = outbox.unwrap();
    outbox.send(session.report(&crate::Report::default()).unwrap()).unwrap();
    let kinds: Vec<_> = [server.requests.recv().await, server.requests.recv().await]
        .into_iter()
        .map(|request| request.unwrap().kind.unwrap())
        .collect();
    assert!(matches!(kinds[0], v1::sync_request::Kind::Hello(_)));
    assert!(matches!(&kinds[1], v1::sync_request::Kind::Ack(ack) if ack.received_seq == 1));
    // Giving the outbox up ends the connection; the next one resumes.
    drop(outbox);
    assert!(matches!(next(&mut events).await, Event::Lost(_)));
    session.disconnected();
    let Event::Connected(outbox) = next(&mut events).await else { panic!("not connected") };
    outbox.send(session.connected(testing::at(1))).unwrap();
    let Event::Frame(welcome) = next(&mut events).await else { panic!("no Welcome") };
    let step = session.receive(*welcome, testing::at(1));
    assert!(step.committed.unwrap().changes.is_empty());
}

#[tokio::test]
async fn the_next_server_is_tried_when_one_is_down() {
    let model = Server::new(7, testing::cluster(1));
    // A port that was just free: nobody listens there.
    let down = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let up = serve(vec![Step::Serve(model)]).await;
    for urls in [[format!("http://{down}"), up.url.clone()], [up.url.clone(), format!("http://{down}")]] {
        let mut events = start(&urls);
        let mut session = session(None);
        let Event::Connected(outbox) = next(&mut events).await else { panic!("not connected") };
        outbox.send(session.connected(testing::at(0))).unwrap();
        assert!(matches!(next(&mut events).await, Event::Frame(_)));
    }
}

#[tokio::test]
async fn a_refusal_and_an_ended_stream_are_tried_again() {
    let goodbye = v1::SyncResponse {
        kind: Some(v1::sync_response::Kind::Goodbye(v1::Goodbye {
            reason: v1::GoodbyeReason::Shutdown as i32,
            reconnect_after: Some(Duration::from_millis(300).try_into().unwrap()),
            message: "restarting".to_owned(),
        })),
    };
    let steps = vec![
        Step::Refuse(Status::unavailable("still reading")),
        Step::Send(vec![goodbye]),
        Step::Send(vec![]),
    ];
    let server = serve(steps).await;
    let mut events = start(std::slice::from_ref(&server.url));
    let mut session = session(None);
    let mut reasons = Vec::new();
    let mut connected_at = Vec::new();
    // An outbox that is dropped would end its connection from this side.
    let mut kept = Vec::new();
    while reasons.len() < 3 {
        match next(&mut events).await {
            Event::Connected(outbox) => {
                connected_at.push(std::time::Instant::now());
                outbox.send(session.connected(testing::at(0))).unwrap();
                kept.push(outbox);
            }
            Event::Frame(_) => {}
            Event::Lost(why) => reasons.push(why),
        }
    }
    assert!(reasons[0].contains("still reading"), "{reasons:?}");
    assert!(reasons[1].contains("restarting"), "{reasons:?}");
    assert!(connected_at[2] - connected_at[1] >= Duration::from_millis(300));
}

#[test]
fn plaintext_is_only_used_where_it_is_asked_for() {
    let servers = |url: &str, security: &Security| Servers::new(&[url.to_owned()], security);
    let nowhere = Files { ca: "/nonexistent/ca.pem".into(), identity: None };
    let tls = Security::Tls(nowhere);
    assert!(servers("http://control:7443", &Security::Plaintext).is_ok());
    assert!(servers("http://control:7443", &tls).unwrap_err().to_string().contains("plaintext"));
    assert!(servers("https://control:7443", &Security::Plaintext).is_err());
    for bad in ["control:7443", "https://control", "ftp://control:1", "", "http://"] {
        assert!(servers(bad, &Security::Plaintext).is_err(), "{bad}");
    }
    assert!(Servers::new(&[], &Security::Plaintext).is_err());
}

#[test]
fn an_encoded_frame_reads_back() {
    let server = Server::new(7, testing::cluster(2));
    let frames = server.full_frames();
    let response = batch::decode_response(frames[0].clone().into()).unwrap();
    assert!(response.kind.is_some());
}
