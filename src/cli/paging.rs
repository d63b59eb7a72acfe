//! `--paging`: how a guest's memory is mapped, and what that leaves out.

use super::args::{Invalidate, PagingMode, SabotageName, StressArgs, name_of};
use super::config::UsageError;
use crate::host_mm::Placement;
use crate::vmm::Removal;
use crate::vmm::boot::Image;
use crate::vmm::linux::KernelKind;

/// How a guest's memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Paging {
    /// By shadow page tables.
    Shadow,
    /// By a window; and how pages are taken that the guest gives back.
    Direct(Removal),
}

impl Paging {
    /// What was asked for, or what suits the kernel: those that keep to the guest's contract run with
    /// shadow paging.
    pub(crate) fn resolve(mode: PagingMode, kernel: &[u8], memory_bytes: u64) -> Self {
        match mode {
            PagingMode::Shadow => Self::Shadow,
            PagingMode::Direct => Self::Direct(Removal::default()),
            PagingMode::Auto
                if !KernelKind::of(kernel).is_linux()
                    && Image::parse(kernel, memory_bytes).is_ok() =>
            {
                Self::Shadow
            }
            PagingMode::Auto => Self::Direct(Removal::default()),
        }
    }

    /// Which frame a page may be in.
    pub(crate) fn placement(self, memory_bytes: u64) -> Placement {
        match self {
            Self::Shadow => Placement::Anywhere,
            Self::Direct(_) => Placement::Identity { guest_bytes: memory_bytes },
        }
    }

    /// Its name on the command line.
    pub(crate) fn name(self) -> String {
        name_of(match self {
            Self::Shadow => PagingMode::Shadow,
            Self::Direct(_) => PagingMode::Direct,
        })
    }

    /// The kinds of invalidation for those who do not choose.
    pub(crate) fn default_invalidations(self) -> Vec<Invalidate> {
        use Invalidate::{Clean, Free, Reclaim, Remove};
        match self {
            Self::Shadow => vec![Reclaim, Clean],
            Self::Direct(_) => vec![Reclaim, Clean, Free, Remove],
        }
    }
}

/// Whether a kind of invalidation wants another frame for a page, or one frame for several.
fn moves_pages(kind: Invalidate) -> bool {
    use Invalidate::{Cow, Merge, Migrate, Remap, Zero};
    [Cow, Merge, Migrate, Remap, Zero].contains(&kind)
}

/// Refuses what this paging has not.
pub(crate) fn check(
    paging: Paging,
    args: &StressArgs,
    kinds: &[Invalidate],
) -> Result<(), UsageError> {
    let refuse = |text: String| Err(UsageError(text));
    let sabotage = args.sabotage.map(|name| (name, name_of(name)));
    use SabotageName::{DropEvent, EarlyReuse, SkipCloneProtect, SkipWp};
    if paging == Paging::Shadow {
        if kinds.contains(&Invalidate::Remove) {
            return refuse(
                "--invalidate remove is about the window of direct paging: add --paging direct"
                    .to_owned(),
            );
        }
        return match sabotage {
            Some((DropEvent | SkipWp, name)) => refuse(format!(
                "--sabotage {name} breaks a rule of direct paging: add --paging direct"
            )),
            _ => Ok(()),
        };
    }
    if let Some(&kind) = kinds.iter().find(|&&kind| moves_pages(kind)) {
        return refuse(format!(
            "--invalidate {} wants another frame for a page, and with direct paging each page has its own: choose from reclaim, clean, free, remove, none, or use --paging shadow",
            name_of(kind)
        ));
    }
    let needs_shadow = [
        (args.vms > 1, "--vms of more than 1"),
        (args.churn.is_some(), "--churn"),
        (args.export_socket.is_some(), "--export-socket"),
    ];
    if let Some((_, option)) = needs_shadow.iter().find(|(given, _)| *given) {
        return refuse(format!(
            "{option} wants frames that several have, and with direct paging each page has its own: leave it out, or use --paging shadow"
        ));
    }
    match sabotage {
        Some((EarlyReuse | SkipCloneProtect, name)) => refuse(format!(
            "--sabotage {name} breaks a rule that direct paging has not, since each page has its own frame: use --paging shadow"
        )),
        Some((DropEvent, name)) if !kinds.contains(&Invalidate::Remove) => refuse(format!(
            "--sabotage {name} shows when pages are removed: add remove to --invalidate"
        )),
        _ => Ok(()),
    }
}

/// How pages are taken that the guest gives back.
pub(crate) fn removal(kinds: &[Invalidate]) -> Removal {
    match (kinds.contains(&Invalidate::Free), kinds.contains(&Invalidate::Remove)) {
        (true, true) => Removal::Both,
        (false, true) => Removal::Window,
        _ => Removal::Free,
    }
}
