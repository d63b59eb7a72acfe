//! What layers name of their own.

/// A rule that can be broken on purpose, to show that the checks catch it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule(&'static str);

/// A point of the protocol: one thread's step is over and the next has not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point(&'static str);

/// What may go wrong around a layer at any time: a disk, a full file system, a slow client, a signal.
/// Unlike a broken rule it must do no harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    name: &'static str,
    calls: &'static str,
    is_chance: bool,
}

impl Rule {
    /// The rule of this name.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    /// As it is written on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.0
    }
}

impl Point {
    /// The point of this name.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    /// As it is written in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.0
    }
}

impl Fault {
    /// The fault of this name, which may strike such calls ("accesses of devices").
    #[must_use]
    pub const fn new(name: &'static str, calls: &'static str) -> Self {
        Self { name, calls, is_chance: false }
    }

    /// The same, of a fault that strikes by chance only.
    #[must_use]
    pub const fn by_chance(name: &'static str, calls: &'static str) -> Self {
        Self { name, calls, is_chance: true }
    }

    /// As it is written on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// What is counted, for people: "1,234 of these".
    #[must_use]
    pub const fn calls(self) -> &'static str {
        self.calls
    }

    /// Whether only a probability says when it strikes.
    pub(super) const fn is_chance(self) -> bool {
        self.is_chance
    }
}
