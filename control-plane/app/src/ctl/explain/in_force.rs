//! What the node says about the Service, so that nobody takes a plan for the truth.

use lockstep_model::ServiceKey;
use lockstep_view::trace::{Match, Trace, Verdict};
use lockstep_wire::v1;

use super::Evidence;
use super::answer::InForce;
use crate::ctl::view;

/// Whether the node does what is explained, by its last report.
pub(super) fn of(evidence: &Evidence, trace: &Trace<'_>) -> InForce {
    let node = &evidence.node;
    let matched = trace.matched.as_ref().map(Match::key);
    // Who has the cluster IP decides about its other ports, too.
    let service = matched.or_else(|| match trace.verdict {
        Verdict::OtherPort => evidence.view.plan().with_cluster_ip(evidence.packet.destination),
        _ => None,
    });
    let wanted = evidence.last_changed_seq.unwrap_or(evidence.head_seq);
    let (sure, unsure): (Vec<_>, Vec<_>) =
        node.failures.iter().filter(|it| may_concern(it, service)).partition(|it| it.r#ref.is_some());
    let unlisted = node.failures_truncated;
    let name = &node.node_name;
    let at = |seq: u64| format!("seq {seq} of {}", evidence.head_seq);
    let last = match matched {
        Some(_) => format!("the last change of the Service is seq {wanted}"),
        None => format!("the head is seq {wanted}"),
    };
    let (state, text) = match node.state() {
        v1::NodeSyncState::NeverSeen | v1::NodeSyncState::Unspecified => {
            ("NeverSeen", format!("not known: {name} has had no stream since the control plane started"))
        }
        v1::NodeSyncState::Disconnected => (
            "Disconnected",
            format!("not known: {name} has no stream; it was last verified at {}", at(node.verified_seq)),
        ),
        _ if !node.backend_error.is_empty() => {
            ("BackendFailed", format!("no: {name} cannot program its kernel: {}", node.backend_error))
        }
        _ if !sure.is_empty() => {
            let message = &sure[0].message;
            ("Failing", format!("no: {name} fails to program it: {message}; {}", instead(sure[0])))
        }
        _ if !unsure.is_empty() => {
            let message = &unsure[0].message;
            ("PossiblyFailing", format!("perhaps not: {name} fails at something without a name: {message}"))
        }
        _ if unlisted > 0 => {
            ("PossiblyFailing", format!("perhaps not: {name} has {unlisted} failures that it does not list"))
        }
        _ if node.verified_seq >= wanted && node.verified_seq == evidence.head_seq => {
            ("Verified", format!("yes: {name} is verified at the head, {}", at(node.verified_seq)))
        }
        _ if node.verified_seq >= wanted => {
            ("Verified", format!("yes: {name} is verified at {}; {last}", at(node.verified_seq)))
        }
        _ if node.applied_seq >= wanted => {
            ("Applied", format!("written and not read back yet: {name} has applied {}", at(node.applied_seq)))
        }
        _ => ("Behind", format!("not yet: {name} has applied {}; {last}", at(node.applied_seq))),
    };
    InForce {
        state,
        text,
        head_seq: evidence.head_seq,
        last_changed_seq: evidence.last_changed_seq,
        applied_seq: node.applied_seq,
        verified_seq: node.verified_seq,
        failures: sure.into_iter().chain(unsure).cloned().map(view::Failure::from).collect(),
        failures_unlisted: unlisted,
    }
}

/// True where a failure is, or may be, of the Service. One without a key that is UNSUPPORTED is of
/// a kind that the node does not know, which concerns no Service.
fn may_concern(failure: &v1::ResourceFailure, service: Option<&ServiceKey>) -> bool {
    match &failure.r#ref {
        None => failure.reason() != v1::FailureReason::Unsupported,
        Some(named) => {
            let mut names = named.key.split('/');
            service.is_some_and(|service| {
                names.next() == Some(&*service.namespace) && names.next() == Some(&*service.name)
            })
        }
    }
}

/// What a node's sequence numbers do not tell, where they say that something is in force.
pub(super) fn doubt(evidence: &Evidence, it: &InForce) -> Option<String> {
    matches!(it.state, "Verified" | "Applied").then(|| {
        format!(
            "a change of the Node object (zone, podCIDRs, addresses) has no sequence number: {} may go by an \
             earlier one",
            evidence.node.node_name
        )
    })
}

fn instead(failure: &v1::ResourceFailure) -> &'static str {
    match failure.in_force() {
        v1::InForce::Unspecified => "what is in force instead is not known",
        v1::InForce::Nothing => "nothing of it is in force",
        v1::InForce::Previous => "the version before is in force",
        v1::InForce::Part => "all else of it is in force",
    }
}
