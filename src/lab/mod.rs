//! The test laboratory: VMs run under memory pressure and storms of invalidations, and what all checks find.
//!
//! What this layer guarantees:
//!
//! - a run ends: each of its phases has a bound, and a signal ends it before ([`run`]);
//! - what a check found stays found, also when what it was found in is gone ([`Violations`]);
//! - nothing that the laboratory does to a guest's pages changes what the guest finds in them ([`Storms`]),
//!   and who looks on raises no false alarm;
//! - an error that was injected is not taken for one of the host, nor one of the host for a violation
//!   ([`Judge`]).
//!
//! It says nothing to anybody by itself: who wants a run gives a [`Plan`] and a [`Watch`], which is told how it
//! goes.

mod course;
mod fleet;
pub mod inject;
mod injected;
mod judge;
mod observe;
mod peers;
mod plan;
mod population;
mod setup;
mod sources;
mod storms;
mod tail;
pub mod text;
mod violations;
mod watch;

pub use course::{Course, Detection, run};
pub use fleet::{Done, Fate, Fleet, Member, Objects, Record};
pub use injected::{Injected, Item, Pages, Pause, announcement};
pub use judge::{Advice, Judge, errno_of};
pub use peers::{Peers, PeersCount};
pub use plan::{Invalidation, Paging, PeersPlan, Plan, SetupPlan, StormPlan};
pub use population::PopulationCount;
pub use setup::{Figures, Kind, Setup, SetupError};
pub use storms::{StormCount, Storms};
pub use tail::Tail;
pub use violations::{
    Check, EndCheck, Violation, Violations, collect, cut_short, left_behind, of_host,
};
pub use watch::{Status, Watch, wait_for};
