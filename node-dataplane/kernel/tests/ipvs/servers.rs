//! Virtual servers and their real servers.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use lockstep_kernel::dummy::{self, Device};
use lockstep_kernel::ipvs::fake::FakeIpvs;
use lockstep_kernel::ipvs::{
    Connections, Ipvs, Kernel, Key, PERSISTENT, RealServer, Refused, Request, SCHED_MH_FALLBACK,
    SCHED_MH_PORT, Timeouts, VirtualServer,
};
use lockstep_kernel::{Errno, netns};

use super::{DEVICE, address, run};

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
/// There is no such virtual server.
const NO_SERVER: Errno = Errno(libc::ESRCH);

/// Changes in one namespace disturb listings in another, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

/// Runs in a new namespace with open sockets of its IPVS.
fn ipvs(work: impl FnOnce(&mut Kernel) + Send) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    run("modprobe", "-a ip_vs ip_vs_rr ip_vs_mh");
    netns::run_in_new(|| {
        // Where a namespace has no address at all, no IPv4 address is one for a real server.
        run("ip", "link set lo up");
        work(&mut Kernel::open().unwrap());
    })
    .expect("these tests need root");
}

/// Runs with the kernel's IPVS, and with that in memory, which must be no different.
fn ipvs_and_fake(work: impl Fn(&mut dyn Ipvs) + Sync) {
    ipvs(|kernel| work(kernel));
    let fake = FakeIpvs::default();
    fake.lock().schedulers = vec!["rr".into(), "mh".into()];
    work(&mut fake.clone());
}

fn key(v6: bool, protocol: u8, n: u32) -> Key {
    Key { protocol, address: address(v6, n), port: 80 }
}

fn server(key: Key, scheduler: &str, flags: u32, timeout: u32) -> VirtualServer {
    let netmask = if key.address.is_ipv6() { 128 } else { u32::MAX };
    VirtualServer { key, scheduler: scheduler.into(), flags, timeout, netmask }
}

fn real(v6: bool, n: u32, port: u16) -> RealServer {
    let address = match v6 {
        false => Ipv4Addr::from(0x0af4_0000 + n).into(),
        true => Ipv6Addr::from((0xfd00_00f4 << 96) + u128::from(n)).into(),
    };
    RealServer { address, port, weight: 1, forwarding: 0 }
}

fn reals(kernel: &mut dyn Ipvs, key: Key) -> Vec<RealServer> {
    let listed = kernel.real_servers(key).unwrap();
    assert!(listed.iter().all(|(_, connections)| *connections == Connections::default()));
    listed.into_iter().map(|(real, _)| real).collect()
}

/// One of every family, protocol and way to choose.
fn every_kind() -> Vec<VirtualServer> {
    let mut servers = Vec::new();
    for (v6, protocol) in [false, true].into_iter().flat_map(|v6| [TCP, UDP, SCTP].map(|p| (v6, p))) {
        let kinds = [
            ("rr", 0, 0),
            ("rr", PERSISTENT, 10_800),
            ("mh", SCHED_MH_FALLBACK | SCHED_MH_PORT, 0),
            ("mh", PERSISTENT | SCHED_MH_FALLBACK | SCHED_MH_PORT, 86_400),
        ];
        for (n, (scheduler, flags, timeout)) in (1..).zip(kinds) {
            servers.push(server(key(v6, protocol, n), scheduler, flags, timeout));
        }
    }
    servers.sort_by_key(|server| server.key);
    servers
}

#[test]
fn virtual_servers_of_every_kind_are_listed_as_they_were_written() {
    ipvs_and_fake(|kernel| {
        assert_eq!(kernel.virtual_servers().unwrap(), []);
        let mut servers = every_kind();
        let add: Vec<_> = servers.iter().cloned().map(Request::Add).collect();
        assert_eq!(kernel.commit(&add).unwrap(), []);
        assert_eq!(kernel.virtual_servers().unwrap(), servers);
        assert_eq!(kernel.count().unwrap(), 12, "IPv4 ones");
        for server in &servers {
            assert_eq!(kernel.virtual_server(server.key).unwrap().as_ref(), Some(server));
            assert_eq!(reals(kernel, server.key), []);
        }
        let none = key(false, TCP, 99);
        assert_eq!(kernel.virtual_server(none).unwrap(), None);
        assert_eq!(reals(kernel, none), []);

        // Each becomes something else.
        for server in &mut servers {
            let persistent = server.flags & PERSISTENT != 0;
            (server.flags, server.timeout) = if persistent { (0, 0) } else { (PERSISTENT, 60) };
            server.scheduler = "rr".into();
        }
        let set: Vec<_> = servers.iter().cloned().map(Request::Set).collect();
        assert_eq!(kernel.commit(&set).unwrap(), []);
        assert_eq!(kernel.virtual_servers().unwrap(), servers);
    });
}

#[test]
fn a_flush_is_seen_by_the_count_and_a_firewall_mark_is_nobodys() {
    ipvs(|kernel| {
        let one = server(key(false, TCP, 1), "rr", 0, 0);
        assert_eq!(kernel.commit(&[Request::Add(one.clone())]).unwrap(), []);
        run("ipvsadm", "-A -f 7 -s rr");
        assert_eq!(kernel.virtual_servers().unwrap(), [one]);
        assert_eq!(kernel.count().unwrap(), 2);
        run("ipvsadm", "-C");
        assert_eq!(kernel.count().unwrap(), 0);
        assert_eq!(kernel.virtual_servers().unwrap(), []);
    });
}

#[test]
fn real_servers_are_added_changed_and_removed() {
    ipvs_and_fake(|kernel| {
        for v6 in [false, true] {
            let key = key(v6, TCP, 1);
            let mut there = vec![real(v6, 1, 8080), real(v6, 1, 8081), real(v6, 2, 8080)];
            let mut requests = vec![Request::Add(server(key, "rr", 0, 0))];
            requests.extend(there.iter().map(|real| Request::AddReal(key, *real)));
            assert_eq!(kernel.commit(&requests).unwrap(), []);
            assert_eq!(reals(kernel, key), there);
            there[1].weight = 0;
            let gone = there.remove(2);
            let requests =
                [Request::SetReal(key, there[1]), Request::RemoveReal(key, gone.address, gone.port)];
            assert_eq!(kernel.commit(&requests).unwrap(), []);
            assert_eq!(reals(kernel, key), there);
            assert_eq!(kernel.commit(&[Request::Remove(key)]).unwrap(), []);
            assert_eq!(reals(kernel, key), []);
        }
    });
}

#[test]
fn every_refusal_is_at_its_request_and_the_rest_is_done() {
    ipvs_and_fake(|kernel| {
        for v6 in [false, true] {
            let (there, none) = (key(v6, TCP, 1), key(v6, TCP, 2));
            let requests = [
                Request::Add(server(there, "rr", 0, 0)),
                Request::Add(server(there, "rr", 0, 0)),
                Request::Add(server(none, "missing", 0, 0)),
                Request::Set(server(none, "rr", 0, 0)),
                Request::Remove(none),
                Request::AddReal(there, real(v6, 1, 80)),
                Request::AddReal(there, real(v6, 1, 80)),
                Request::AddReal(none, real(v6, 1, 80)),
                Request::SetReal(there, real(v6, 2, 80)),
                Request::SetReal(none, real(v6, 2, 80)),
                Request::RemoveReal(there, real(v6, 2, 80).address, 80),
                Request::RemoveReal(none, real(v6, 2, 80).address, 80),
                Request::AddReal(there, real(v6, 3, 80)),
            ];
            let expected = [
                (1, Errno::EXIST),
                (2, Errno::NOENT),
                (3, NO_SERVER),
                (4, NO_SERVER),
                (6, Errno::EXIST),
                (7, NO_SERVER),
                (8, Errno::NOENT),
                (9, NO_SERVER),
                (10, Errno::NOENT),
                (11, NO_SERVER),
            ]
            .map(|(index, errno)| Refused { index, errno });
            assert_eq!(kernel.commit(&requests).unwrap(), expected);
            assert_eq!(reals(kernel, there), [real(v6, 1, 80), real(v6, 3, 80)]);
        }
        let narrow = VirtualServer { netmask: 129, ..server(key(true, UDP, 3), "rr", 0, 0) };
        assert_eq!(
            kernel.commit(&[Request::Add(narrow)]).unwrap(),
            [Refused { index: 0, errno: Errno::INVAL }]
        );
    });
}

#[test]
fn thousands_of_refusals_are_all_told() {
    ipvs_and_fake(|kernel| {
        // Every third is done.
        let requests: Vec<_> = (0..9_000)
            .map(|n| match n % 3 {
                0 => Request::Add(server(key(n % 2 == 0, TCP, n), "rr", 0, 0)),
                _ => Request::Remove(key(false, UDP, n)),
            })
            .collect();
        let refused = kernel.commit(&requests).unwrap();
        let expected: Vec<_> = (0..9_000)
            .filter(|index| index % 3 != 0)
            .map(|index| Refused { index, errno: NO_SERVER })
            .collect();
        assert_eq!(refused, expected);
        assert_eq!(kernel.virtual_servers().unwrap().len(), 3_000);
        assert_eq!(kernel.count().unwrap(), 1_500);
    });
}

#[test]
fn a_thousand_virtual_servers_with_ten_real_servers_each_are_one_commit() {
    ipvs(|kernel| {
        let keys: Vec<_> = (0..1_000).map(|n| key(n % 2 == 1, [TCP, UDP, SCTP][n as usize % 3], n)).collect();
        let ten = |key: Key| (0..10).map(move |n| real(key.address.is_ipv6(), n, 8080));
        let mut requests = Vec::new();
        for key in &keys {
            requests.push(Request::Add(server(*key, "rr", 0, 0)));
            requests.extend(ten(*key).map(|real| Request::AddReal(*key, real)));
        }
        let begin = Instant::now();
        assert_eq!(kernel.commit(&requests).unwrap(), []);
        println!("11,000 requests: {:?}", begin.elapsed());
        let begin = Instant::now();
        let listed = kernel.virtual_servers().unwrap();
        println!("1,000 virtual servers listed: {:?}", begin.elapsed());
        assert!(
            listed.iter().all(|one| Arc::ptr_eq(&one.scheduler, &listed[0].scheduler)),
            "one name for all"
        );
        let mut expected: Vec<_> = keys.iter().map(|key| server(*key, "rr", 0, 0)).collect();
        expected.sort_by_key(|server| server.key);
        assert_eq!(listed, expected);
        let begin = Instant::now();
        for key in &keys {
            assert_eq!(reals(kernel, *key), ten(*key).collect::<Vec<_>>());
        }
        println!("their real servers listed: {:?}", begin.elapsed());
        let remove: Vec<_> = keys.iter().copied().map(Request::Remove).collect();
        assert_eq!(kernel.commit(&remove).unwrap(), []);
        assert_eq!(kernel.virtual_servers().unwrap(), []);
    });
}

#[test]
fn the_real_tool_reads_what_is_written_and_the_other_way_round() {
    ipvs(|kernel| {
        let (four, six) = (key(false, TCP, 1), key(true, UDP, 1));
        let flags = PERSISTENT | SCHED_MH_FALLBACK | SCHED_MH_PORT;
        let requests = [
            Request::Add(server(four, "rr", 0, 0)),
            Request::AddReal(four, real(false, 1, 8080)),
            Request::Add(server(six, "mh", flags, 10_800)),
            Request::AddReal(six, RealServer { weight: 0, ..real(true, 1, 53) }),
        ];
        assert_eq!(kernel.commit(&requests).unwrap(), []);
        let saved: BTreeSet<_> =
            run("ipvsadm", "-S -n").lines().map(|line| line.trim_end().to_owned()).collect();
        let expected = [
            "-A -t 10.96.0.1:80 -s rr",
            "-a -t 10.96.0.1:80 -r 10.244.0.1:8080 -m -w 1",
            "-A -u [fd00:96::1]:80 -s mh -p 10800 -b mh-fallback,mh-port",
            "-a -u [fd00:96::1]:80 -r [fd00:f4::1]:53 -m -w 0",
        ];
        assert_eq!(saved, expected.iter().map(ToString::to_string).collect());
        let before = (kernel.virtual_servers().unwrap(), reals(kernel, four), reals(kernel, six));
        run("ipvsadm", "-C");
        for line in expected {
            run("ipvsadm", line);
        }
        assert_eq!((kernel.virtual_servers().unwrap(), reals(kernel, four), reals(kernel, six)), before);
    });
}

#[test]
fn timeouts_are_those_of_the_namespace_and_zero_leaves_them() {
    ipvs(|kernel| {
        let before = kernel.timeouts().unwrap();
        assert!(before.tcp > 0 && before.tcp_fin > 0 && before.udp > 0);
        kernel.set_timeouts(Timeouts { tcp: 1_234, tcp_fin: 0, udp: 56 }).unwrap();
        let after = Timeouts { tcp: 1_234, udp: 56, ..before };
        assert_eq!(kernel.timeouts().unwrap(), after);
        let error = kernel.set_timeouts(Timeouts { tcp: u32::MAX, ..Timeouts::default() }).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::INVAL), "{error}");
        assert_eq!(kernel.timeouts().unwrap(), after);
    });
}

#[test]
fn a_connection_through_device_and_virtual_server_arrives_and_is_counted() {
    ipvs(|kernel| {
        for v6 in [false, true] {
            let mut device = dummy::Kernel::open(DEVICE).unwrap();
            device.ensure().unwrap();
            let key = key(v6, TCP, 1);
            assert_eq!(device.change(&[key.address], &[]).unwrap(), []);
            let listener = TcpListener::bind(if v6 { "[::1]:0" } else { "127.0.0.1:0" }).unwrap();
            let at = listener.local_addr().unwrap();
            let real = RealServer { address: at.ip(), port: at.port(), weight: 1, forwarding: 0 };
            let requests = [Request::Add(server(key, "rr", 0, 0)), Request::AddReal(key, real)];
            assert_eq!(kernel.commit(&requests).unwrap(), []);
            let mut client = TcpStream::connect(SocketAddr::new(key.address, key.port)).unwrap();
            let (mut accepted, _) = listener.accept().unwrap();
            client.write_all(b"?").unwrap();
            let mut byte = [0];
            accepted.read_exact(&mut byte).unwrap();
            let one = Connections { active: 1, inactive: 0, persistent: 0 };
            assert_eq!(kernel.real_servers(key).unwrap(), [(real, one)]);
            // Without a real server the kernel refuses.
            let remove = [Request::RemoveReal(key, real.address, real.port)];
            assert_eq!(kernel.commit(&remove).unwrap(), []);
            let error = TcpStream::connect(SocketAddr::new(key.address, key.port)).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        }
    });
}
