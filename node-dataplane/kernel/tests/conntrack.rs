//! Connection tracking of the kernel, in a namespace of its own. Needs root.
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

use std::net::UdpSocket;
use std::process::Command;

use lockstep_kernel::conntrack::{Conntrack, Flow, Kernel};
use lockstep_kernel::{netns, route};

const UDP: u8 = 17;

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
        assert_eq!(kernel.passed_over(), 0, "the kernel itself leaves the TCP flow out");
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
