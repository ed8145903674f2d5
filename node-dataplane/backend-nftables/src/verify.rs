//! Reading back, and hearing of changes that are not ours.
//!
//! Foreign changes are told by the kernel's generation, which every transaction of anybody
//! raises by one. Where it moved further than our own transactions did, the notifications
//! say whether one of our tables is concerned. Listening costs the kernel work on every
//! change, so the listener leaves its group before we commit and joins again after that;
//! what happens in between is caught by the generation alone and counts as ours to look at.

use std::time::{Duration, Instant};

use lockstep_kernel::netlink::attr::Attributes;
use lockstep_kernel::nf_tables::{self, Netfilter, Value};
use lockstep_model::Family;
use lockstep_view::backend::{Audit, Drift};
use rustc_hash::FxHashMap;

use crate::fingerprint::Fingerprint;
use crate::names::{SharedChain, TABLE};
use crate::rules::kernel_family;
use crate::sets::{Datum, Key, Ranges, SetId, target_bytes};
use crate::state::every_set;
use crate::{Error, Nftables, node, observe};

/// `NFT_MSG_NEWGEN`: ends the notifications of every transaction.
const NEW_GENERATION: u16 = 15;

impl<N: Netfilter> Nftables<N> {
    /// Compares what the last transaction wrote with what the kernel holds.
    pub(crate) fn read_back(&mut self) -> Result<Vec<Drift>, Error> {
        let written = self.stage.written.clone();
        let mut drift = Vec::new();
        if written.everything {
            for family in Family::ALL {
                drift.extend(self.compare_skeleton(family)?);
            }
            for (family, set) in every_set() {
                drift.extend(self.compare_set(family, set)?);
            }
            return Ok(drift);
        }
        if written.chains {
            for family in Family::ALL {
                drift.extend(self.compare_skeleton(family)?);
            }
        }
        drift.extend(self.compare_elements(&written.elements)?);
        Ok(drift)
    }

    fn compare_elements(
        &mut self,
        written: &[(Family, SetId, Key, Option<Datum>)],
    ) -> Result<Vec<Drift>, Error> {
        // Deletions come before additions in a transaction, so an addition counts last.
        let mut expected: FxHashMap<(Family, SetId), FxHashMap<Key, Option<Datum>>> = FxHashMap::default();
        for (family, set, key, datum) in written {
            let slot = expected.entry((*family, *set)).or_default().entry(*key).or_default();
            *slot = datum.or(*slot);
        }
        let mut drift = Vec::new();
        for (family, set) in every_set() {
            let Some(keys) = expected.get(&(family, set)) else { continue };
            if set.ranges() == Ranges::ByEnds {
                // No Service has any of them, so none has to be walked.
                drift.extend(self.compare_service_cidrs(family)?);
                continue;
            }
            if set.ranges() != Ranges::None {
                // Ranges cannot be asked for one by one in a way that shows their ends.
                drift.extend(self.compare_set(family, set)?);
                continue;
            }
            let mut keys: Vec<_> = keys.iter().collect();
            keys.sort_unstable_by_key(|(key, _)| **key);
            let bytes: Vec<&[u8]> = keys.iter().map(|(key, _)| key.bytes()).collect();
            let found = nf_tables::element_values(
                &mut self.netfilter,
                kernel_family(family),
                TABLE,
                set.name(),
                &bytes,
            )?;
            let mut count = Difference::default();
            for ((_, expected), found) in keys.into_iter().zip(found) {
                count
                    .note(expected.as_ref(), found.as_ref(), |datum, found| is_value(*datum, found.as_ref()));
            }
            drift.extend(count.drift(family, set));
        }
        Ok(drift)
    }

    fn compare_service_cidrs(&mut self, family: Family) -> Result<Option<Drift>, Error> {
        let mut found = observe::elements(&mut self.netfilter, family, SetId::ServiceCidrs)?;
        let mut count = Difference::default();
        if let Some(node) = &self.state.node {
            node::each_element(node, &mut |of, set, key, datum| {
                if (of, set) == (family, SetId::ServiceCidrs) {
                    count.note(Some(&datum), found.remove(key).as_ref(), |expected, found| expected == found);
                }
            });
        }
        count.unexpected += found.len();
        Ok(count.drift(family, SetId::ServiceCidrs))
    }

    fn compare_skeleton(&mut self, family: Family) -> Result<Vec<Drift>, Error> {
        let Some(node) = self.state.node.clone() else { return Ok(Vec::new()) };
        let skeleton = observe::skeleton(&mut self.netfilter, family, &node)?;
        let mut drift = skeleton.drift;
        let expected = self.state.chains.iter().filter(|(of, _)| *of == family).map(|(_, chain)| *chain);
        for missing in expected.filter(|chain| !skeleton.chains.contains(chain)) {
            let object = format!("chain {} {TABLE} {}", kernel_family(family).word(), missing.name());
            if drift.iter().all(|one| one.object != object) {
                drift.push(Drift { object, fault: "missing".to_owned() });
            }
        }
        Ok(drift)
    }

    fn compare_set(&mut self, family: Family, set: SetId) -> Result<Option<Drift>, Error> {
        // Nearly always there is nothing to tell, and then nothing has to be held either.
        if set.ranges() != Ranges::ByEnds {
            let mut expected = Fingerprint::default();
            self.each_element_of(family, set, &mut |key, datum| expected.add(&self.secret, key, &datum));
            if observe::fingerprint(&mut self.netfilter, &self.secret, family, set)? == expected {
                return Ok(None);
            }
        }
        let mut found = observe::elements(&mut self.netfilter, family, set)?;
        let mut count = Difference::default();
        self.each_element_of(family, set, &mut |key, datum| {
            count.note(Some(&datum), found.remove(key).as_ref(), |expected, found| expected == found);
        });
        count.unexpected += found.len();
        Ok(count.drift(family, set))
    }

    /// What a set should have, by the Services in force and not by what was written.
    fn each_element_of(&self, family: Family, set: SetId, each: &mut impl FnMut(&Key, Datum)) {
        // Most sets are empty on most nodes; nothing has to be looked for there.
        if self.state.elements_in(family, set) > 0 {
            self.state.each_element(&mut |of, in_set, key, datum| {
                if of == family && in_set == set {
                    each(key, datum);
                }
            });
        }
    }

    /// Compares a part: the skeletons, then set after set.
    pub(crate) fn audit_part(&mut self, budget: Duration) -> Result<Audit, Error> {
        let start = Instant::now();
        let sets: Vec<_> = every_set().collect();
        let mut audit = Audit::default();
        if self.state.node.is_none() {
            return Ok(Audit { drift: Vec::new(), completed: true });
        }
        while !audit.completed {
            match self.audited.checked_sub(Family::ALL.len()) {
                None => audit.drift.extend(self.compare_skeleton(Family::ALL[self.audited])?),
                Some(position) => {
                    let (family, set) = sets[position];
                    audit.drift.extend(self.compare_set(family, set)?);
                }
            }
            self.audited += 1;
            if self.audited == Family::ALL.len() + sets.len() {
                self.audited = 0;
                audit.completed = true;
            }
            if start.elapsed() >= budget {
                break;
            }
        }
        Ok(audit)
    }

    /// True where somebody else may have changed our tables since the last call.
    pub(crate) fn was_disturbed(&mut self) -> Result<bool, Error> {
        self.netfilter.listen(true)?;
        let generation = nf_tables::generation(&mut self.netfilter)?;
        let expected = self.generation.replace(generation);
        let (mut ours, mut transactions) = (false, 0_u32);
        let complete = self.netfilter.heard(&mut |message| {
            if message.kind & 0xff == NEW_GENERATION {
                transactions += 1;
            } else {
                // The table's name is the first attribute of every object.
                let attributes = Attributes::of(message.payload.get(4..).unwrap_or_default());
                ours |= attributes.get(1).is_some_and(|name| name.text() == TABLE);
            }
        })?;
        let Some(expected) = expected else { return Ok(false) };
        if expected == generation {
            return Ok(false);
        }
        let unheard = generation.wrapping_sub(expected) != transactions;
        Ok(ours || unheard || !complete)
    }
}

/// How a set differs.
#[derive(Debug, Default)]
struct Difference {
    missing: usize,
    different: usize,
    unexpected: usize,
}

impl Difference {
    fn note<E, F>(&mut self, expected: Option<&E>, found: Option<&F>, equal: impl Fn(&E, &F) -> bool) {
        match (expected, found) {
            (Some(expected), Some(found)) => self.different += usize::from(!equal(expected, found)),
            (Some(_), None) => self.missing += 1,
            (None, Some(_)) => self.unexpected += 1,
            (None, None) => {}
        }
    }

    fn drift(&self, family: Family, set: SetId) -> Option<Drift> {
        let faults =
            [(self.missing, "missing"), (self.different, "different"), (self.unexpected, "not ours")];
        let faults: Vec<String> = faults
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, fault)| format!("{count} element{} {fault}", if *count == 1 { "" } else { "s" }))
            .collect();
        let kind = if set.is_map() { "map" } else { "set" };
        (!faults.is_empty()).then(|| Drift {
            object: format!("{kind} {} {TABLE} {}", kernel_family(family).word(), set.name()),
            fault: faults.join(", "),
        })
    }
}

/// True where a value that the kernel reported is the datum.
fn is_value(datum: Datum, found: Option<&Value>) -> bool {
    match (datum, found) {
        (Datum::Present, None) => true,
        (Datum::Target(target), Some(Value::Bytes(bytes))) => {
            let (expected, length) = target_bytes(&target);
            expected[..length] == **bytes
        }
        (Datum::Serial(serial), Some(Value::Bytes(bytes))) => serial.to_ne_bytes() == **bytes,
        (Datum::Drop, Some(Value::Verdict(verdict))) => *verdict == nf_tables::Verdict::Drop,
        (Datum::Goto(chain), Some(Value::Verdict(nf_tables::Verdict::Goto(name)))) => {
            SharedChain::parse(name) == Some(chain)
        }
        _ => false,
    }
}
