//! What a kind of machine brings: how guest code runs on one of its processors, and what maps the guest's
//! memory.
//!
//! Guarantee: whoever implements these two has a machine whose vCPUs start, pause, park, stop and end as
//! those of any other, without a line of that written again ([`Machine`](super::machine::Machine)). Nothing
//! here speaks of KVM.

use crate::export_rmap::ClientId;
use crate::vmm::error::VmError;

use super::outcome::Outcome;
use super::stats::{FaultLatency, PagingStats};

/// One processor of a machine: the state that its thread owns. The thread calls these one after the other.
pub trait Processor: Sized + Send + 'static {
    /// How a vCPU begins, or goes on from where another one was.
    type Start: Clone + Send + 'static;
    /// What maps the guest's memory, for all processors of a machine.
    type Space: Space;

    /// It is started, or started again after it halted. Outside the gate: no guest code runs.
    ///
    /// # Errors
    /// What the host refused; the machine is then over. So it is with all the others.
    fn begin(&mut self, start: Self::Start) -> Result<(), VmError>;

    /// It is inside the gate, whose epoch this is. What was kept from an earlier epoch is void. Anything but
    /// [`Next::Resume`] takes it out again before guest code has run.
    ///
    /// # Errors
    /// As for [`Self::begin`].
    fn enter(&mut self, epoch: u64) -> Result<Next, VmError>;

    /// Runs guest code up to the next exit, and handles that. A kick must get it out of the guest at once,
    /// and keep it out, until the gate has let it in anew: with [`Next::Reenter`].
    ///
    /// # Errors
    /// As for [`Self::begin`], and whatever the guest must not do.
    fn step(&mut self) -> Result<Next, VmError>;

    /// What it asked for by [`Next::Outside`]: it has left the gate, into which it was let at this epoch.
    ///
    /// # Errors
    /// As for [`Self::begin`].
    fn outside(&mut self, _epoch: u64) -> Result<(), VmError> {
        Ok(())
    }

    /// How to go on from here, in this machine or in a clone of it. It has been kicked.
    ///
    /// # Errors
    /// The outer one ends this machine; of the inner one it takes no harm.
    fn account(&mut self) -> Result<Result<Self::Start, VmError>, VmError> {
        Ok(Err(VmError::CloneOfWindow))
    }

    /// Its thread is about to be done.
    fn leave(self) {}
}

/// What follows a step.
#[derive(Debug)]
pub enum Next {
    /// Back into the guest.
    Resume,
    /// The same, by way of the gate.
    Reenter,
    /// The same, after [`Processor::outside`].
    Outside,
    /// The guest halted this vCPU, and nothing but another start wakes it.
    Park,
    /// The machine is over.
    End(Outcome),
}

/// What maps the guest's memory, as an export client: where mappings are installed and zapped.
pub trait Space: Send + Sync + 'static {
    /// The number of the client.
    fn client_id(&self) -> ClientId;

    /// Faults that were fixed without a vCPU having counted them itself.
    fn faults(&self) -> u64 {
        0
    }

    /// What has been done to map the memory.
    fn paging_stats(&self) -> PagingStats;

    /// How long faults took, where that is measured; complete once the machine is over.
    fn fault_latency(&self) -> FaultLatency {
        FaultLatency::default()
    }

    /// Compares what the reverse map has of this client with what is mapped, as far as that can be done
    /// while vCPUs run; one sentence for each difference.
    fn check_running(&self) -> Vec<String> {
        Vec::new()
    }

    /// The same, and all of it, once no vCPU runs any more.
    fn check_reverse_map(&self) -> Vec<String>;

    /// The machine has been over for a while, and a vCPU may wait for a page in the kernel, where not every
    /// kernel lets a signal interrupt it: it is let go without. It has been kicked, so it runs no guest code
    /// with what it finds then. Called more than once.
    fn let_go(&self) {}
}
