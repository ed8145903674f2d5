//! Netlink in real network namespaces. Needs root.
#![allow(clippy::unwrap_used)] // a test states its expectations with unwrap

use std::net::IpAddr;
use std::process::Command;

use lockstep_kernel::addresses::Addresses;
use lockstep_kernel::nf_tables::{
    self, Batch, Chain, CommitError, ElementOp, Family, Kernel, Netfilter, put_key,
};
use lockstep_kernel::{Errno, netns};

#[test]
fn a_namespace_is_new_and_the_callers_thread_stays_where_it_is() {
    let here = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let before = here();
    let inside = netns::run_in_new(here).expect("these tests need root");
    assert_ne!(inside, before);
    assert_eq!(here(), before);
    netns::run_in("there-is-no-such-namespace", || ()).unwrap_err();
}

#[test]
fn every_refused_message_is_named_and_nothing_is_changed() {
    netns::run_in_new(|| {
        let mut kernel = Kernel::open().unwrap();
        let mut batch = Batch::new();
        batch.add_table(Family::Ipv4, "t");
        batch.delete_chain(Family::Ipv4, "t", "missing");
        let first = batch.last_seq();
        let mut element = Vec::new();
        put_key(&mut element, &[1, 2, 3, 4]);
        batch.elements(ElementOp::Add, Family::Ipv4, "t", "missing", &element);
        let second = batch.last_seq();
        let CommitError::Refused(refusals) = kernel.commit(batch.finish()).unwrap_err() else {
            panic!("the socket failed")
        };
        let found: Vec<_> = refusals.iter().map(|refusal| (refusal.seq, refusal.errno)).collect();
        assert_eq!(found, [(first, Errno::NOENT), (second, Errno::NOENT)]);
        assert!(!nf_tables::table_exists(&mut kernel, Family::Ipv4, "t").unwrap());
    })
    .expect("these tests need root");
}

#[test]
fn thousands_of_refusals_are_still_a_refusal() {
    netns::run_in_new(|| {
        let mut kernel = Kernel::open().unwrap();
        let mut batch = Batch::new();
        for _ in 0..100_000 {
            batch.delete_chain(Family::Ipv6, "t", "missing");
        }
        assert!(matches!(kernel.commit(batch.finish()), Err(CommitError::Refused(_))));
        // The socket is as good as new.
        let before = nf_tables::generation(&mut kernel).unwrap();
        batch.clear();
        batch.add_table(Family::Ipv6, "t");
        kernel.commit(batch.finish()).unwrap();
        assert_eq!(nf_tables::generation(&mut kernel).unwrap(), before + 1);
    })
    .expect("these tests need root");
}

#[test]
fn a_chain_is_there_or_not() {
    netns::run_in_new(|| {
        let mut kernel = Kernel::open().unwrap();
        let mut there = |table, chain| nf_tables::chain_exists(&mut kernel, Family::Ipv4, table, chain);
        assert!(!there("t", "c").unwrap(), "not even the table");
        let mut batch = Batch::new();
        batch.add_table(Family::Ipv4, "t");
        batch.add_chain(Family::Ipv4, "t", &Chain { name: "c".to_owned(), hook: None });
        Kernel::open().unwrap().commit(batch.finish()).unwrap();
        assert!(there("t", "c").unwrap());
        assert!(!there("t", "d").unwrap());
    })
    .expect("these tests need root");
}

#[test]
fn addresses_are_listed_and_their_changes_heard() {
    netns::run_in_new(|| {
        let ip = |line: &str| assert!(Command::new("ip").args(line.split(' ')).status().unwrap().success());
        let known = |addresses: &mut Addresses| {
            addresses.list().unwrap().iter().map(IpAddr::to_string).collect::<Vec<_>>()
        };
        let mut addresses = Addresses::open().unwrap();
        assert!(known(&mut addresses).is_empty() && !addresses.changed().unwrap());
        ip("link set lo up");
        ip("addr add 192.0.2.7/24 dev lo");
        ip("addr add 2001:db8::7/64 dev lo nodad");
        assert!(addresses.changed().unwrap() && !addresses.changed().unwrap());
        assert_eq!(known(&mut addresses), ["127.0.0.1", "192.0.2.7", "::1", "2001:db8::7"]);
        ip("addr del 192.0.2.7/24 dev lo");
        assert!(addresses.changed().unwrap());
        assert_eq!(known(&mut addresses), ["127.0.0.1", "::1", "2001:db8::7"]);
    })
    .expect("these tests need root");
}
