//! Devices under a driver that is a few lines of test: real registers, rings in real guest memory,
//! behind a real IOTLB.

mod balloon;
mod blk;
mod disk;
mod durability;
mod hostile;
mod in_flight;
mod rig;
mod transport;
