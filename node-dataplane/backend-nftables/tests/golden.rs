//! The rules as text, for review: `testdata/*.nft`, written anew with `LOCKSTEP_BLESS=1`.
#![allow(clippy::unwrap_used)] // a test states its expectations with unwrap

mod support;

use std::path::Path;

use lockstep_backend_nftables::Nftables;
use lockstep_kernel::nf_tables::fake::FakeKernel;
use lockstep_view::{Backend, ForwardingPlan};
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
fn a_node_without_services() {
    golden("empty.nft", &plan([]));
}
