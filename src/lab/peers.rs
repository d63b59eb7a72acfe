//! The peers of a stress run: other processes that hold copies of the guest's pages.

use std::sync::Arc;

use hdrhistogram::Histogram;

use super::plan::PeersPlan;
use super::setup::Setup;
use super::violations::{Check, EndCheck, Violations};
use crate::host_mm::MmStats;
use crate::peer::client::watched;
use crate::peer::{PeerServer, PeerStats, ServeError, ServerConfig};
use crate::vmm::Contract;

/// The first guest's memory object among those that peers can have pages of.
const GUEST: u32 = 0;

/// Serves peers during a run.
pub struct Peers(Arc<PeerServer>);

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct PeersCount {
    /// What they did.
    pub stats: PeerStats,
    /// Pages whose copies were recalled because somebody wrote.
    pub recalls: u64,
    /// From an invalidation to the end of its copies, in nanoseconds; `None` without any.
    pub latency: Option<Histogram<u64>>,
    /// What is left of peers that are gone.
    pub found: Violations,
}

impl Peers {
    /// Makes the socket and serves peers, with a sentence for each that is cut off; `None` if no VM is there.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn start(
        plan: &PeersPlan,
        setup: &Setup<impl Contract>,
        on_cut_off: impl Fn(&str) + Send + Sync + 'static,
    ) -> Result<Option<Self>, ServeError> {
        let Some(first) = setup.fleet.members.first() else {
            return Ok(None);
        };
        let config = ServerConfig { limit: plan.limit, ..ServerConfig::default() };
        let objects = vec![first.vm.object().clone()];
        let on_cut_off = Box::new(on_cut_off);
        let server = PeerServer::start(&plan.socket, &setup.mm, objects, config, on_cut_off)?;
        let server = Arc::new(server);
        // Weak: the server keeps the guest's pages, which must not outlive the run for this.
        let told = Arc::downgrade(&server);
        setup.on_watched(move |first, count| {
            if let Some(told) = told.upgrade() {
                told.note(GUEST, watched(first, count));
            }
        });
        Ok(Some(Self(server)))
    }

    /// Ends them: everything is taken back.
    #[must_use]
    pub fn conclude(self, host: &MmStats) -> PeersCount {
        self.0.stop();
        let mut found = Violations::default();
        found.look(EndCheck::Peers, Check::Peer, || self.0.leftovers());
        PeersCount {
            stats: self.0.stats(),
            recalls: host.recalls,
            latency: self.0.latency(),
            found,
        }
    }
}
