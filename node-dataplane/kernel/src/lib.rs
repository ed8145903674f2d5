//! lockstep-kernel
