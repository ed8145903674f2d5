//! Where the state comes from: Kubernetes, or a directory of manifests.
#![forbid(unsafe_code)]

mod event;

pub use event::{Changes, Event, NodeChange, ObjectName, QuarantineChange};
