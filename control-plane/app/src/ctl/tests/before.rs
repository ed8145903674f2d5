//! A control plane of the release before, which knows no ServiceCIDRs.

use lockstep_wire::v1::sync_service_server::{SyncService, SyncServiceServer};
use tonic::{Code, Request, Response, Status, Streaming};

use super::*;
use crate::ctl::args::Command;
use crate::ctl::{client, explain};

/// Hands over to a server of this release, but for what an older one refuses.
struct Before(SyncServiceClient<Channel>);

#[tonic::async_trait]
impl SyncService for Before {
    type SyncStream = Streaming<v1::SyncResponse>;
    type FetchSnapshotStream = Streaming<v1::FetchSnapshotResponse>;

    async fn sync(
        &self,
        request: Request<Streaming<v1::SyncRequest>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        drop(request);
        Err(Status::unimplemented("explain asks for snapshots"))
    }

    async fn fetch_snapshot(
        &self,
        request: Request<v1::FetchSnapshotRequest>,
    ) -> Result<Response<Self::FetchSnapshotStream>, Status> {
        let request = request.into_inner();
        if request.kinds().any(|kind| kind == v1::ResourceKind::ServiceCidr) {
            return Err(Status::new(Code::InvalidArgument, "kinds: 3: is not a kind this release knows"));
        }
        self.0.clone().fetch_snapshot(request).await
    }
}

async fn connect(address: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

#[tokio::test]
async fn an_older_control_plane_is_asked_for_what_it_has() {
    let world = World::new().await;
    let _node = world.node("n1", vec![]).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let before = Before(SyncServiceClient::new(connect(world.address).await));
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(SyncServiceServer::new(before))
            .serve_with_incoming(incoming),
    );
    let line = "lockstepctl explain --node n1 --from 10.1.0.9 tcp 10.96.0.1:80";
    let Command::Explain(question) = Args::try_parse_from(line.split_whitespace()).unwrap().command else {
        panic!("another command")
    };
    let status = client::status(connect(world.address).await);
    let sync = client::sync(connect(address).await);
    let explained = explain::explain_with(status, sync, &question).await.unwrap();
    let it = serde_json::to_value(&explained).unwrap();
    assert_eq!((&it["verdict"], &it["service"]["name"]), (&"Forwarded".into(), &"web".into()));
    let notes = it["notes"].to_string();
    assert!(notes.contains("the control plane does not serve ServiceCIDRs"), "{notes}");
}
