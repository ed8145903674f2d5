//! How much of the kernel `verify` reads: where the tool can, only what was touched.
//!
//! The nft flavour's restore answers `-S CHAIN` with what that chain holds, and asks the
//! kernel for no other chain: 8 ms among 10,000 Services, where the whole takes 5 s. It lists what it
//! is asked for and commits nothing. Whether a chain is gone the kernel itself says, because
//! the tool ends at the first chain it does not find. The kernel of the legacy flavour hands
//! out whole tables only.
//!
//! What is listed counts only where it equals what should be there. Where it does not, or cannot
//! be understood, everything is read, and that is what is reported.

use lockstep_view::backend::Drift;
use lockstep_xtables::{Flavour, Snapshot, Table, ToolError};

use crate::check;
use crate::family::{FamilyState, Touched};
use crate::fixed;
use crate::names::{ChainName, Shared};

/// With more chains than this, reading everything is not much slower.
const FEW: usize = 2_000;

/// Reads back what was written last. `gone`: the kernel has none of the chains that the last
/// write deleted.
pub(crate) fn read_back(state: &FamilyState, gone: bool) -> Result<Vec<Drift>, ToolError> {
    let touched = state.touched.as_ref();
    // What could not be written is told as failures of Services, and may not be readable either.
    if state.terms.is_none() || touched.is_some_and(is_nothing) {
        return Ok(Vec::new());
    }
    if let Some(touched) = touched.filter(|_| gone && state.tool.flavour == Flavour::Nft)
        && listed(state, touched)
    {
        return Ok(Vec::new());
    }
    let saved = state.tool.save()?;
    Ok(check::compare(state, &Snapshot::parse(&saved), touched, &Shared::ALL))
}

/// True where the last write had nothing to do, as where only ServiceCIDRs changed.
fn is_nothing(touched: &Touched) -> bool {
    touched.services.is_empty() && touched.shared.is_empty() && touched.gone.is_empty()
}

/// True where the chains that the last write touched are as they should be.
fn listed(state: &FamilyState, touched: &Touched) -> bool {
    let own: Vec<ChainName> = touched
        .services
        .iter()
        .flat_map(|key| state.rules_in_force(key).chains().map(|(chain, _)| *chain).collect::<Vec<_>>())
        .collect();
    if own.len() > FEW {
        return false;
    }
    let shared: Vec<Shared> = touched.shared.iter().copied().collect();
    let mut chains: Vec<(Table, &str)> = state.terms.as_ref().map(fixed::chains).unwrap_or_default();
    chains.extend(shared.iter().map(|shared| (shared.table(), shared.chain())));
    chains.extend(own.iter().map(|chain| (Table::Nat, chain.as_str())));
    let Ok(text) = state.tool.list(&chains) else { return false };
    Snapshot::of_list(&text, &chains)
        .is_some_and(|snapshot| check::compare(state, &snapshot, Some(touched), &shared).is_empty())
}
