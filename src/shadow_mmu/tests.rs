//! The shadow MMU without KVM: software processors run on the shadow tables, and a naive model of
//! the guest's paging says what they must find.

mod concurrent;
mod cpu;
mod directed;
mod machine;
mod model;
mod random;
