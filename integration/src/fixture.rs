//! The small cluster that tests of the whole product start from.
//!
//! `web` is reached in every way there is and never changes; its endpoints are the first pod of
//! every node. `roll` has the second pods, as a test says.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};

use crate::lab::{Family, Lab, Place};
use crate::load::Stream;
use crate::product::{Mode, Product};
use crate::traffic::{Conversation, Outcome, POD_PORT, Transport, probe};

/// Node port of `web`.
pub const WEB_NODE_PORT: u16 = 30080;

/// Address and TCP port of `web` inside the cluster.
pub fn web(family: Family) -> SocketAddr {
    let address = match family {
        Family::V4 => [10, 96, 0, 10].into(),
        Family::V6 => [0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10].into(),
    };
    SocketAddr::new(address, 80)
}

/// Address and port of `roll`, IPv4 only.
pub fn roll() -> SocketAddr {
    ([10, 96, 0, 20], 80).into()
}

/// The pods behind `web`.
pub fn web_pods(product: &Product) -> BTreeSet<Place> {
    (1..=product.lab.nodes()).map(|node| Place::Pod(node, 1)).collect()
}

/// One node per mode, two pods each, with `web` and `roll`. Nothing runs yet but the pods.
pub fn product(modes: &[Mode]) -> Result<Product> {
    let product = Product::new(Lab::new(u8::try_from(modes.len())?, 2)?, modes)?;
    product.write_manifest("nodes.yaml", &product.node_manifest())?;
    product.write_manifest("web.yaml", &web_manifest(&web_pods(&product)))?;
    product.write_manifest("roll.yaml", &roll_manifest(&[Place::Pod(1, 2)]))?;
    Ok(product)
}

/// The same, running and verified everywhere.
pub fn started(modes: &[Mode]) -> Result<Product> {
    let mut product = product(modes)?;
    product.start()?;
    Ok(product)
}

/// Connections that are open: who asked, where, and the connection.
pub type Open = Vec<(Place, SocketAddr, Conversation)>;

/// Connections to `web` in these families and to `roll`, from everywhere a client can be.
pub fn conversations(product: &Product, families: &[Family]) -> Result<Open> {
    let mut open = Vec::new();
    for from in [Place::Pod(1, 1), Place::Node(1), Place::Outside] {
        for to in families.iter().map(|family| web(*family)).chain([roll()]) {
            open.push((from, to, Conversation::begin(&product.lab, from, to)?));
        }
    }
    Ok(open)
}

/// Fails where one of them does not go on. `when`: for people.
pub fn go_on(open: &mut Open, when: &str) -> Result<()> {
    open.iter_mut()
        .try_for_each(|(from, to, open)| open.go_on().with_context(|| format!("{from} -> {to}, {when}")))
}

/// Fails unless every one of some connections to `roll` is answered by this pod.
pub fn only_answer(product: &Product, pod: Place) -> Result<()> {
    for _ in 0..10 {
        let outcome = probe(&product.lab, Place::Node(1), Transport::Tcp, roll())?;
        ensure!(
            matches!(outcome, Outcome::Answered { by, .. } if by == pod),
            "expected an answer by {pod}: {outcome}\n{}",
            product.logs()
        );
    }
    Ok(())
}

fn web_manifest(pods: &BTreeSet<Place>) -> String {
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: default, uid: uid-web}}\n\
         spec:\n  type: NodePort\n  clusterIP: {v4}\n  clusterIPs: [{v4}, '{v6}']\n  ipFamilies: [IPv4, IPv6]\n  \
         ipFamilyPolicy: RequireDualStack\n  \
         ports:\n  - {{name: tcp, port: 80, targetPort: {POD_PORT}, protocol: TCP, nodePort: {WEB_NODE_PORT}}}\n  \
         - {{name: udp, port: 80, targetPort: {POD_PORT}, protocol: UDP}}\n",
        v4 = web(Family::V4).ip(),
        v6 = web(Family::V6).ip()
    );
    for family in [Family::V4, Family::V6] {
        text.push_str(&slice("web", family, &["TCP", "UDP"], pods.iter().copied()));
    }
    text
}

/// `roll` with these endpoints.
pub fn roll_manifest(pods: &[Place]) -> String {
    let address = roll().ip();
    let service = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: roll, namespace: default, uid: uid-roll}}\n\
         spec:\n  clusterIP: {address}\n  clusterIPs: [{address}]\n  ipFamilies: [IPv4]\n  \
         ports:\n  - {{name: tcp, port: 80, targetPort: {POD_PORT}, protocol: TCP}}\n"
    );
    service + &slice("roll", Family::V4, &["TCP"], pods.iter().copied())
}

fn slice(service: &str, family: Family, protocols: &[&str], pods: impl Iterator<Item = Place>) -> String {
    let mut text = format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {service}-{family}, namespace: default, labels: {{kubernetes.io/service-name: {service}}}}}\n\
         addressType: {family}\nports:\n"
    )
    .replace(&format!("{service}-{family}"), &format!("{service}-{family}").to_lowercase());
    for protocol in protocols {
        let name = protocol.to_lowercase();
        let _ = writeln!(text, "- {{name: {name}, port: {POD_PORT}, protocol: {protocol}}}");
    }
    text.push_str("endpoints:\n");
    for pod in pods {
        let Place::Pod(node, _) = pod else { continue };
        let address = pod.address(family);
        let _ = writeln!(
            text,
            "- {{addresses: ['{address}'], nodeName: node{node}, conditions: {{ready: true}}}}"
        );
    }
    text
}

/// Connections to `web` along every path: from a pod and the node itself, of every node, both
/// families, TCP and UDP, and from outside through the node port of every node.
pub fn streams_to_web(product: &Product) -> Vec<Stream> {
    let may_answer = web_pods(product);
    let stream = |from, seen_as, transport, to| Stream {
        from,
        to,
        transport,
        may_answer: may_answer.clone(),
        seen_as,
    };
    let mut streams = Vec::new();
    for node in 1..=product.lab.nodes() {
        let (here, pod) = (Place::Node(node), Place::Pod(node, 2));
        for family in [Family::V4, Family::V6] {
            streams.push(stream(pod, pod, Transport::Tcp, web(family)));
            let node_port = SocketAddr::new(here.address(family), WEB_NODE_PORT);
            streams.push(stream(Place::Outside, here, Transport::Tcp, node_port));
        }
        streams.push(stream(here, here, Transport::Tcp, web(Family::V4)));
        streams.push(stream(pod, pod, Transport::Udp, web(Family::V4)));
    }
    streams
}

/// Connections to `roll` from the first pod of every node; any second pod may answer.
pub fn streams_to_roll(product: &Product) -> Vec<Stream> {
    let nodes = 1..=product.lab.nodes();
    let may_answer: BTreeSet<Place> = nodes.clone().map(|node| Place::Pod(node, 2)).collect();
    nodes
        .map(|node| {
            let pod = Place::Pod(node, 1);
            let (transport, to) = (Transport::Tcp, roll());
            Stream { from: pod, to, transport, may_answer: may_answer.clone(), seen_as: pod }
        })
        .collect()
}
