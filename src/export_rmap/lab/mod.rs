//! The laboratory: one rule broken on purpose, faults of the host, and pauses where threads can overtake
//! each other, to show that the checks catch the one and that nothing is wrong under the others.
//!
//! Guarantees:
//!
//! - each layer names its own rules, faults and points, and asks the [`Lab`] where it keeps the rule. The
//!   laboratory tells them apart by their texts, and knows of no layer;
//! - without the feature `lab` there is nothing of it: names have no text, [`Lab`] has no size, and what is
//!   asked of it is `false`, written out, wherever it stands.

#[cfg(not(feature = "lab"))]
mod off;
#[cfg(feature = "lab")]
mod on;

#[cfg(not(feature = "lab"))]
pub use off::{Fault, Lab, Point, Rule};
#[cfg(feature = "lab")]
pub use on::{
    Fault, HostFault, Injection, InjectionCount, InjectionPlan, Lab, PauseCount, Point, Rule, When,
    With,
};

#[cfg(not(feature = "lab"))]
pub(crate) use off::OfPage;
#[cfg(feature = "lab")]
pub(crate) use on::OfPage;

/// No rule: threads only take their time where they would for one that is broken. The control for these.
pub const DAWDLE: Rule = Rule::new("dawdle");

/// A thread stops for a moment at a point of the protocol.
pub const PAUSE: Fault = Fault::by_chance("pause", "points of the protocol passed");
