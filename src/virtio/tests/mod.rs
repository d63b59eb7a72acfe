//! Devices under a driver that is a few lines of test: real registers, rings in real guest memory,
//! behind a real IOTLB.

mod blk;
mod rig;
mod transport;
