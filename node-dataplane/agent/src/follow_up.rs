//! What follows a programming pass and is no part of it: work that must come after the rules are
//! in force and must not hold them up.
//!
//! It may fail without the rules being any less in force. Then it complains, and the
//! complaints are in every Ack until they are over.

use lockstep_model::ServiceKey;
use lockstep_view::ForwardingPlan;

/// Something that is told of every pass.
pub trait FollowUp: Send {
    /// The plan is in force. `changed` are the Services the pass was about, sorted, `None` = all;
    /// those of which `failed` is true are not as planned, now or since earlier. Does not block.
    fn committed(
        &mut self,
        plan: &ForwardingPlan,
        changed: Option<&[ServiceKey]>,
        failed: &dyn Fn(&ServiceKey) -> bool,
    );

    /// What it could not do, complete and one per Service; `None` = as at the last call.
    fn complaints(&mut self) -> Option<Vec<Complaint>>;
}

/// A part of a Service, beside its rules, that is not as it should be. It is tried again without
/// anybody's help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// The Service.
    pub service: ServiceKey,
    /// Class of the fault.
    pub kind: ComplaintKind,
    /// The fault, for people: object, cause.
    pub message: String,
}

/// Class of a [`Complaint`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComplaintKind {
    /// Somebody else has it.
    Conflict,
    /// The kernel refused.
    Kernel,
}
