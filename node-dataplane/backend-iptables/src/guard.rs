//! What keeps loopback addresses the node's own while `route_localnet` is on: the kernel then
//! takes packets from outside that are for 127.0.0.1, and programs that listen only there would get
//! them.
//!
//! The chain is kubelet's too, which keeps the same rule in the same words. So whoever comes first
//! makes it and the other finds it; what else is in it is not ours, and nobody takes it away: not
//! `cleanup` either, because the sysctl stays on and programs of others may count on it.

use std::borrow::Cow;

use crate::input::Op;
use crate::names::Table;
use crate::observe::{self, Snapshot};

pub(crate) const CHAIN: &str = "KUBE-FIREWALL";
/// As the tools print it.
pub(crate) const RULE: &str = "! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" \
    -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP";
pub(crate) const JUMP: &str = "-j KUBE-FIREWALL";
/// Chains of filter that lead to it.
pub(crate) const ENTRANCES: [&str; 2] = ["INPUT", "OUTPUT"];

/// What is missing of it.
pub(crate) fn missing<'a>(snapshot: &Snapshot<'_>) -> Vec<Op<'a>> {
    let table = Table::Filter;
    let has = |chain: &str, wanted: &str| {
        snapshot.rules(table, chain).iter().any(|rule| observe::canonical(rule) == wanted)
    };
    let mut ops = Vec::new();
    match snapshot.body(table, CHAIN) {
        None => {
            let body = Cow::Owned(format!("-A {CHAIN} {RULE}\n"));
            ops.push(Op::Write { table, chain: CHAIN, body });
        }
        Some(_) if !has(CHAIN, RULE) => {
            ops.push(Op::Append { table, chain: CHAIN, rules: vec![RULE.to_owned()] });
        }
        Some(_) => {}
    }
    for chain in ENTRANCES.into_iter().filter(|chain| !has(chain, JUMP)) {
        ops.push(Op::Prepend { table, chain, rules: vec![JUMP.to_owned()] });
    }
    ops
}
