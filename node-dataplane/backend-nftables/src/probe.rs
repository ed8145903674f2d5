//! Whether this kernel has everything that the backend uses.

use lockstep_kernel::nf_tables::{Batch, CommitError, Netfilter};
use lockstep_model::{Family, Protocol};
use lockstep_view::{NodePlan, NodePortScope, Pool};

use crate::names::{Choice, SharedChain, Via, Way};
use crate::rules::kernel_family;
use crate::skeleton::write_skeleton;
use crate::state::State;
use crate::{Error, layout};

/// Makes and deletes a table with everything the backend uses, in one transaction.
pub(crate) fn probe(netfilter: &mut dyn Netfilter, table: &str) -> Result<(), Error> {
    let node = NodePlan {
        pods: None,
        node_ports_v4: NodePortScope::AllLocal,
        node_ports_v6: NodePortScope::AllLocal,
        localhost_node_ports: false,
        masquerade_mark: 1,
        service_cidrs: Vec::new(),
        node_addresses: Vec::new(),
    };
    let choice = Choice { pool: Pool::Cluster, count: 1, affinity: None };
    let affine = Choice { affinity: Some(1), ..choice };
    let way = |masquerade| Way::Targets { choice, masquerade };
    let via = Via::Address;
    let chains = [
        SharedChain::Targets { via, choice },
        SharedChain::Targets { via, choice: affine },
        SharedChain::Targets { via: Via::NodePort, choice: affine },
        SharedChain::Marked { via, choice },
        SharedChain::BySource { via, ways: [way(false), way(true), Way::Nowhere] },
        SharedChain::Refuse,
    ];
    let mut batch = Batch::new();
    let mut objects = Vec::new();
    for family in Family::ALL {
        let kernel = kernel_family(family);
        write_skeleton(&mut batch, table, family, &node, |set| State::default().size(family, set));
        objects.push((batch.last_seq(), format!("the sets and base chains of an {} table", kernel.word())));
        for chain in chains {
            let layout = layout::shared(family, &node, chain);
            batch.add_chain(kernel, table, &layout.chain);
            for rule in layout.kernel_rules(family) {
                batch.add_rule(kernel, table, &rule);
            }
            objects.push((
                batch.last_seq(),
                format!("the rules of chain {} in an {} table", chain.name(), kernel.word()),
            ));
        }
        batch.delete_table(kernel, table);
        objects.push((batch.last_seq(), format!("deleting an {} table", kernel.word())));
    }
    debug_assert_eq!(crate::sets::protocol_number(Protocol::Tcp), 6);
    netfilter.commit(batch.finish()).map_err(|source| {
        let seq = match &source {
            CommitError::Refused(refusals) => refusals.iter().map(|refusal| refusal.seq).find(|seq| *seq > 0),
            CommitError::Link(_) => None,
        };
        let object = objects.into_iter().find(|(last, _)| seq.is_some_and(|seq| seq <= *last));
        let what = object.map_or_else(|| "an nf_tables transaction".to_owned(), |(_, what)| what);
        Error::Lacks { what, source }
    })
}
