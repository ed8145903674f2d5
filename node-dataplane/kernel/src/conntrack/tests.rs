//! The messages by themselves, and against the kernel in a namespace of its own (needs root).

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;

use super::fake::FakeConntrack;
use super::message::{put_delete, put_dump, put_new, read_flow};
use super::{Conntrack, Flow, Kernel};
use crate::netlink::Messages;
use crate::{netns, route};

const UDP: u8 = 17;

fn flow(source: &str, destination: &str, answers_from: &str) -> Flow {
    let [source, destination, answers_from] =
        [source, destination, answers_from].map(|text| text.parse::<SocketAddr>().unwrap());
    Flow { protocol: UDP, source, destination, answers_from, zone: 0, id: 7 }
}

#[test]
fn a_flow_is_read_as_the_kernel_writes_it() {
    for flow in [
        flow("10.0.0.1:4000", "172.30.0.1:53", "10.1.0.1:5353"),
        Flow { zone: 9, ..flow("[fd00::1]:4000", "[fd00:30::1]:53", "[fd00:1::1]:5353") },
    ] {
        let mut bytes = Vec::new();
        put_new(&mut bytes, &flow, 3);
        let messages: Vec<_> = Messages::of(&bytes).collect();
        assert_eq!(messages.len(), 1);
        assert_eq!(read_flow(&messages[0]), Some(flow));
        // Whatever is cut short is no flow, and no panic.
        for end in 0..messages[0].payload.len() {
            let part = crate::netlink::Message { payload: &messages[0].payload[..end], ..messages[0] };
            let read = read_flow(&part);
            assert!(read.is_none(), "{end} bytes: {read:?}");
        }
    }
    let mut bytes = Vec::new();
    put_delete(&mut bytes, &flow("10.0.0.1:1", "10.0.0.2:2", "10.0.0.2:2"), 1);
    assert_eq!(Messages::of(&bytes).filter_map(|message| read_flow(&message)).count(), 0);
}

#[test]
fn a_dump_without_a_filter_is_a_header_and_the_family() {
    let mut bytes = Vec::new();
    put_dump(&mut bytes, true, None, 5);
    assert_eq!(bytes.len(), 20);
    assert_eq!(bytes[16], 10);
}

#[test]
fn the_fake_ends_what_was_listed_and_not_what_took_its_place() {
    let mut fake = FakeConntrack::default();
    let one = flow("10.0.0.1:4000", "172.30.0.1:53", "10.1.0.1:5353");
    let tcp = Flow { protocol: 6, ..one };
    fake.lock().flows = vec![one, tcp];
    let mut seen = Vec::new();
    fake.flows(false, UDP, &mut |flow| seen.push(*flow)).unwrap();
    assert_eq!(seen, [one]);
    let successor = Flow { id: 8, ..one };
    fake.lock().flows = vec![successor, tcp];
    assert_eq!(fake.end(&seen).unwrap(), 0);
    assert_eq!(fake.lock().flows, [successor, tcp]);
}

/// Runs in a new namespace that tracks flows over its loopback.
fn tracked(work: impl FnOnce() + Send) {
    netns::run_in_new(|| {
        let nft = "add table inet t
            add chain inet t out { type filter hook output priority 0; ct state new accept; }";
        for line in [&["ip", "link", "set", "lo", "up"][..], &["nft", nft]] {
            assert!(Command::new(line[0]).args(&line[1..]).status().unwrap().success());
        }
        work();
    })
    .unwrap();
}

fn flows(kernel: &mut Kernel, v6: bool, protocol: u8) -> Vec<Flow> {
    let mut flows = Vec::new();
    kernel.flows(v6, protocol, &mut |flow| flows.push(*flow)).unwrap();
    flows.sort_by_key(|flow| flow.source);
    flows
}

#[test]
fn the_kernel_lists_one_protocol_of_one_family_and_ends_what_it_is_told() {
    tracked(|| {
        let mut kernel = Kernel::open().unwrap();
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let server6 = UdpSocket::bind("[::1]:0").unwrap();
        let clients: Vec<_> = (0..2_500).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        for client in &clients {
            client.send_to(b"?", server.local_addr().unwrap()).unwrap();
        }
        let client6 = UdpSocket::bind("[::1]:0").unwrap();
        client6.send_to(b"?", server6.local_addr().unwrap()).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let _stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();

        let udp = flows(&mut kernel, false, UDP);
        let mut expected: Vec<_> = clients.iter().map(|client| client.local_addr().unwrap()).collect();
        expected.sort();
        assert_eq!(udp.iter().map(|flow| flow.source).collect::<Vec<_>>(), expected);
        let at = server.local_addr().unwrap();
        assert!(udp.iter().all(|flow| (flow.destination, flow.answers_from) == (at, at)));
        // The kernel itself leaves the TCP flow out.
        let mut listed = |filter| {
            let (mut request, mut count) = (Vec::new(), 0);
            put_dump(&mut request, false, filter, 1);
            kernel.socket.dump("test", &request, &mut |_| count += 1).unwrap();
            count
        };
        assert_eq!((listed(None), listed(Some(UDP)), listed(Some(6))), (2_501, 2_500, 1));
        assert!(kernel.filters, "the kernel took the filter");
        kernel.filters = false;
        assert_eq!(flows(&mut kernel, false, UDP), udp, "with and without the kernel's filter");
        kernel.filters = true;
        assert_eq!(flows(&mut kernel, true, UDP).len(), 1);
        assert_eq!(flows(&mut kernel, false, 6).len(), 1);

        // One too few, and one that is not there with this id.
        let (spared, rest) = udp.split_last().unwrap();
        let mut doomed = rest.to_vec();
        doomed.push(Flow { id: spared.id.wrapping_add(1), ..*spared });
        assert_eq!(kernel.end(&doomed).unwrap(), rest.len());
        assert_eq!(flows(&mut kernel, false, UDP), [*spared]);
        assert_eq!(kernel.end(&doomed).unwrap(), 0, "gone already");
        assert_eq!((flows(&mut kernel, true, UDP).len(), flows(&mut kernel, false, 6).len()), (1, 1));
    });
}

#[test]
fn the_kernel_knows_its_own_addresses() {
    tracked(|| {
        let line = ["ip", "route", "add", "local", "192.0.2.9", "dev", "lo"];
        assert!(Command::new(line[0]).args(&line[1..]).status().unwrap().success());
        let mut routes = route::Kernel::open().unwrap();
        let mut local = |text: &str| routes.is_local(text.parse().unwrap()).unwrap();
        assert!(local("127.0.0.1") && local("192.0.2.9") && local("::1"));
        assert!(!local("192.0.2.8") && !local("fd00::1"));
    });
}
