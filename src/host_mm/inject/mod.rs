//! What is broken on purpose: one rule of Gnomon's own ([`Sabotage`]), and faults of the host, which are
//! what a disk, a full file system, a slow client or a signal may do at any time. Unlike sabotage they
//! break no rule: with any of them, no byte may be wrong and nothing may hang.
//!
//! Guarantee: without an item there is no [`Injector`], and what would ask it costs one look at a
//! `None` (swap and clients: nothing at all). Each item counts the calls that it could have struck
//! and those that it did, so that a run in which one never struck can say so. With the same seed,
//! the same calls by number are struck, whichever threads make them.
//!
//! docs/fault-injection.md has the outcome of each item.

mod device;
mod interrupt;
mod notifier;
mod pause;
mod peer;
mod sabotage;
mod trigger;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use pause::Pauses;
use sabotage::SabotageRange;
use trigger::Trigger;

pub use pause::{PauseCount, PausePoint};
pub use peer::PeerFault;
pub use sabotage::Sabotage;
pub use trigger::When;

/// One kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostFault {
    /// A write to swap fails, with half a page written.
    SwapWrite(Errno),
    /// A read from swap fails.
    SwapRead(Errno),
    /// Swap says that no slot is free.
    SwapFull,
    /// The system call of a write to swap writes a part only.
    ShortWrite,
    /// A call of an export notifier takes that much longer.
    SlowNotifier(Duration),
    /// An access of a device to a page takes that much longer.
    SlowDevice(Duration),
    /// No free frame is found where there may be some.
    FrameEnomem,
    /// Signals come during a system call of swap or of a flush, and it returns `EINTR`.
    Eintr,
    /// A thread stops for a moment at a point of the protocol.
    Pause,
    /// A peer does not answer an invalidation.
    PeerHang,
    /// A peer goes away instead of answering an invalidation.
    PeerKill,
}

impl HostFault {
    /// What is counted, for people: "1,234 of these".
    #[must_use]
    pub fn calls(self) -> &'static str {
        match self {
            Self::SwapWrite(_) => "writes to swap",
            Self::SwapRead(_) => "reads from swap",
            Self::SwapFull => "allocations of swap slots",
            Self::ShortWrite => "system calls that write to swap",
            Self::SlowNotifier(_) => "calls of export notifiers",
            Self::SlowDevice(_) => "accesses of devices",
            Self::FrameEnomem => "allocations of frames",
            Self::Eintr => "system calls of swap and flushes",
            Self::Pause => "points of the protocol passed",
            Self::PeerHang | Self::PeerKill => "invalidations sent to peers",
        }
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
        match (self.fault, self.when) {
            (HostFault::FrameEnomem, When::Chance(chance)) => write!(f, "frame-enomem={chance}"),
            (HostFault::Eintr, When::Chance(chance)) => write!(f, "eintr={chance}"),
            (HostFault::Pause, When::Chance(chance)) => write!(f, "pause={chance}"),
            (fault @ (HostFault::SlowNotifier(_) | HostFault::SlowDevice(_)), When::ALWAYS) => {
                write!(f, "{}", Name(fault))
            }
            (fault, when) => write!(f, "{}@{when}", Name(fault)),
        }
    }
}

struct Name(HostFault);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            HostFault::SwapWrite(errno) => write!(f, "swap-write={errno:?}"),
            HostFault::SwapRead(errno) => write!(f, "swap-read={errno:?}"),
            HostFault::SwapFull => f.write_str("swap-full"),
            HostFault::ShortWrite => f.write_str("short-write"),
            HostFault::SlowNotifier(time) => write!(f, "slow-notifier={}", time.as_millis()),
            HostFault::SlowDevice(time) => write!(f, "slow-device={}", time.as_millis()),
            HostFault::FrameEnomem => f.write_str("frame-enomem"),
            HostFault::Eintr => f.write_str("eintr"),
            HostFault::Pause => f.write_str("pause"),
            HostFault::PeerHang => f.write_str("peer-hang"),
            HostFault::PeerKill => f.write_str("peer-kill"),
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
}

impl InjectionPlan {
    /// Whether anything is to fail, rather than only take longer.
    #[must_use]
    pub fn may_fail(&self) -> bool {
        self.items.iter().any(|item| item.fault != HostFault::Pause)
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

/// What is broken on purpose in one host memory: a rule of Gnomon's own, and whatever the host does.
#[derive(Debug)]
pub(in crate::host_mm) struct Lab {
    sabotage: Option<Sabotage>,
    /// Where the rule is broken.
    range: SabotageRange,
    injector: Option<Arc<Injector>>,
}

impl Lab {
    pub(in crate::host_mm) fn new(
        sabotage: Option<Sabotage>,
        injector: Option<Arc<Injector>>,
    ) -> Self {
        Self { sabotage, range: SabotageRange::default(), injector }
    }

    /// What decides about faults of the host, if there are to be any.
    pub(in crate::host_mm) fn injector(&self) -> Option<&Arc<Injector>> {
        self.injector.as_ref()
    }

    /// Counts a call that this fault may strike; whether it does.
    pub(in crate::host_mm) fn strikes(&self, fault: HostFault) -> bool {
        self.injector.as_ref().is_some_and(|injector| injector.strikes(fault))
    }
}

/// Decides for each call whether it goes wrong.
#[derive(Debug)]
pub(in crate::host_mm) struct Injector {
    items: Vec<(Injection, Trigger)>,
    pauses: Vec<Pauses>,
    over: AtomicBool,
}

impl Injector {
    /// `None` if nothing is to go wrong.
    pub(in crate::host_mm) fn new(plan: &InjectionPlan) -> Option<Arc<Self>> {
        let items: Vec<_> = (0..)
            .zip(&plan.items)
            .map(|(number, &item)| (item, Trigger::new(item.when, plan.seed, number)))
            .collect();
        let pauses = (0..).zip(&plan.items);
        let pauses = pauses.filter_map(|(number, item)| Pauses::of(item, plan, number)).collect();
        (!items.is_empty()).then(|| Arc::new(Self { items, pauses, over: AtomicBool::new(false) }))
    }

    fn is_over(&self) -> bool {
        // Relaxed: whoever ends the injection has stopped those who must not be struck any more.
        self.over.load(Ordering::Relaxed)
    }

    /// Counts a call for each item whose fault `pick` wants; what it picked of the first that
    /// strikes.
    pub(in crate::host_mm) fn strike<T>(&self, pick: impl Fn(HostFault) -> Option<T>) -> Option<T> {
        if self.is_over() {
            return None;
        }
        let mut struck = None;
        for (item, trigger) in &self.items {
            if let Some(picked) = pick(item.fault)
                && trigger.strikes()
            {
                struck = struck.or(Some(picked));
            }
        }
        struck
    }

    /// As [`strike`](Self::strike), for a fault without anything to tell.
    pub(in crate::host_mm) fn strikes(&self, fault: HostFault) -> bool {
        self.strike(|candidate| (candidate == fault).then_some(())).is_some()
    }

    /// Whether any item has this fault.
    pub(in crate::host_mm) fn has(&self, is_it: impl Fn(HostFault) -> bool) -> bool {
        self.items.iter().any(|(item, _)| is_it(item.fault))
    }
}

impl Lab {
    /// What came of each injected item so far, in the plan's order.
    #[must_use]
    pub(in crate::host_mm) fn injected(&self) -> Vec<InjectionCount> {
        let Some(injector) = &self.injector else {
            return Vec::new();
        };
        let mut pauses = injector.pauses.iter().map(Pauses::total);
        let count = |&(item, ref trigger): &(Injection, Trigger)| {
            let of_item = (trigger.calls(), trigger.struck());
            // A pause is counted by point.
            let of_points = (item.fault == HostFault::Pause).then(|| pauses.next()).flatten();
            let (calls, struck) = of_points.unwrap_or(of_item);
            InjectionCount { item, calls, struck }
        };
        injector.items.iter().map(count).collect()
    }

    /// Nothing is injected from now on: the disk is mended. Counts stay as they are.
    pub(in crate::host_mm) fn end_injection(&self) {
        if let Some(injector) = &self.injector {
            injector.over.store(true, Ordering::Relaxed);
        }
    }
}
