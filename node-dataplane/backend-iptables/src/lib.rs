//! lockstep-backend-iptables
