//! Instructions that the guest's processor does not have: #UD, whatever the real one raised at CPL 3.
//!
//! They are those whose CPUID bit no guest sees (`cpuid_offered`), and moves of control and debug
//! registers that do not exist, for which the real processor checks the privilege first.

use iced_x86::{Decoder, DecoderOptions, Mnemonic, Register};

use crate::vmm::cpu::exceptions::{Exception, Stop, vector};

/// #UD.
pub(super) fn undefined() -> Stop {
    Stop::Inject(Exception::plain(vector::UD))
}

/// Whether CPUID does not name what has this instruction.
pub(super) fn is_absent(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        // SYSCALL, SEP.
        Syscall | Sysret | Sysretq | Sysenter | Sysexit | Sysexitq
        // Outside system-management mode; SMX.
        | Rsm | Getsec
        // MONITOR, MONITORX.
        | Monitor | Mwait | Monitorx | Mwaitx
        // INVPCID, XSAVES, SMAP; XSAVE, where this is asked.
        | Invpcid | Xsaves | Xsaves64 | Xrstors | Xrstors64 | Stac | Clac | Xsetbv
        // VMX, SVM, SGX.
        | Vmxon | Vmxoff | Vmlaunch | Vmresume | Vmread | Vmwrite | Vmptrld | Vmptrst | Vmclear
        | Invept | Invvpid | Vmrun | Vmload | Vmsave | Stgi | Clgi | Skinit | Invlpga | Invlpgb
        | Tlbsync | Encls | Enclv | Pconfig
        // WRMSRNS, LKGS, CET, history reset.
        | Wrmsrns | Rdmsrlist | Wrmsrlist | Lkgs | Setssbsy | Clrssbsy | Wrussd | Wrussq | Hreset
        // FRED, user-mode debugging.
        | Eretu | Erets | Rdudbg | Wrudbg
        // ENQCMD, PBNDKB, Key Locker, TDX, SEV-SNP.
        | Enqcmds | Pbndkb | Loadiwkey | Seamcall | Seamops | Seamret | Tdcall
        | Psmash | Pvalidate | Rmpadjust | Rmpupdate | Rmpquery
    )
}

/// Whether these bytes at `rip` are a move of a control, debug or test register that does not exist.
pub(super) fn is_move_of_no_register(bytes: &[u8], rip: u64) -> bool {
    let mut decoder = Decoder::with_ip(64, bytes, rip, DecoderOptions::NO_INVALID_CHECK);
    let instruction = decoder.decode();
    let is_special = |register: Register| register.is_cr() || register.is_dr() || register.is_tr();
    instruction.mnemonic() == Mnemonic::Mov
        && (is_special(instruction.op0_register()) || is_special(instruction.op1_register()))
}
