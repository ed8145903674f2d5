//! Tests of the whole crate; the rules by name, and the planner against a slow evaluator.

mod cluster;
mod decide;
mod oracle;
mod properties;
mod rules;
mod stale;
mod trace;
