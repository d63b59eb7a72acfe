//! Whose fault it is that a run cannot begin.
//!
//! Guarantee: what the user can change is a [`UsageError`] with what to do; the rest is what the host refused.

use super::config::UsageError;
use crate::host_mm::MmError;
use crate::host_mm::swap::{SwapError, SwapOpenError};
use crate::lab::{Paging, SetupError};
use crate::peer::ServeError;
use crate::vmm::VmError;

/// Whose fault it is that host memory cannot be set up.
pub(crate) fn from_mm(error: MmError, paging: Paging) -> anyhow::Error {
    match &error {
        MmError::BadHostMemory { .. } => {
            UsageError(format!("--host-memory: {error}; choose another size")).into()
        }
        MmError::Swap(SwapError::Open(open)) => from_swap(open),
        MmError::Uffd(uffd) if paging == Paging::Shadow => anyhow::anyhow!("--paranoid: {uffd}"),
        MmError::Uffd(uffd) => anyhow::anyhow!("--paging direct: {uffd}"),
        _ => error.into(),
    }
}

fn from_swap(error: &SwapOpenError) -> anyhow::Error {
    let advice = match error {
        SwapOpenError::Exists { .. } => return UsageError(error.to_string()).into(),
        SwapOpenError::TooLarge { .. } => "choose less with --swap-size",
        SwapOpenError::Create { .. } => "name another place with --swap-file",
        SwapOpenError::CreateTemporary { .. } => {
            "name a place with --swap-file, or a directory in TMPDIR"
        }
        SwapOpenError::Resize { .. } | SwapOpenError::FileSizeLimit { .. } => {
            "choose less with --swap-size, or another place with --swap-file"
        }
    };
    UsageError(format!("{error}; {advice}")).into()
}

/// Whose fault it is that a VM cannot be made.
pub(crate) fn from_vm(error: VmError, paging: Paging) -> anyhow::Error {
    match error {
        VmError::Boot(boot) => UsageError(format!("cannot boot the guest: {boot}")).into(),
        VmError::MemorySize { .. } | VmError::VcpuCount { .. } | VmError::ShadowPages { .. } => {
            UsageError(error.to_string()).into()
        }
        VmError::MachineSpace { .. } => {
            UsageError(format!("{error}; choose less --memory or --host-memory")).into()
        }
        VmError::Host(host) => from_mm(host, paging),
        VmError::Kvm(kvm) => anyhow::anyhow!("{kvm} (gnomon doctor tells more)"),
        _ => error.into(),
    }
}

/// Whose fault it is that a run cannot be set up.
pub(crate) fn from_setup(error: SetupError, paging: Paging) -> anyhow::Error {
    match error {
        SetupError::Host(error) => from_mm(error, paging),
        SetupError::Vm(error) => from_vm(error, paging),
        SetupError::Storm(error) => error.into(),
    }
}

/// Whose fault it is that peers cannot be served.
pub(crate) fn from_serve(error: ServeError) -> anyhow::Error {
    match error {
        ServeError::Host(_) => error.into(),
        _ => UsageError(format!("--export-socket {error}")).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::KvmError;
    use crate::vmm::boot::BootError;

    #[test]
    fn what_the_user_can_change_is_a_usage_error() {
        let usage: [anyhow::Error; 4] = [
            from_vm(VmError::Boot(BootError::NoSegments), Paging::Shadow),
            from_vm(VmError::VcpuCount { vcpus: 9, max: 8 }, Paging::Shadow),
            from_vm(VmError::MachineSpace { end: 1 << 40, phys_bits: 39 }, Paging::Shadow),
            from_mm(
                MmError::Swap(SwapError::Open(SwapOpenError::Exists { path: "swap".into() })),
                Paging::Shadow,
            ),
        ];
        for error in &usage {
            assert!(error.is::<UsageError>(), "{error}");
        }
        let host = from_vm(VmError::Kvm(KvmError::Missing), Paging::Shadow);
        assert!(!host.is::<UsageError>());
        assert!(host.to_string().contains("gnomon doctor"), "{host}");
    }

    #[test]
    fn a_swap_that_cannot_be_made_says_where_else() {
        let error = from_mm(
            MmError::Swap(SwapError::Open(SwapOpenError::FileSizeLimit {
                bytes: 10,
                limit_bytes: 5,
            })),
            Paging::Shadow,
        );
        assert!(error.to_string().contains("--swap-file"), "{error}");
    }
}
