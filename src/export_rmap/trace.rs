//! Tracepoints of a page's life, by the `tracing` crate.
//!
//! Guarantee: where nobody listens, a point costs one load of a number that hardly ever changes and a
//! branch, and its fields are not looked at; without the feature `trace`, and under a model checker, nothing.
//!
//! All of them have the target [`TARGET`] and the level TRACE, the point's name as their message, and
//! numbers as fields: `pfn` (host frame), `gfn` (guest frame in its memory object `object`), `client` (an
//! export client) and what belongs to the point.

/// The target of all events.
pub const TARGET: &str = "gnomon::memory";

/// `point!("name", field = number, …)`: an event. Fields that are no numbers are given as text.
#[doc(hidden)]
#[macro_export]
#[cfg(all(feature = "trace", not(any(loom, shuttle))))]
macro_rules! __point {
    ($name:literal $(, $field:ident = $value:expr)* $(,)?) => {
        $crate::trace::tracing::trace!(
            target: $crate::trace::TARGET,
            $($field = $value,)*
            $name
        )
    };
}

/// No event; the fields are not computed.
#[doc(hidden)]
#[macro_export]
#[cfg(not(all(feature = "trace", not(any(loom, shuttle)))))]
macro_rules! __point {
    ($name:literal $(, $field:ident = $value:expr)* $(,)?) => {
        if false {
            $(let _ = $value;)*
        }
    };
}

pub use __point as point;
#[doc(hidden)]
#[cfg(all(feature = "trace", not(any(loom, shuttle))))]
pub use tracing;

/// Whether somebody listens: for points that are told once for each of many.
#[must_use]
pub fn is_on() -> bool {
    #[cfg(all(feature = "trace", not(any(loom, shuttle))))]
    return tracing::enabled!(target: TARGET, tracing::Level::TRACE);
    #[cfg(not(all(feature = "trace", not(any(loom, shuttle)))))]
    return false;
}
