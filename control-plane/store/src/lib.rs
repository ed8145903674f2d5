//! lockstep-store
