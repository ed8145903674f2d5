//! Tests of the contract as a whole; those of one function stand beside it.

mod compatibility;
mod golden;
mod grpc;
mod lint;
mod objects;
mod properties;
mod transactions;
mod vectors;
