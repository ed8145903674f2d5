//! Sets of the kernel, in namespaces of their own. Needs root.
#![allow(clippy::unwrap_used)] // what a test needs it states with unwrap

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;

use lockstep_kernel::ipset::fake::FakeSets;
use lockstep_kernel::ipset::{Declaration, Entry, Header, Kernel, Kind, Sets, is_full};
use lockstep_kernel::{Errno, netns};

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
const KINDS: [Kind; 5] =
    [Kind::HashIp, Kind::HashIpPort, Kind::HashIpPortIp, Kind::HashIpPortNet, Kind::BitmapPort];

/// Runs in a new namespace with an open socket of its sets.
fn sets(work: impl FnOnce(&mut Kernel) + Send) {
    netns::run_in_new(|| work(&mut Kernel::open().unwrap())).expect("these tests need root");
}

/// Runs with the kernel's sets, and with those in memory, which must be no different.
fn sets_and_fake(work: impl Fn(&mut dyn Sets) + Sync) {
    sets(|kernel| work(kernel));
    work(&mut FakeSets::default());
}

fn declared(name: &str, kind: Kind, v6: bool) -> Declaration {
    Declaration { name: name.to_owned(), kind, v6, max_elements: 70_000 }
}

fn address(v6: bool, n: u32) -> IpAddr {
    match v6 {
        false => Ipv4Addr::from(0x0a00_0000 + n).into(),
        true => Ipv6Addr::from((0xfd00 << 112) + u128::from(n)).into(),
    }
}

/// Entries of a type that differ in every part.
fn entries(kind: Kind, v6: bool) -> Vec<Entry> {
    let (a, b, c) = (address(v6, 1), address(v6, 2), address(v6, 3));
    let net = |text: [&str; 2]| text[usize::from(v6)].parse().unwrap();
    let mut entries = match kind {
        Kind::HashIp => vec![Entry::Ip(a), Entry::Ip(b)],
        Kind::HashIpPort => vec![
            Entry::IpPort(a, TCP, 80),
            Entry::IpPort(a, UDP, 80),
            Entry::IpPort(a, SCTP, 80),
            Entry::IpPort(b, TCP, 65_535),
        ],
        Kind::HashIpPortIp => vec![
            Entry::IpPortIp(a, TCP, 80, a),
            Entry::IpPortIp(a, TCP, 80, b),
            Entry::IpPortIp(b, UDP, 53, c),
            Entry::IpPortIp(b, SCTP, 53, c),
        ],
        Kind::HashIpPortNet => vec![
            Entry::IpPortNet(a, TCP, 80, net(["192.0.2.0/24", "2001:db8::/64"])),
            Entry::IpPortNet(a, TCP, 80, net(["198.51.100.7/32", "2001:db8:1::7/128"])),
            Entry::IpPortNet(a, SCTP, 443, net(["128.0.0.0/1", "8000::/1"])),
        ],
        Kind::BitmapPort => vec![Entry::Port(0), Entry::Port(30_000), Entry::Port(65_535)],
    };
    entries.sort_unstable();
    entries
}

#[test]
fn sets_of_every_type_are_made_filled_listed_and_destroyed() {
    sets_and_fake(|kernel| {
        assert_eq!(kernel.headers().unwrap(), []);
        for (kind, v6) in KINDS.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
            let name = "A-NAME-OF-THIRTY-ONE-BYTES-HERE";
            kernel.create(&declared(name, kind, v6)).unwrap();
            assert_eq!(kernel.create(&declared(name, kind, v6)).unwrap_err().errno(), Some(Errno::EXIST));
            assert_eq!(kernel.entries(name, kind).unwrap().unwrap(), []);
            let entries = entries(kind, v6);
            kernel.change(name, &entries, &[]).unwrap();
            kernel.change(name, &entries, &[]).unwrap();
            assert_eq!(kernel.entries(name, kind).unwrap().unwrap(), entries);
            let bitmap = kind == Kind::BitmapPort;
            let header = Header {
                name: name.to_owned(),
                type_name: kind.type_name().to_owned(),
                v6: v6 && !bitmap,
                elements: u32::try_from(entries.len()).unwrap(),
                max_elements: if bitmap { 65_536 } else { 70_000 },
                references: 0,
            };
            assert_eq!(kernel.headers().unwrap(), [header]);

            // What is in both lists stays.
            let (first, rest) = entries.split_first().unwrap();
            assert!(kernel.contains(name, first).unwrap());
            kernel.change(name, rest, &entries).unwrap();
            kernel.change(name, &[], &[*first]).unwrap();
            assert!(!kernel.contains(name, first).unwrap());
            assert_eq!(kernel.entries(name, kind).unwrap().unwrap(), rest);
            assert!(kernel.destroy(name).unwrap());
            assert!(!kernel.destroy(name).unwrap());
        }
        assert_eq!(kernel.entries("none", Kind::HashIp).unwrap(), None);
        let missing = [
            kernel.contains("none", &Entry::Ip(address(false, 1))).unwrap_err(),
            kernel.change("none", &[Entry::Ip(address(false, 1))], &[]).unwrap_err(),
            kernel.change("none", &[], &[Entry::Ip(address(false, 1))]).unwrap_err(),
            kernel.swap("none", "nothing").unwrap_err(),
        ];
        for error in missing {
            assert_eq!(error.errno(), Some(Errno::NOENT), "{error}");
        }
    });
}

#[test]
fn a_set_may_hold_more_than_any_message() {
    sets_and_fake(|kernel| {
        for v6 in [false, true] {
            let name = if v6 { "six" } else { "four" };
            kernel.create(&declared(name, Kind::HashIpPortIp, v6)).unwrap();
            let many: Vec<_> =
                (0..20_000).map(|n| Entry::IpPortIp(address(v6, n), TCP, 80, address(v6, n))).collect();
            kernel.change(name, &many, &[]).unwrap();
            assert_eq!(kernel.entries(name, Kind::HashIpPortIp).unwrap().unwrap(), many);
            let (gone, stay) = many.split_at(15_000);
            kernel.change(name, &[], gone).unwrap();
            assert_eq!(kernel.entries(name, Kind::HashIpPortIp).unwrap().unwrap(), stay);
        }
        let elements: Vec<_> = kernel.headers().unwrap().iter().map(|header| header.elements).collect();
        assert_eq!(elements, [5_000, 5_000]);
    });
}

#[test]
fn a_full_set_says_so_and_names_the_entry_unless_others_make_room() {
    sets_and_fake(|kernel| {
        let small = Declaration { max_elements: 1_000, ..declared("small", Kind::HashIpPort, false) };
        kernel.create(&small).unwrap();
        let entry = |n| Entry::IpPort(address(false, n), TCP, 80);
        let many: Vec<_> = (0..2_000).map(entry).collect();
        let error = kernel.change("small", &many, &[]).unwrap_err();
        assert!(is_full(&error), "{error:?}");
        let there: BTreeSet<_> =
            kernel.entries("small", Kind::HashIpPort).unwrap().unwrap().into_iter().collect();
        let refused = many.iter().find(|entry| !there.contains(entry)).unwrap();
        assert_eq!(error.to_string(), format!("netlink: add {refused} to ipset small: the set is full"));

        let there: Vec<_> = there.into_iter().collect();
        let new = [entry(5_000), entry(5_001)];
        kernel.change("small", &new, &there).unwrap();
        assert_eq!(kernel.entries("small", Kind::HashIpPort).unwrap().unwrap(), new);

        let other = kernel.change("small", &[Entry::IpPort(address(true, 1), TCP, 80)], &[]).unwrap_err();
        assert!(!is_full(&other));
        assert!(other.to_string().contains("fd00::1,tcp:80"), "{other}");
    });
}

#[test]
fn the_network_of_everybody_is_stored_as_its_halves() {
    sets_and_fake(|kernel| {
        for v6 in [false, true] {
            let name = if v6 { "six" } else { "four" };
            let net = |text: [&str; 2]| {
                Entry::IpPortNet(address(v6, 1), TCP, 80, text[usize::from(v6)].parse().unwrap())
            };
            kernel.create(&declared(name, Kind::HashIpPortNet, v6)).unwrap();
            let everybody = net(["0.0.0.0/0", "::/0"]);
            let halves = [net(["0.0.0.0/1", "::/1"]), net(["128.0.0.0/1", "8000::/1"])];
            kernel.change(name, &[everybody], &[]).unwrap();
            assert_eq!(kernel.entries(name, Kind::HashIpPortNet).unwrap().unwrap(), halves);
            assert!(kernel.contains(name, &everybody).unwrap());
            // One half stays, for its own sake.
            kernel.change(name, &halves[..1], &[everybody]).unwrap();
            assert_eq!(kernel.entries(name, Kind::HashIpPortNet).unwrap().unwrap(), halves[..1]);
            assert!(!kernel.contains(name, &everybody).unwrap());
            assert!(!kernel.contains(name, &net(["10.0.0.0/24", "::/64"])).unwrap());
            // Host bits do not matter.
            kernel.change(name, &[net(["10.0.0.9/24", "::9/64"])], &halves).unwrap();
            let stored = [net(["10.0.0.0/24", "::/64"])];
            assert_eq!(kernel.entries(name, Kind::HashIpPortNet).unwrap().unwrap(), stored);
        }
    });
}

fn run(program: &str, line: &str) -> String {
    let output = Command::new(program).args(line.split(' ')).output().unwrap();
    assert!(output.status.success(), "{program} {line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_real_tool_reads_what_is_written_and_the_other_way_round() {
    sets(|kernel| {
        for (kind, v6) in KINDS.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
            let entries = entries(kind, v6);
            kernel.create(&declared("ours", kind, v6)).unwrap();
            kernel.change("ours", &entries, &[]).unwrap();
            let saved = run("ipset", "save ours");
            let create = saved.lines().next().unwrap();
            let made = match (kind, v6) {
                (Kind::BitmapPort, _) => "create ours bitmap:port range 0-65535".to_owned(),
                (_, false) => {
                    format!("create ours {} family inet hashsize 1024 maxelem 70000", kind.type_name())
                }
                (_, true) => {
                    format!("create ours {} family inet6 hashsize 1024 maxelem 70000", kind.type_name())
                }
            };
            assert!(create.starts_with(&made), "{create}");
            let lines: BTreeSet<_> = saved.lines().skip(1).map(str::to_owned).collect();
            // The tool leaves the prefix length of a single address out.
            let line = |entry: &Entry| format!("add ours {entry}").replace("/32", "").replace("/128", "");
            assert_eq!(lines, entries.iter().map(line).collect());

            let family = if kind == Kind::BitmapPort {
                "range 0-65535"
            } else {
                ["family inet", "family inet6"][usize::from(v6)]
            };
            run("ipset", &format!("create theirs {} {family}", kind.type_name()));
            for entry in &entries {
                run("ipset", &format!("add theirs {entry}"));
            }
            assert_eq!(kernel.entries("theirs", kind).unwrap().unwrap(), entries);
            for name in ["ours", "theirs"] {
                assert!(kernel.destroy(name).unwrap());
            }
        }
    });
}

#[test]
fn an_exception_is_no_entry_and_adding_it_makes_it_one() {
    sets(|kernel| {
        let entry = Entry::IpPortNet(address(false, 1), TCP, 80, "192.0.2.0/24".parse().unwrap());
        run("ipset", "create s hash:ip,port,net");
        run("ipset", &format!("add s {entry} nomatch"));
        assert_eq!(kernel.entries("s", Kind::HashIpPortNet).unwrap().unwrap(), []);
        kernel.change("s", &[entry], &[]).unwrap();
        assert_eq!(kernel.entries("s", Kind::HashIpPortNet).unwrap().unwrap(), [entry]);
        // A single address counts as there where a network covers it.
        let single = Entry::IpPortNet(address(false, 1), TCP, 80, "192.0.2.9/32".parse().unwrap());
        assert!(kernel.contains("s", &single).unwrap());
        let mut fake = FakeSets::default();
        fake.create(&declared("s", Kind::HashIpPortNet, false)).unwrap();
        fake.change("s", &[entry], &[]).unwrap();
        assert!(fake.contains("s", &single).unwrap());
        assert!(run("ipset", "save s").ends_with(&format!("add s {entry}\n")));
    });
}

#[test]
fn a_set_that_rules_match_is_swapped_and_not_destroyed() {
    sets(|kernel| {
        for name in ["used", "next"] {
            kernel.create(&declared(name, Kind::HashIp, false)).unwrap();
        }
        let old = [Entry::Ip(address(false, 1))];
        kernel.change("used", &old, &[]).unwrap();
        run("iptables-legacy", "-w -A INPUT -m set --match-set used dst -j ACCEPT");
        let references = |kernel: &mut Kernel, name: &str| {
            kernel.headers().unwrap().into_iter().find(|header| header.name == name).unwrap().references
        };
        assert_eq!((references(kernel, "used"), references(kernel, "next")), (1, 0));
        let error = kernel.destroy("used").unwrap_err();
        assert_eq!(error.errno(), Some(Errno::BUSY));
        assert_eq!(error.to_string(), "netlink: destroy ipset used: something refers to it");
        kernel.swap("used", "next").unwrap();
        assert_eq!((references(kernel, "used"), references(kernel, "next")), (1, 0));
        assert_eq!(kernel.entries("used", Kind::HashIp).unwrap().unwrap(), []);
        assert_eq!(kernel.entries("next", Kind::HashIp).unwrap().unwrap(), old);
        kernel.create(&declared("other", Kind::BitmapPort, false)).unwrap();
        let error = kernel.swap("used", "other").unwrap_err();
        assert!(error.to_string().ends_with("the sets are of different types"), "{error}");
        assert!(kernel.destroy("next").unwrap());
    });
}
