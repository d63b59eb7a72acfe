//! Which pages reclaim takes first.

/// How reclaim chooses among frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReclaimPolicy {
    /// A clock over the frame table driven by the accessed bits of the clients' mappings, with a
    /// two-bit use count: a page in use survives a scan of any length.
    #[default]
    Clock,
    /// The order in which frames were filled, whatever their use. For comparison only.
    Fifo,
}
