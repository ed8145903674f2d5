//! Tests of the contract as a whole; those of one function stand beside it.

mod golden;
mod grpc;
mod lint;
mod objects;
mod properties;
mod transactions;
