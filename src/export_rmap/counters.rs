//! What a layer counts: plain numbers to hand out, and the live side of them.

use std::sync::atomic::{AtomicU64, Ordering};

/// A live counter, right by itself: relaxed, since a statistic orders nothing.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts so many more.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// For the most that there ever was of something.
    pub fn raise(&self, to: u64) {
        self.0.fetch_max(to, Ordering::Relaxed);
    }

    /// The count so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// `pub struct Stats { name, … }`: numbers of type `u64` that can be added up. With
/// `live pub(super) struct Counters;` after it, also a [`Counter`] for each, and `snapshot`.
#[doc(hidden)]
#[macro_export]
macro_rules! __counters {
    (
        $(#[$about:meta])*
        pub struct $Stats:ident { $($(#[$doc:meta])* $name:ident,)* }
        $(live $visible:vis struct $Live:ident;)?
    ) => {
        $crate::counters::figures! {
            $(#[$about])*
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
            pub struct $Stats {
                $($(#[$doc])* pub $name: u64,)*
            }
        }

        impl $Stats {
            /// Adds what was counted elsewhere.
            pub fn add(&mut self, other: &Self) {
                $(self.$name = self.$name.saturating_add(other.$name);)*
            }
        }

        $crate::counters::live! { $($visible $Live)?, $Stats { $($name,)* } }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __live {
    (, $Stats:ident { $($name:ident,)* }) => {};
    ($visible:vis $Live:ident, $Stats:ident { $($name:ident,)* }) => {
        /// The live side.
        #[derive(Debug, Default)]
        $visible struct $Live {
            $($visible $name: $crate::counters::Counter,)*
        }

        impl $Live {
            $visible fn snapshot(&self) -> $Stats {
                $Stats { $($name: self.$name.get(),)* }
            }
        }
    };
}

/// What can be serialised, if this crate was built so.
#[doc(hidden)]
#[macro_export]
#[cfg(feature = "serde")]
macro_rules! __figures {
    ($figures:item) => {
        #[derive($crate::counters::serde::Serialize)]
        #[serde(crate = "gnomon_export_rmap::counters::serde")]
        $figures
    };
}

/// What could be serialised.
#[doc(hidden)]
#[macro_export]
#[cfg(not(feature = "serde"))]
macro_rules! __figures {
    ($figures:item) => {
        $figures
    };
}

#[doc(hidden)]
#[cfg(feature = "serde")]
pub use serde;
pub use {__counters as counters, __figures as figures, __live as live};

#[cfg(test)]
#[allow(unreachable_pub)]
mod tests {
    super::counters! {
        /// For the test.
        pub struct Both {
            /// One.
            one,
            /// Two.
            two,
        }
        live struct Live;
    }

    #[test]
    fn each_counter_is_summed_up_by_itself() {
        let live = Live::default();
        live.one.add(2);
        live.two.add(u64::MAX);
        let mut sum = live.snapshot();
        sum.add(&live.snapshot());
        assert_eq!(sum, Both { one: 4, two: u64::MAX });
    }
}
