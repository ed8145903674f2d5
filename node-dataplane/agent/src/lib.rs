//! lockstep-node
