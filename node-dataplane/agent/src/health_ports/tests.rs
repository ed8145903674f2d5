//! Health-check node ports on the loopback of whoever runs the tests, at ports the kernel picks.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::SystemTime;

use lockstep_model::{NodeContext, Port};
use lockstep_view::{NodePortAddresses, ServicePlan, ViewConfig};

use super::*;

struct Bench {
    ports: HealthPorts,
    status: Arc<Status>,
    /// The thread of the tasks ends when this is dropped.
    _tasks: oneshot::Sender<()>,
}

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("shop", name)
}

/// A plan of Services with this health check each; node ports answer on the loopback.
fn plan(services: &[(&str, u16, usize)]) -> ForwardingPlan {
    let mut node =
        ViewConfig { node_port_addresses: NodePortAddresses::Primary, ..ViewConfig::new("node-a") }
            .node_plan(&NodeContext::unknown("node-a"), &[], &[]);
    node.node_ports_v4 = NodePortScope::Addresses(vec![Ipv4Addr::LOCALHOST.into()]);
    let service = |(name, port, local_endpoints): &(&str, u16, usize)| {
        let check = HealthCheck { port: Port::new(*port).unwrap(), local_endpoints: *local_endpoints };
        let plan = ServicePlan {
            key: key(name),
            ports: Vec::new(),
            required_features: Vec::new(),
            health_check: Some(check),
            conflicts: Vec::new(),
            cluster_ips: Vec::new(),
        };
        (key(name), Arc::new(plan))
    };
    ForwardingPlan { node, services: services.iter().map(service).collect() }
}

/// Different ports that are free now.
fn free<const COUNT: usize>() -> [u16; COUNT] {
    let listeners = [(); COUNT].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.each_ref().map(|listener| listener.local_addr().unwrap().port())
}

/// Status line, headers in lower case, body.
fn ask(port: u16, request: &str) -> io::Result<(String, String, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    write!(stream, "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let (status, headers) = head.split_once("\r\n").unwrap();
    Ok((status.to_owned(), headers.to_lowercase(), body.to_owned()))
}

impl Bench {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        let (tasks, ended) = oneshot::channel::<()>();
        std::thread::spawn(move || runtime.block_on(ended));
        let status = Arc::new(Status::default());
        status.update(|status| status.programmed = Some(SystemTime::now()));
        let ports = HealthPorts::new(handle, status.clone(), vec![Family::V4]);
        Self { ports, status, _tasks: tasks }
    }

    fn all(&mut self, plan: &ForwardingPlan) {
        self.ports.committed(plan, None, &|_| false);
    }

    fn some(&mut self, plan: &ForwardingPlan, names: &[&str]) {
        let changed: Vec<_> = names.iter().map(|name| key(name)).collect();
        self.ports.committed(plan, Some(&changed), &|_| false);
    }
}

#[test]
fn any_path_and_method_is_answered_as_kube_proxy_does() {
    let (mut bench, [port]) = (Bench::new(), free());
    bench.all(&plan(&[("cart", port, 2)]));
    for request in ["GET /", "GET /healthz?x=1", "POST /any/where", "DELETE /"] {
        let (status, headers, body) = ask(port, request).unwrap();
        assert_eq!(status, "HTTP/1.1 200 OK", "{request}");
        for header in [
            "content-type: application/json",
            "x-content-type-options: nosniff",
            "x-load-balancing-endpoint-weight: 2",
        ] {
            assert!(headers.lines().any(|line| line == header), "{request}: {headers}");
        }
        assert_eq!(
            body,
            r#"{"service":{"namespace":"shop","name":"cart"},"localEndpoints":2,"serviceProxyHealthy":true}"#
        );
    }
    assert_eq!(bench.ports.complaints(), None);
}

#[test]
fn without_endpoints_or_a_healthy_proxy_it_is_503() {
    let (mut bench, [port]) = (Bench::new(), free());
    bench.all(&plan(&[("cart", port, 1)]));
    bench.some(&plan(&[("cart", port, 0)]), &["cart"]);
    let (status, headers, body) = ask(port, "GET /").unwrap();
    assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
    assert!(
        headers.contains("x-load-balancing-endpoint-weight: 0") && body.contains(r#""localEndpoints":0"#)
    );
    bench.some(&plan(&[("cart", port, 3)]), &["cart"]);
    assert_eq!(ask(port, "GET /").unwrap().0, "HTTP/1.1 200 OK");
    bench.status.update(|status| status.programmed = None);
    let (status, _, body) = ask(port, "GET /").unwrap();
    assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
    assert!(body.contains(r#""localEndpoints":3,"serviceProxyHealthy":false"#), "{body}");
}

#[test]
fn servers_come_move_and_go_with_their_services() {
    let (mut bench, [one, two]) = (Bench::new(), free());
    bench.all(&plan(&[("cart", one, 1)]));
    bench.some(&plan(&[("cart", two, 1)]), &["cart"]);
    assert!(ask(one, "GET /").is_err(), "the old port answers");
    assert!(ask(two, "GET /").is_ok());
    // Its port is another's in the same pass.
    bench.all(&plan(&[("till", two, 5)]));
    assert!(ask(two, "GET /").unwrap().2.contains("till"));
    assert_eq!(bench.ports.complaints(), None);
    // As are two ports that change hands, whichever Service comes first.
    bench.some(&plan(&[("cart", one, 1), ("till", two, 5)]), &["cart"]);
    bench.some(&plan(&[("cart", two, 1), ("till", one, 5)]), &["cart", "till"]);
    assert!(ask(two, "GET /").unwrap().2.contains("cart") && ask(one, "GET /").unwrap().2.contains("till"));
    assert_eq!(bench.ports.complaints(), None);
    bench.some(&plan(&[("till", two, 5)]), &["cart", "till"]);
    assert!(ask(one, "GET /").is_err() && ask(two, "GET /").unwrap().2.contains("till"));
    bench.some(&plan(&[]), &["till"]);
    assert!(ask(two, "GET /").is_err(), "a Service that is gone answers");
    // A Service that is not in force as planned keeps what it had.
    bench.all(&plan(&[("cart", one, 1)]));
    bench.ports.committed(&plan(&[("cart", one, 0)]), Some(&[key("cart")]), &|_| true);
    assert_eq!(ask(one, "GET /").unwrap().0, "HTTP/1.1 200 OK");
}

#[test]
fn an_open_connection_ends_with_its_service() {
    let (mut bench, [port]) = (Bench::new(), free());
    bench.all(&plan(&[("cart", port, 1)]));
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut first = [0; 16];
    stream.read_exact(&mut first).unwrap();
    bench.all(&plan(&[]));
    let mut rest = String::new();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.read_to_string(&mut rest).unwrap();
}

#[test]
fn a_port_that_is_taken_harms_nobody_else_and_is_tried_again() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (mut bench, [free]) = (Bench::new(), free());
    let port = taken.local_addr().unwrap().port();
    bench.all(&plan(&[("cart", port, 1), ("till", free, 1)]));
    assert!(ask(free, "GET /").is_ok());
    let complaints = bench.ports.complaints().unwrap();
    assert_eq!((complaints.len(), complaints[0].kind), (1, ComplaintKind::Conflict));
    assert_eq!(complaints[0].service, key("cart"));
    let message = &complaints[0].message;
    assert!(
        message.contains("healthCheckNodePort") && message.contains(&format!("127.0.0.1:{port}")),
        "{message}"
    );
    assert_eq!(bench.ports.complaints(), None, "not due yet");
    drop(taken);
    let mended = bench.ports.services.get_mut(&key("cart")).unwrap();
    mended.fault.as_mut().unwrap().retry_at = Instant::now();
    assert_eq!(bench.ports.complaints(), Some(Vec::new()));
    assert!(ask(port, "GET /").is_ok());
}
