//! VMs with shadow paging: the whole guest runs at CPL 3, under Gnomon's own page tables.
//!
//! Guarantee: no guest code runs but at CPL 3, through a shadow root, inside the gate. So it reaches what
//! the shadow MMU has mapped and nothing else, and what a pause or an invalidation takes away is gone.
//!
//! The pieces, from the guest outwards: the `monitor` turns exceptions into exits, `exits` handles them
//! on the thread of the `processor`, `progress` sees that a fault is not fixed for ever, `hw_regs` and
//! `hw_state` are the real registers behind the guest's. `machine_space` says where things are for KVM,
//! the `space` is what all processors of a VM have in common,
//! `assemble` makes a [`Vm`] of it all. The `tripwire` judges touches
//! of freed frames, and `probe` finds out what kind of KVM this is.

mod assemble;
mod exits;
mod hw_regs;
mod hw_state;
mod machine_space;
mod monitor;
mod probe;
mod processor;
mod progress;
mod space;
mod tripwire;

pub use assemble::Vm;
pub use assemble::shadow_table_bytes;
pub use probe::{HostKind, HostTraits};
pub use processor::ShadowProcessor;
