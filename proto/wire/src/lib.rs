//! lockstep-wire
