//! A guard against faults that are fixed for ever.

use crate::addr::Gva;
use crate::shadow_mmu::Access;
use crate::vmm::error::GuestError;

/// How often the same fault may be fixed in a row. A handful of times is normal: the page may be
/// evicted again before the guest gets to touch it.
const MAX_REPEATS: u32 = 10_000;

/// Counts how often the same fault came in a row.
#[derive(Default)]
pub(super) struct ProgressGuard {
    last: Option<(u64, u64, Access)>,
    repeats: u32,
}

impl ProgressGuard {
    /// The fault of the instruction at `rip` for `gva` was fixed.
    pub(super) fn fixed(&mut self, rip: u64, gva: u64, access: Access) -> Result<(), GuestError> {
        let fault = Some((rip, gva, access));
        if self.last != fault {
            self.last = fault;
            self.repeats = 0;
            return Ok(());
        }
        self.repeats += 1;
        if self.repeats < MAX_REPEATS {
            return Ok(());
        }
        Err(GuestError::Stuck { gva: Gva::new(gva), times: self.repeats })
    }

    /// Something else happened.
    pub(super) fn reset(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_fault_in_a_row_is_an_error() {
        let mut guard = ProgressGuard::default();
        for round in 0..3 * u64::from(MAX_REPEATS) {
            guard.fixed(0x1000, 0x5000 + round % 2, Access::Read).unwrap();
        }
        guard.reset();
        for _ in 0..MAX_REPEATS {
            guard.fixed(1, 2, Access::Write).unwrap();
        }
        assert!(matches!(
            guard.fixed(1, 2, Access::Write),
            Err(GuestError::Stuck { times: 10_000, .. })
        ));
    }
}
