//! What keeps loopback addresses the node's own while `route_localnet` is on: the kernel then
//! takes packets from outside that are for 127.0.0.1, and programs that listen only there would get
//! them.
//!
//! The chain is kubelet's too, which keeps the same rule in the same words. So whoever comes first
//! makes it and the other finds it; what else is in it is not ours, and nobody takes it away: not
//! `cleanup` either, because the sysctl stays on and programs of others may count on it.
//!
//! Both start at boot, perhaps at the same moment. So the chain is made by `-N`, which fails where
//! it is there by now, and never declared, which would empty it; and after a write it is looked
//! whether the other wrote the same meanwhile.
//!
//! In its own chain the rule has to stand before whatever lets a packet by. In INPUT the jump counts
//! wherever it stands, as for kubelet: others order that chain for reasons of their own, and two
//! that both want to be first would never end. It is said once what stands before it.

use lockstep_xtables::{Snapshot, Table, canonical, target};

use crate::input::Op;

pub(crate) const CHAIN: &str = "KUBE-FIREWALL";
/// As the tools print it.
pub(crate) const RULE: &str = "! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" \
    -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP";
pub(crate) const JUMP: &str = "-j KUBE-FIREWALL";
/// Chains of filter that lead to it.
pub(crate) const ENTRANCES: [&str; 2] = ["INPUT", "OUTPUT"];
/// All of it, in an order that `Tool::list` takes.
pub(crate) const PLACES: [(Table, &str); 3] =
    [(Table::Filter, CHAIN), (Table::Filter, ENTRANCES[0]), (Table::Filter, ENTRANCES[1])];
/// Targets that let no packet by: what they do not end goes on to the next rule.
pub(crate) const KEEPING: [&str; 6] = ["DROP", "REJECT", "LOG", "NFLOG", "MARK", "CONNMARK"];
/// Makes the chain; refused where it is there.
pub(crate) const MAKE: &str = "*filter\n-N KUBE-FIREWALL\nCOMMIT\n";

pub(crate) fn has_chain(snapshot: &Snapshot<'_>) -> bool {
    snapshot.body(Table::Filter, CHAIN).is_some()
}

fn needed(chain: &str) -> &'static str {
    if chain == CHAIN { RULE } else { JUMP }
}

/// Where the rule of the guard stands in a chain.
fn positions(rules: &[&str], chain: &str) -> Vec<usize> {
    let ours = rules.iter().enumerate().filter(|(_, rule)| canonical(rule) == needed(chain));
    ours.map(|(at, _)| at).collect()
}

/// The chains in which its rule is missing, or guards nothing where it stands.
pub(crate) fn unguarded(snapshot: &Snapshot<'_>) -> Vec<&'static str> {
    let lets_by = |rule: &&str| target(rule).is_some_and(|to| !KEEPING.contains(&to));
    let lacks = |(table, chain): &(Table, &str)| {
        let rules = snapshot.rules(*table, chain);
        let end = rules.iter().position(lets_by).filter(|_| *chain == CHAIN);
        let end = end.unwrap_or(rules.len());
        positions(&rules, chain).first().is_none_or(|first| *first > end)
    };
    PLACES.into_iter().filter(lacks).map(|(_, chain)| chain).collect()
}

/// What makes it whole, once there is a chain.
pub(crate) fn missing<'a>(snapshot: &Snapshot<'a>) -> Vec<Op<'a>> {
    let rules = |chain| snapshot.rules(Table::Filter, chain);
    unguarded(snapshot).into_iter().flat_map(|chain| to_the_top(&rules(chain), chain)).collect()
}

/// What leaves the rule once in each chain of `written`, where somebody else wrote it at the same
/// moment. What others have twice in the other chains is theirs.
pub(crate) fn doubled<'a>(snapshot: &Snapshot<'a>, written: &[&'static str]) -> Vec<Op<'a>> {
    let places = written.iter().map(|chain| (snapshot.rules(Table::Filter, chain), *chain));
    let doubled = places.filter(|(rules, chain)| positions(rules, chain).len() > 1);
    doubled.flat_map(|(rules, chain)| to_the_top(&rules, chain)).collect()
}

/// Leaves the rule of the guard once in a chain, before everything else.
fn to_the_top<'a>(rules: &[&'a str], chain: &'static str) -> Vec<Op<'a>> {
    let table = Table::Filter;
    let found = positions(rules, chain).into_iter();
    let mut ops: Vec<Op<'a>> = found.map(|at| Op::Remove { table, chain, rule: rules[at] }).collect();
    ops.push(Op::Prepend { table, chain, rules: vec![needed(chain).to_owned()] });
    ops
}

/// The first rule of INPUT that accepts packets before they come to the guard, and may so accept
/// new ones from outside.
pub(crate) fn ahead<'a>(snapshot: &Snapshot<'a>) -> Option<&'a str> {
    let chain = ENTRANCES[0];
    let rules = snapshot.rules(Table::Filter, chain);
    let jump = *positions(&rules, chain).first()?;
    let accepts = |rule: &&str| target(rule) == Some("ACCEPT") && !is_harmless(rule);
    rules[..jump].iter().copied().find(accepts)
}

/// True for a rule that is only about what the guard lets by too: the node's own packets, and
/// those of connections that are up.
fn is_harmless(rule: &str) -> bool {
    let known = |state: &str| ["RELATED", "ESTABLISHED", "DNAT"].contains(&state);
    let states = rule.rsplit_once("state ").and_then(|(_, behind)| behind.split(' ').next());
    !rule.contains("! ")
        && (rule.starts_with("-i lo ") || states.is_some_and(|states| states.split(',').all(known)))
}

#[cfg(test)]
mod tests {
    use lockstep_xtables::Flavour;

    use super::*;
    use crate::input::{Change, Input, Owner};

    fn whole() -> String {
        format!(
            ":INPUT ACCEPT\n:OUTPUT ACCEPT\n:{CHAIN} -\n-A INPUT {JUMP}\n-A OUTPUT {JUMP}\n-A {CHAIN} {RULE}"
        )
    }

    #[test]
    fn the_rule_stands_before_what_lets_packets_by() {
        let missing = |filter: &str| missing(&Snapshot::parse(&format!("*filter\n{filter}\nCOMMIT\n"))).len();
        let own = format!("-A {CHAIN} {RULE}");
        let after = |rule: &str| whole().replace(&own, &format!("-A {CHAIN} {rule}\n{own}"));
        assert_eq!(missing(&whole()), 0);
        for before in
            ["-m mark --mark 0x8000/0x8000 -j DROP", "-s 192.0.2.1/32", "-j LOG --log-prefix \"a -j ACCEPT\""]
        {
            assert_eq!(missing(&after(before)), 0, "{before}");
        }
        for before in
            ["-i eth1 -j RETURN", "-j ACCEPT", "-g ELSEWHERE", "-j OTHER", "-j NFQUEUE --queue-num 1"]
        {
            assert_eq!(missing(&after(before)), 2, "{before}: taken from there, put to the top");
        }
        assert_eq!(missing(&whole().replace(&own, "")), 1);
        assert_eq!(missing(""), 3);
        // Others' order of INPUT is theirs.
        let jump = format!("-A INPUT {JUMP}");
        assert_eq!(missing(&whole().replace(&jump, &format!("-A INPUT -j ACCEPT\n{jump}"))), 0);
    }

    #[test]
    fn what_was_written_twice_is_left_once_and_first() {
        let jump = format!("-A INPUT {JUMP}");
        let twice = whole().replace(&jump, &format!("-A INPUT -j X\n{jump}\n{jump}"));
        let text = format!("*filter\n{twice}\nCOMMIT\n");
        let snapshot = Snapshot::parse(&text);
        assert_eq!(missing(&snapshot).len(), 0, "as good as once");
        let changes = [Change { owner: Owner::Everybody, ops: doubled(&snapshot, &ENTRANCES) }];
        let input = Input::new(Flavour::Nft, 0, &changes).text;
        assert_eq!(input, format!("*filter\n-D INPUT {JUMP}\n-D INPUT {JUMP}\n-I INPUT {JUMP}\nCOMMIT\n"));
        assert_eq!(doubled(&snapshot, &["OUTPUT", CHAIN]).len(), 0, "not written: not ours to mend");
    }

    #[test]
    fn what_accepts_before_the_guard_is_known() {
        let jump = format!("-A INPUT {JUMP}");
        let found = |before: &str| {
            let filter = whole().replace(&jump, &format!("-A INPUT {before}\n{jump}"));
            let text = format!("*filter\n{filter}\nCOMMIT\n");
            ahead(&Snapshot::parse(&text)).map(str::to_owned)
        };
        for accepts in [
            "-i eth1 -j ACCEPT",
            "! -i lo -j ACCEPT",
            "-m conntrack --ctstate NEW,RELATED -j ACCEPT",
            "-m conntrack ! --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-p tcp -m tcp --dport 22 -j ACCEPT",
        ] {
            assert_eq!(found(accepts).as_deref(), Some(accepts));
        }
        for harmless in [
            "-i lo -j ACCEPT",
            "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-m state --state RELATED,ESTABLISHED -j ACCEPT",
            "-i eth1 -j DROP",
            "-j KUBE-NODEPORTS",
        ] {
            assert_eq!(found(harmless), None, "{harmless}");
        }
        let behind =
            format!("*filter\n{}\nCOMMIT\n", whole().replace(&jump, &format!("{jump}\n-A INPUT -j ACCEPT")));
        assert_eq!(ahead(&Snapshot::parse(&behind)), None);
    }
}
