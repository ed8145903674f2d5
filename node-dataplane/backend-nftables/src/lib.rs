//! lockstep-backend-nftables
