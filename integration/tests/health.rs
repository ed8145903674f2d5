//! What load balancers ask a node, over real sockets: `/healthz`, `/livez`, and the health-check
//! node ports of Services. Node 1 is in nftables mode, 2 and 3 in the flavours of iptables.
//! Needs root.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result, ensure};
use lockstep_integration::lab::{Family, Lab, Place};
use lockstep_integration::product::{Mode, PATIENCE, Product, wait_until};
use lockstep_integration::traffic::{Outcome, Transport, probe};

const CHECK: u16 = 32100;
const OTHER_CHECK: u16 = 32101;
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// A load-balancer Service with external policy Local and these endpoints.
fn service(name: &str, number: u8, check: u16, pods: &[Place]) -> String {
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default, uid: uid-{name}}}\n\
         spec:\n  type: LoadBalancer\n  clusterIP: 10.96.0.{number}\n  clusterIPs: [10.96.0.{number}, 'fd00:96::{number}']\n  \
         ipFamilies: [IPv4, IPv6]\n  externalTrafficPolicy: Local\n  healthCheckNodePort: {check}\n  \
         ports: [{{name: http, port: 80, targetPort: 8080, nodePort: {}}}]\n\
         status: {{loadBalancer: {{ingress: [{{ip: 192.0.2.{number}}}]}}}}\n",
        30_000 + u16::from(number)
    );
    for (family, kind) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
        let endpoint = |pod: &Place| {
            let Place::Pod(node, _) = pod else { return String::new() };
            format!("{{addresses: ['{}'], nodeName: node{node}}}", pod.address(family))
        };
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {name}-{}, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}\n\
             addressType: {kind}\nports: [{{name: http, port: 8080}}]\nendpoints: [{}]\n",
            kind.to_lowercase(),
            pods.iter().map(endpoint).collect::<Vec<_>>().join(", ")
        );
    }
    text
}

fn started() -> Result<Product> {
    let mut product = Product::new(Lab::new(3, 2)?, &Mode::ALL)?;
    product.write_manifest("nodes.yaml", &product.node_manifest())?;
    product.write_manifest("web.yaml", &service("web", 10, CHECK, &[Place::Pod(1, 1), Place::Pod(1, 2)]))?;
    product.start()?;
    Ok(product)
}

/// Status, headers in lower case, body.
fn request(product: &Product, to: SocketAddr, line: &str) -> Result<(u16, String, String)> {
    let text = product.lab.inside(Place::Outside, || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "{line} HTTP/1.1\r\nHost: balancer\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?;
    let text = text.with_context(|| format!("{line} at {to}\n{}", product.logs()))?;
    let (head, body) = text.split_once("\r\n\r\n").context("no end of the HTTP headers")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.with_context(|| format!("no status in {head:?}"))?, head.to_lowercase(), body.to_owned()))
}

/// Fails unless every address of the node says that it has so many endpoints.
fn weighs(product: &Product, node: u8, port: u16, endpoints: usize) -> Result<()> {
    for family in FAMILIES {
        let at = (Place::Node(node).address(family), port).into();
        let (status, head, body) = request(product, at, "GET /whatever")?;
        let expected = if endpoints > 0 { 200 } else { 503 };
        let weight = format!("x-load-balancing-endpoint-weight: {endpoints}");
        ensure!(
            status == expected
                && head.lines().any(|line| line == weight)
                && body.contains(&format!(r#""localEndpoints":{endpoints},"serviceProxyHealthy":true"#)),
            "node{node} {at}: expected {expected} with {endpoints}: {head}\n{body}\n{}",
            product.logs()
        );
    }
    Ok(())
}

fn refuses(product: &Product, to: IpAddr, port: u16) -> Result<bool> {
    let connected =
        product.lab.inside(Place::Outside, || TcpStream::connect_timeout(&(to, port).into(), PATIENCE))?;
    Ok(matches!(connected, Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused))
}

#[test]
fn health_check_node_ports_say_how_many_endpoints_a_node_has_as_services_come_and_go() -> Result<()> {
    let product = started()?;
    // Somebody's firewall must not be in the way: kube-proxy's iptables mode sees to that.
    for (node, tool) in [(2, "iptables-legacy"), (3, "iptables-nft")] {
        product.lab.tool(
            Place::Node(node),
            &[tool, "-A", "INPUT", "-p", "tcp", "--dport", &CHECK.to_string(), "-j", "DROP"],
        )?;
    }
    // Distinct addresses count: two pods, each with one of each family.
    weighs(&product, 1, CHECK, 4)?;
    weighs(&product, 2, CHECK, 0)?;
    weighs(&product, 3, CHECK, 0)?;
    let at = (Place::Node(1).address(Family::V4), CHECK).into();
    ensure!(request(&product, at, "POST /")?.0 == 200, "any method");

    product.change(|product| {
        product.write_manifest("web.yaml", &service("web", 10, CHECK, &[Place::Pod(2, 1), Place::Pod(3, 1)]))
    })?;
    // No waiting: what is verified is what is said.
    weighs(&product, 1, CHECK, 0)?;
    weighs(&product, 2, CHECK, 2)?;
    weighs(&product, 3, CHECK, 2)?;

    product.change(|product| {
        product.write_manifest("web.yaml", &service("web", 10, OTHER_CHECK, &[Place::Pod(2, 1)]))
    })?;
    for node in 1..=3 {
        weighs(&product, node, OTHER_CHECK, if node == 2 { 2 } else { 0 })?;
    }
    ensure!(refuses(&product, Place::Node(1).address(Family::V4), CHECK)?, "the old port is still open");
    product.change(|product| product.remove_manifest("web.yaml"))?;
    for family in FAMILIES {
        ensure!(
            refuses(&product, Place::Node(1).address(family), OTHER_CHECK)?,
            "a Service that is gone answers"
        );
    }
    Ok(())
}

#[test]
fn a_health_check_port_that_is_taken_is_a_failure_of_that_service_alone_until_it_is_free() -> Result<()> {
    let product = started()?;
    let taken = |node: u8| {
        let at: SocketAddr = (Place::Node(node).address(Family::V4), OTHER_CHECK).into();
        product.lab.inside(Place::Node(node), || TcpListener::bind(at))
    };
    let taken = (1..=3).map(|node| Ok(taken(node)??)).collect::<Result<Vec<TcpListener>>>()?;
    product.take_in(|product| {
        product.write_manifest("till.yaml", &service("till", 20, OTHER_CHECK, &[Place::Pod(1, 1)]))
    })?;
    wait_until("every node reports the port", PATIENCE, || {
        let groups = product.list_failures()?.groups;
        let found =
            groups.into_iter().find(|group| group.r#ref.as_ref().is_some_and(|it| it.key == "default/till"));
        let Some(group) = found.filter(|group| group.node_count == 3) else { return Ok(None) };
        ensure!(
            group.reason() == lockstep_wire::v1::FailureReason::Conflict
                && group.sample_message.contains("healthCheckNodePort")
                && group.sample_message.contains(&OTHER_CHECK.to_string()),
            "{group:?}"
        );
        Ok(Some(()))
    })
    .with_context(|| product.logs())?;
    // Nothing else is concerned: not the Service, not the other one, and every node is verified.
    let outcome = probe(&product.lab, Place::Pod(1, 2), Transport::Tcp, "10.96.0.20:80".parse()?)?;
    ensure!(matches!(outcome, Outcome::Answered { by: Place::Pod(1, 1), .. }), "{outcome}");
    weighs(&product, 1, CHECK, 4)?;
    wait_until("no node is held up", PATIENCE, || {
        let response = product.list_nodes()?;
        let head = response.head.unwrap_or_default().seq;
        Ok(response.nodes.iter().all(|node| node.verified_seq == head).then_some(()))
    })?;
    drop(taken);
    product.wait_verified(1)?;
    weighs(&product, 1, OTHER_CHECK, 2)?;
    weighs(&product, 2, OTHER_CHECK, 0)
}

#[test]
fn a_node_on_its_way_out_is_alive_and_not_for_load_balancers() -> Result<()> {
    let product = started()?;
    let says = |path: &str| product.http_get(Place::Node(1), 10256, path);
    let nodes = product.node_manifest();
    let tainted = nodes.replace(
        "spec:\n",
        "spec:\n  taints: [{key: ToBeDeletedByClusterAutoscaler, value: '1795233600', effect: NoSchedule}]\n",
    );
    let leaving = nodes.replace("metadata:\n", "metadata:\n  deletionTimestamp: '2026-11-21T04:00:00Z'\n");
    let unknown = "";
    for (what, manifest) in [("a taint", tainted.as_str()), ("a deletion", &leaving), ("no Node", unknown)] {
        let (status, body) = says("/healthz")?;
        ensure!(status == 200 && body.contains(r#""nodeEligible":true"#), "before {what}: {status} {body}");
        product.write_manifest("nodes.yaml", manifest)?;
        wait_until(&format!("/healthz says 503 for {what}"), PATIENCE, || {
            let (status, body) = says("/healthz")?;
            Ok((status == 503 && body.contains(r#""nodeEligible":false"#)).then_some(()))
        })
        .with_context(|| product.logs())?;
        let (status, body) = says("/livez")?;
        ensure!(status == 200 && !body.contains("nodeEligible"), "{what}: /livez: {status} {body}");
        product.write_manifest("nodes.yaml", &nodes)?;
        wait_until("/healthz says 200 again", PATIENCE, || Ok((says("/healthz")?.0 == 200).then_some(())))?;
    }
    // The health checks of Services are about endpoints, and are where the node's addresses are,
    // which came back with the Node.
    wait_until("the health check answers again", PATIENCE, || Ok(weighs(&product, 1, CHECK, 4).ok()))
}
