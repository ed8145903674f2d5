//! lockstep-control-plane
