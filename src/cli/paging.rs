//! `--paging`: how a guest's memory is mapped, and what that leaves out.

use super::args::{PagingMode, SabotageName, StressArgs, name_of};
use super::config::UsageError;
use crate::lab::{Invalidation, Paging};
use crate::vmm::Removal;
use crate::vmm::boot::Image;
use crate::vmm::linux::KernelKind;

/// What was asked for, or what suits the kernel: those that keep to the guest's contract run with
/// shadow paging.
pub(crate) fn resolve(mode: PagingMode, kernel: &[u8], memory_bytes: u64) -> Paging {
    match mode {
        PagingMode::Shadow => Paging::Shadow,
        PagingMode::Direct => Paging::Direct(Removal::default()),
        PagingMode::Auto
            if !KernelKind::of(kernel).is_linux() && Image::parse(kernel, memory_bytes).is_ok() =>
        {
            Paging::Shadow
        }
        PagingMode::Auto => Paging::Direct(Removal::default()),
    }
}

/// Its name on the command line.
pub(crate) fn name(paging: Paging) -> String {
    name_of(match paging {
        Paging::Shadow => PagingMode::Shadow,
        Paging::Direct(_) => PagingMode::Direct,
    })
}

/// The kinds of invalidation for those who do not choose.
pub(crate) fn default_invalidations(paging: Paging) -> Vec<Invalidation> {
    use Invalidation::{Clean, Free, Reclaim, Remove};
    match paging {
        Paging::Shadow => vec![Reclaim, Clean],
        Paging::Direct(_) => vec![Reclaim, Clean, Free, Remove],
    }
}

/// Whether a kind of invalidation wants another frame for a page, or one frame for several.
fn moves_pages(kind: Invalidation) -> bool {
    use Invalidation::{Cow, Merge, Migrate, Remap, Zero};
    [Cow, Merge, Migrate, Remap, Zero].contains(&kind)
}

/// Refuses what this paging has not.
pub(crate) fn check(
    paging: Paging,
    args: &StressArgs,
    kinds: &[Invalidation],
) -> Result<(), UsageError> {
    let refuse = |text: String| Err(UsageError(text));
    let sabotage = args.sabotage.map(|name| (name, name_of(name)));
    use SabotageName::{DropEvent, EarlyReuse, SkipCloneProtect, SkipWp};
    if paging == Paging::Shadow {
        if kinds.contains(&Invalidation::Remove) {
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
            kind.name()
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
        Some((DropEvent, name)) if !kinds.contains(&Invalidation::Remove) => refuse(format!(
            "--sabotage {name} shows when pages are removed: add remove to --invalidate"
        )),
        _ => Ok(()),
    }
}

/// How pages are taken that the guest gives back.
pub(crate) fn removal(kinds: &[Invalidation]) -> Removal {
    match (kinds.contains(&Invalidation::Free), kinds.contains(&Invalidation::Remove)) {
        (true, true) => Removal::Both,
        (false, true) => Removal::Window,
        _ => Removal::Free,
    }
}
