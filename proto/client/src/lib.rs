//! lockstep-client
