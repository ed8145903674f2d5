//! lockstep-server
