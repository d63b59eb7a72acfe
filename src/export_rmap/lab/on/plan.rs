//! What is to go wrong: the items of `--inject`, and what came of them.

use std::fmt;
use std::time::Duration;

use nix::errno::Errno;

use super::trigger::When;
use super::{Fault, Point};
use crate::lab::PAUSE;

/// What a fault needs to be told beside when it strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum With {
    /// Nothing.
    Nothing,
    /// The error that a call fails with.
    Errno(Errno),
    /// How much longer a call takes.
    Time(Duration),
}

/// One kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFault {
    /// What.
    pub kind: Fault,
    /// With what.
    pub with: With,
}

impl Fault {
    /// The fault, which needs to be told nothing.
    #[must_use]
    pub const fn plain(self) -> HostFault {
        HostFault { kind: self, with: With::Nothing }
    }

    /// The fault with this error.
    #[must_use]
    pub const fn failing(self, errno: Errno) -> HostFault {
        HostFault { kind: self, with: With::Errno(errno) }
    }

    /// The fault for so long.
    #[must_use]
    pub const fn lasting(self, time: Duration) -> HostFault {
        HostFault { kind: self, with: With::Time(time) }
    }
}

/// A fault and when it strikes: one item of `--inject`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Injection {
    /// What.
    pub fault: HostFault,
    /// When.
    pub when: When,
}

/// As it is written on the command line.
impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HostFault { kind, with } = self.fault;
        match (with, self.when) {
            (With::Nothing, When::Chance(chance)) if kind.is_chance() => {
                write!(f, "{}={chance}", kind.name())
            }
            (With::Nothing, when) => write!(f, "{}@{when}", kind.name()),
            (With::Errno(errno), when) => write!(f, "{}={errno:?}@{when}", kind.name()),
            (With::Time(time), When::ALWAYS) => write!(f, "{}={}", kind.name(), time.as_millis()),
            (With::Time(time), when) => write!(f, "{}={}@{when}", kind.name(), time.as_millis()),
        }
    }
}

/// Everything that is to go wrong.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InjectionPlan {
    /// The items; any may stand more than once.
    pub items: Vec<Injection>,
    /// Of the random choices.
    pub seed: u64,
    /// The points at which an item `pause` has threads stop. A point's place here is a part of what the
    /// seed decides.
    pub points: &'static [Point],
}

impl InjectionPlan {
    /// Whether anything is to fail, rather than only take longer.
    #[must_use]
    pub fn may_fail(&self) -> bool {
        self.items.iter().any(|item| item.fault.kind != PAUSE)
    }
}

/// What came of an item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InjectionCount {
    /// The item.
    pub item: Injection,
    /// Calls that it could have struck.
    pub calls: u64,
    /// Those that it did.
    pub struck: u64,
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    #[test]
    fn an_item_is_written_as_on_the_command_line() {
        const DISK: Fault = Fault::new("disk", "writes");
        const LUCK: Fault = Fault::by_chance("luck", "tries");
        let once = When::Once(NonZeroU64::MIN);
        let slow = DISK.lasting(Duration::from_millis(7));
        let written = [
            (LUCK.plain(), When::Chance(0.25)),
            (DISK.plain(), When::Chance(0.25)),
            (DISK.plain(), When::ALWAYS),
            (DISK.failing(Errno::EIO), once),
            (slow, When::ALWAYS),
            (slow, once),
        ]
        .map(|(fault, when)| Injection { fault, when }.to_string());
        let expected = ["luck=0.25", "disk@0.25", "disk@1+", "disk=EIO@1", "disk=7", "disk=7@1"];
        assert_eq!(written, expected);
    }
}
