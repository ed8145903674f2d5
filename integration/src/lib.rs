//! What integration tests stand on: real programs, started and ended with the test.

pub mod apiserver;
