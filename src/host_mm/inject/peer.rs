//! Peers that hang or go away, as the server of another process's mappings sees it.

use super::{HostFault, Lab};

/// What is to go wrong with a peer at an invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerFault {
    /// It does not answer any more.
    Hang,
    /// Its connection is gone.
    Kill,
}

fn peer_fault(fault: HostFault) -> Option<PeerFault> {
    match fault {
        HostFault::PeerHang => Some(PeerFault::Hang),
        HostFault::PeerKill => Some(PeerFault::Kill),
        _ => None,
    }
}

impl Lab {
    /// Counts an invalidation that is about to be sent to a peer; what is to happen to that peer.
    #[must_use]
    pub(in crate::host_mm) fn peer_fault(&self) -> Option<PeerFault> {
        self.injector.as_ref()?.strike(peer_fault)
    }
}

impl HostFault {
    /// Whether only a run that serves peers can meet it.
    #[must_use]
    pub fn concerns_peers(self) -> bool {
        peer_fault(self).is_some()
    }
}
