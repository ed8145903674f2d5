//! lockstep-integration
