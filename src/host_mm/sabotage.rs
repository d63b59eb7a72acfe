//! Rules that can be broken on purpose, to show that the checks catch it.

/// One rule of the protocol to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// SPTEs are cleared, but the frames are not zapped: translations that processors cache live on.
    SkipFlush,
    /// The dirty state that an invalidation harvests is thrown away.
    DropDirty,
    /// A mapping is installed without its reverse-map entry.
    ForgetRmap,
    /// A fault installs its mapping although an invalidation overlapped it (and dawdles, so that
    /// one often does).
    LateInstall,
    /// Frames are given to new pages before the flush.
    EarlyReuse,
    /// Every so many pages, one bit of a page in swap flips.
    SwapCorrupt,
}
