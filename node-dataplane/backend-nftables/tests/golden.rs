//! The rules as text, for review: `testdata/*.nft`, written anew with `LOCKSTEP_BLESS=1`.
#![allow(clippy::unwrap_used)] // a test states its expectations with unwrap

mod support;

use std::path::Path;

use lockstep_backend_nftables::Nftables;
use lockstep_kernel::nf_tables::fake::FakeKernel;
use lockstep_model::Protocol;
use lockstep_view::{Backend, ForwardingPlan, Pool, Surface};
use support::*;

fn golden(name: &str, plan: &ForwardingPlan) {
    let mut backend = Nftables::new(FakeKernel::new());
    assert_eq!(backend.sync(plan).unwrap().failures, []);
    let text = backend.render();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name);
    if std::env::var_os("LOCKSTEP_BLESS").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(text == expected, "{} differs; bless it with LOCKSTEP_BLESS=1:\n{text}", file.display());
}

#[test]
fn every_shape_of_service() {
    golden("every-shape.nft", &every_shape());
}

#[test]
fn pods_are_told_by_where_they_come_in() {
    let local = forward(Pool::Local, false);
    let mut port = port_plan(
        Protocol::Tcp,
        80,
        vec![target("10.244.1.2", 8080), target("10.244.2.2", 8080)],
        vec![cluster_ip("10.96.0.2", 80), external_local(Surface::NodePort, 30080, local)],
    );
    port.local = vec![target("10.244.1.2", 8080)];
    let mut plan = plan([service("web", vec![port])]);
    pods_by_interface(&mut plan, "veth", true);
    golden("pods-by-interface-prefix.nft", &plan);
}

#[test]
fn a_node_without_services() {
    golden("empty.nft", &plan([]));
}
