//! The command line of Gnomon.

fn main() {}
