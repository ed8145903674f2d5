//! Chains that are the same whatever Services there are, and the jumps to them from built-in chains.

use lockstep_model::Family;
use lockstep_view::backend::Drift;

use crate::input::{Input, Step, line};
use crate::observe::{Snapshot, canonical, target};
use crate::table::Table;
use crate::tool::{Flavour, Tool, ToolError};

/// Chains whose content is known as a whole. Whatever else is there under their names, an earlier
/// process's or another mode's, is replaced; everything else is left alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FixedChains {
    /// Table, name, and all rules, without `-A NAME` and as `iptables-save` prints them.
    pub chains: Vec<(Table, &'static str, Vec<String>)>,
    /// Further chains that jumps of ours may lead to. What is in them, and whether they are there, is
    /// looked after elsewhere.
    pub others: Vec<(Table, &'static str)>,
    /// What leads to all of them; each built-in chain once.
    pub jumps: Vec<Jumps>,
}

/// Jumps from one built-in chain, in order. They stand before everything else when they are written;
/// where others put their rules afterwards is theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Jumps {
    /// Its table.
    pub table: Table,
    /// The built-in chain.
    pub chain: &'static str,
    /// Without `-A NAME`, as `iptables-save` prints them.
    pub rules: Vec<String>,
}

impl FixedChains {
    /// Leaves out what is in other tables than these, for a kernel that does not have them all (see
    /// [`can`](crate::can)).
    #[must_use]
    pub fn within(mut self, tables: &[Table]) -> Self {
        self.chains.retain(|(table, ..)| tables.contains(table));
        self.others.retain(|(table, _)| tables.contains(table));
        self.jumps.retain(|jumps| tables.contains(&jumps.table));
        self
    }

    /// Every chain that is looked at, each once: for [`Tool::list`].
    pub fn places(&self) -> Vec<(Table, &'static str)> {
        let chains = self.chains.iter().map(|(table, chain, _)| (*table, *chain));
        chains.chain(self.jumps.iter().map(|jumps| (jumps.table, jumps.chain))).collect()
    }

    /// True for a rule of a built-in chain that leads into one of these chains.
    pub fn is_jump(&self, table: Table, rule: &str) -> bool {
        target(rule).is_some_and(|to| {
            self.chains.iter().any(|(of, chain, _)| *of == table && *chain == to)
                || self.others.contains(&(table, to))
        })
    }

    /// What is there of the jumps from one built-in chain, as printed.
    fn found<'a>(&self, snapshot: &Snapshot<'a>, jumps: &Jumps) -> Vec<&'a str> {
        let mut rules = snapshot.rules(jumps.table, jumps.chain);
        rules.retain(|rule| self.is_jump(jumps.table, rule));
        rules
    }

    /// What makes it whole: chains that are missing or differ are written as a whole, and so are the jumps
    /// of a built-in chain. Empty where nothing is missing.
    pub fn missing<'a>(&self, snapshot: &Snapshot<'a>) -> Vec<Step<'a>> {
        let mut steps = Vec::new();
        for (table, chain, rules) in &self.chains {
            let body = body(chain, rules);
            if !snapshot.has(*table, chain, &body) {
                steps.push(Step::Write { table: *table, chain, body });
            }
        }
        for jumps in &self.jumps {
            let found = self.found(snapshot, jumps);
            if found.iter().map(|rule| canonical(rule)).eq(jumps.rules.iter().cloned()) {
                continue;
            }
            let Jumps { table, chain, rules } = jumps.clone();
            steps.extend(found.into_iter().map(|rule| Step::Remove { table, chain, rule }));
            if !rules.is_empty() {
                steps.push(Step::Prepend { table, chain, rules });
            }
        }
        steps
    }

    /// What is not as it should be.
    pub fn drift(&self, family: Family, snapshot: &Snapshot<'_>) -> Vec<Drift> {
        let mut faults = Vec::new();
        for (table, chain, rules) in &self.chains {
            match snapshot.body(*table, chain) {
                None => faults.push(drift(family, *table, chain, "missing")),
                Some(_) if !snapshot.has(*table, chain, &body(chain, rules)) => {
                    faults.push(drift(family, *table, chain, "rules differ"));
                }
                Some(_) => {}
            }
        }
        for jumps in &self.jumps {
            let found = self.found(snapshot, jumps).into_iter().map(canonical);
            if !found.eq(jumps.rules.iter().cloned()) {
                faults.push(drift(family, jumps.table, jumps.chain, "jumps differ"));
            }
        }
        faults
    }

    /// Reads everything and writes what is missing, in one restore. Returns the rules and chains written
    /// or removed. On an error, tables in the order of [`Table::ALL`] up to the one refused are written.
    pub fn ensure(&self, tool: &Tool) -> Result<usize, ToolError> {
        let saved = tool.save()?;
        let input = Input::new(&self.missing(&Snapshot::parse(&saved)));
        if input.objects > 0 {
            tool.restore(&input.text)?;
        }
        Ok(input.objects)
    }

    /// Reads back what it is about. The nft flavour reads nothing else, unless something is not as it should
    /// be: then everything is read, and that is what is reported.
    pub fn read_back(&self, tool: &Tool) -> Result<Vec<Drift>, ToolError> {
        let places = self.places();
        if tool.flavour == Flavour::Nft
            && let Ok(text) = tool.list(&places)
            && Snapshot::of_list(&text, &places)
                .is_some_and(|snapshot| self.drift(tool.family, &snapshot).is_empty())
        {
            return Ok(Vec::new());
        }
        Ok(self.drift(tool.family, &Snapshot::parse(&tool.save()?)))
    }
}

/// The rules of a chain with `-A NAME` before each, a line each.
fn body(chain: &str, rules: &[String]) -> String {
    let mut text = String::new();
    rules.iter().for_each(|rule| line(&mut text, &["-A ", chain, " ", rule]));
    text
}

/// A fault of a chain, in the tools' words: `iptables nat chain KUBE-SERVICES`.
pub fn drift(family: Family, table: Table, chain: &str, fault: impl Into<String>) -> Drift {
    let tool = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    Drift { object: format!("{tool} {} chain {chain}", table.name()), fault: fault.into() }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lockstep_kernel::exec::Run;

    use super::*;
    use crate::fake::Fake;

    fn rules<const N: usize>(all: [&str; N]) -> Vec<String> {
        all.map(str::to_owned).into()
    }

    fn sample() -> FixedChains {
        FixedChains {
            chains: vec![
                (Table::Nat, "KUBE-MARK-MASQ", rules(["-j MARK --set-xmark 0x4000/0x4000"])),
                (Table::Nat, "KUBE-SERVICES", rules(["-s 10.0.0.0/8 -j KUBE-MARK-MASQ", "-j ACCEPT"])),
                (Table::Mangle, "KUBE-OUT", rules(["-j RETURN"])),
            ],
            others: vec![(Table::Nat, "KUBE-NODEPORTS")],
            jumps: vec![
                Jumps { table: Table::Nat, chain: "PREROUTING", rules: rules(["-j KUBE-SERVICES"]) },
                Jumps { table: Table::Nat, chain: "OUTPUT", rules: rules(["-j KUBE-SERVICES"]) },
                Jumps { table: Table::Mangle, chain: "OUTPUT", rules: rules(["-j KUBE-OUT"]) },
            ],
        }
    }

    fn tool(fake: &Arc<Fake>) -> Tool {
        Tool::new(Arc::clone(fake) as Arc<dyn Run>, Flavour::Nft, Family::V4)
    }

    fn faults(drift: &[Drift]) -> Vec<String> {
        drift.iter().map(|Drift { object, fault }| format!("{object}: {fault}")).collect()
    }

    #[test]
    fn what_is_missing_is_written_once_and_then_nothing() {
        let fake = Arc::new(Fake::default());
        let tool = tool(&fake);
        let fixed = sample();
        assert_eq!(fixed.drift(Family::V4, &Snapshot::default()).len(), 6, "all of it");
        assert_eq!(fixed.read_back(&tool).unwrap().len(), 6);
        assert_eq!(fixed.ensure(&tool).unwrap(), 10, "three chains, four rules, three jumps");
        assert_eq!(fake.restores(), 1);
        fake.runs();
        assert_eq!(fixed.read_back(&tool).unwrap(), []);
        assert_eq!(fake.runs(), 1, "a list is enough");
        assert_eq!(fixed.ensure(&tool).unwrap(), 0);
        assert_eq!(fake.restores(), 0, "nothing is missing");
    }

    #[test]
    fn another_modes_content_is_replaced_and_others_rules_stay() {
        let fake = Arc::new(Fake::default());
        let tool = tool(&fake);
        tool.restore(
            "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-SVC-A - [0:0]\n:THEIRS - [0:0]\n\
             -A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-A\n-A KUBE-SERVICES -j KUBE-NODEPORTS\n\
             -A PREROUTING -j KUBE-NODEPORTS\n-A PREROUTING -j THEIRS\n\
             -A PREROUTING -m comment --comment old -j KUBE-SERVICES\nCOMMIT\n",
        )
        .unwrap();
        fake.restores();
        let fixed = sample();
        assert_eq!(
            faults(&fixed.read_back(&tool).unwrap())[1..4],
            [
                "iptables nat chain KUBE-SERVICES: rules differ",
                "iptables mangle chain KUBE-OUT: missing",
                "iptables nat chain PREROUTING: jumps differ",
            ]
        );
        fixed.ensure(&tool).unwrap();
        assert_eq!(fake.restores(), 1);
        assert_eq!(fixed.read_back(&tool).unwrap(), []);
        let saved = tool.save().unwrap();
        let snapshot = Snapshot::parse(&saved);
        assert_eq!(snapshot.rules(Table::Nat, "PREROUTING"), ["-j KUBE-SERVICES", "-j THEIRS"]);
        assert_eq!(snapshot.rules(Table::Nat, "KUBE-SERVICES").len(), 2);
        assert!(snapshot.body(Table::Nat, "KUBE-SVC-A").is_some(), "goes when the other mode goes");
    }

    #[test]
    fn a_kernel_without_a_table_has_the_rest() {
        let fake = Arc::new(Fake::default());
        fake.take_table_away(Table::Mangle);
        let tool = tool(&fake);
        assert!(sample().ensure(&tool).unwrap_err().concerns_rules());
        let rest = sample().within(&[Table::Filter, Table::Nat]);
        assert_eq!(rest.ensure(&tool).unwrap(), 0, "nat was written before mangle was refused");
        assert_eq!(rest.read_back(&tool).unwrap(), []);
        assert_eq!(faults(&sample().read_back(&tool).unwrap()).len(), 2, "what mangle should have");
    }
}
