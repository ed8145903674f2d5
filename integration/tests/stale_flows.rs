//! UDP clients that keep their source port while endpoints come and go, with packets, in every
//! mode and both families. What follows a commit is waited for by sending on: an old flow that
//! is not cut would answer, or be silent, for as long as the client sends. Needs root.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lockstep_integration::lab::{Family, Lab, Place};
use lockstep_integration::product::{Mode, PATIENCE, Product, wait_until};
use lockstep_integration::traffic::POD_PORT;

const SERVICE: &str = "dns.yaml";
/// How long an answer may take. A request that is not answered is sent again.
const ANSWER: Duration = Duration::from_millis(250);
const OLD: Place = Place::Pod(1, 1);
const NEW: Place = Place::Pod(1, 2);

/// A frontend, and who asks there.
const FRONTENDS: [(&str, Place, [&str; 2]); 4] = [
    ("cluster IP", Place::Pod(1, 3), ["10.96.0.10:53", "[fd00:96::10]:53"]),
    ("node port", Place::Outside, ["10.200.0.11:30053", "[fd00:200::11]:30053"]),
    ("external IP", Place::Outside, ["192.0.2.10:53", "[2001:db8:1::10]:53"]),
    ("load balancer's address", Place::Outside, ["192.0.2.20:53", "[2001:db8:1::20]:53"]),
];

/// A Service that these pods of node 1 serve, over UDP and TCP.
fn manifest(pods: &[Place]) -> String {
    let mut text = "apiVersion: v1\nkind: Service\nmetadata: {name: dns, namespace: default, uid: uid-dns}\n\
        spec:\n  type: LoadBalancer\n  clusterIP: 10.96.0.10\n  clusterIPs: [10.96.0.10, 'fd00:96::10']\n  \
        ipFamilies: [IPv4, IPv6]\n  externalIPs: [192.0.2.10, '2001:db8:1::10']\n  ports:\n  \
        - {name: udp, port: 53, targetPort: 8080, protocol: UDP, nodePort: 30053}\n  \
        - {name: tcp, port: 53, targetPort: 8080, protocol: TCP, nodePort: 30053}\n\
        status: {loadBalancer: {ingress: [{ip: 192.0.2.20}, {ip: '2001:db8:1::20'}]}}\n"
        .to_owned();
    for (family, name) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
        let endpoints =
            pods.iter().map(|pod| format!("{{addresses: ['{}'], nodeName: node1}}", pod.address(family)));
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: dns-{}, namespace: default, labels: {{kubernetes.io/service-name: dns}}}}\n\
             addressType: {name}\nports: [{{name: udp, port: {POD_PORT}, protocol: UDP}}, {{name: tcp, port: {POD_PORT}}}]\n\
             endpoints: [{}]\n",
            name.to_lowercase(),
            endpoints.collect::<Vec<_>>().join(", ")
        );
    }
    text
}

/// There is something to program from the start.
const OTHER: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: other, namespace: default, uid: uid-other}\n\
    spec: {clusterIP: 10.96.0.77, clusterIPs: [10.96.0.77], ports: [{port: 53, protocol: UDP}]}\n";

fn product(mode: Mode) -> Result<Product> {
    let product = Product::new(Lab::new(1, 3)?, &[mode])?;
    product.write_manifest("nodes.yaml", &product.node_manifest())?;
    Ok(product)
}

/// A client of one flow: one socket, connected, for good.
struct Client {
    what: String,
    socket: UdpSocket,
}

impl Client {
    fn new(product: &Product, what: &str, from: Place, to: &str) -> Result<Self> {
        let to: SocketAddr = to.parse()?;
        let socket = product.lab.inside(from, || {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(ANSWER))?;
            std::io::Result::Ok(socket)
        })??;
        Ok(Self { what: format!("{what} ({to})"), socket })
    }

    /// Clients of every frontend in both families.
    fn everywhere(product: &Product) -> Result<Vec<Self>> {
        let each = FRONTENDS.iter().flat_map(|(what, from, to)| to.map(|to| (*what, *from, to)));
        each.map(|(what, from, to)| Self::new(product, what, from, to)).collect()
    }

    /// Asks once. `None` = no answer, or a refusal.
    fn ask(&self) -> Option<String> {
        let mut buffer = [0; 128];
        self.socket.send(b"?").ok()?;
        let length = self.socket.recv(&mut buffer).ok()?;
        String::from_utf8_lossy(&buffer[..length]).split(' ').next().map(str::to_owned)
    }

    /// Sends on until `by` answers; whoever else answers meanwhile was the flow before.
    fn reaches(&self, product: &Product, by: Place) -> Result<()> {
        let reached = wait_until(&format!("{}: {by} answers", self.what), PATIENCE, || {
            Ok((self.ask() == Some(by.to_string())).then_some(()))
        });
        reached.with_context(|| product.logs())
    }
}

fn entries(product: &Product, arguments: &[&str]) -> Result<String> {
    product.lab.tool(Place::Node(1), &[&["conntrack", "-L"], arguments].concat())
}

fn each_mode(test: impl Fn(Mode) -> Result<()>) -> Result<()> {
    for mode in Mode::ALL {
        test(mode).with_context(|| mode.name())?;
    }
    Ok(())
}

#[test]
fn a_client_reaches_the_new_endpoint_when_the_old_one_goes() -> Result<()> {
    each_mode(|mode| {
        let mut product = product(mode)?;
        product.write_manifest(SERVICE, &manifest(&[OLD]))?;
        product.start()?;
        let clients = Client::everywhere(&product)?;
        for client in &clients {
            client.reaches(&product, OLD)?;
        }
        product.lab.tool(Place::Outside, &["ip", "route", "add", "10.244.1.0/24", "via", "10.200.0.11"])?;
        // Of these the service knows nothing: a flow to a pod by its own address, and one through
        // the node to an address outside that has the number of the node port.
        let direct = Client::new(&product, "direct", Place::Outside, &format!("10.244.1.1:{POD_PORT}"))?;
        direct.reaches(&product, OLD)?;
        let through = Client::new(&product, "through", Place::Pod(1, 3), "10.200.0.100:30053")?;
        through.ask();
        // Each entry by its id: one that was cut and began again has another.
        let ids = |product: &Product| -> Result<Vec<String>> {
            let all = entries(product, &["-p", "udp", "-o", "id"])?;
            let is = |line: &&str| {
                line.contains("dst=10.200.0.100 sport=") || line.contains("dst=10.244.1.1 sport=")
            };
            let mut ids: Vec<_> = all
                .lines()
                .filter(is)
                .filter_map(|line| line.split(" id=").nth(1))
                .map(str::to_owned)
                .collect();
            ids.sort();
            Ok(ids)
        };
        let before = ids(&product)?;
        ensure!(before.len() == 2, "the foreign flows are not tracked: {before:?}");
        // A TCP connection lives on: its endpoint is still there to end it.
        let mut tcp = product.lab.inside(Place::Outside, || TcpStream::connect("10.200.0.11:30053"))??;

        product.change(|product| product.write_manifest(SERVICE, &manifest(&[NEW])))?;
        for client in &clients {
            client.reaches(&product, NEW)?;
        }
        ensure!(ids(&product)? == before, "foreign flows were touched: {before:?}");
        ensure!(direct.ask().as_deref() == Some("n1p1"), "a flow past the Service was touched");
        let mut answer = String::new();
        std::io::Read::read_to_string(&mut tcp, &mut answer)?;
        ensure!(answer.starts_with("n1p1"), "the TCP connection was answered {answer:?}");
        let (_, metrics) = product.http_get(Place::Node(1), 10249, "/metrics")?;
        for family in ["IPv4", "IPv6"] {
            let name =
                format!("kubeproxy_conntrack_reconciler_deleted_entries_total{{ip_family=\"{family}\"}} ");
            let cut = metrics.lines().find_map(|line| line.strip_prefix(&name)).context("no metric")?;
            ensure!(cut.parse::<u32>()? >= 4, "{family}: {cut} flows cut\n{metrics}");
        }
        Ok(())
    })
}

/// The flow begins when nothing knows the addresses, so it is tracked as it is and black-holed.
#[test]
fn a_client_that_began_before_there_were_rules_gets_through() -> Result<()> {
    each_mode(|mode| {
        let mut product = product(mode)?;
        product.write_manifest("other.yaml", OTHER)?;
        product.start()?;
        let clients = Client::everywhere(&product)?;
        let early = |product: &Product| -> Result<()> {
            for client in &clients {
                ensure!(
                    client.ask().is_none(),
                    "{}: answered by nobody's rules\n{}",
                    client.what,
                    product.logs()
                );
            }
            Ok(())
        };
        early(&product)?;
        product.change(|product| product.write_manifest(SERVICE, &manifest(&[NEW])))?;
        for client in &clients {
            client.reaches(&product, NEW)?;
        }
        Ok(())
    })
}

/// The agent was not there when the endpoint went: its first pass must cut, too.
#[test]
fn the_first_pass_of_an_agent_cuts_what_became_stale_while_there_was_none() -> Result<()> {
    let mut product = product(Mode::Nftables)?;
    product.write_manifest(SERVICE, &manifest(&[OLD]))?;
    product.start()?;
    let clients = Client::everywhere(&product)?;
    for client in &clients {
        client.reaches(&product, OLD)?;
    }
    product.agent(1)?.kill()?;
    product.take_in(|product| product.write_manifest(SERVICE, &manifest(&[NEW])))?;
    ensure!(clients[0].ask().as_deref() == Some("n1p1"), "without an agent everything stays");
    product.start_agent(1)?;
    for client in &clients {
        client.reaches(&product, NEW)?;
    }
    Ok(())
}
