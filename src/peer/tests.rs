//! Peers of every kind, on socket pairs in this process.

mod bad;
mod good;
mod rig;
