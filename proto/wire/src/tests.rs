//! Tests of the contract as a whole; those of one function stand beside it.

mod grpc;
mod objects;
mod properties;
