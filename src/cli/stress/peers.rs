//! The peers of a stress run: other processes that hold copies of the guest's pages.

use std::sync::Arc;

use serde::Serialize;

use crate::cli::config::{PeersConfig, UsageError};
use crate::cli::machine::Machine;
use crate::cli::output;
use crate::cli::report::LatencyReport;
use crate::cli::violations::{Check, EndCheck, Violations};
use crate::host_mm::MmStats;
use crate::peer::client::watched;
use crate::peer::{PeerServer, PeerStats, ServeError, ServerConfig};
use crate::vmm::Contract;

/// The first guest's memory object among those that peers can have pages of.
const GUEST: u32 = 0;

/// Serves peers during a run.
pub(super) struct Peers(Arc<PeerServer>);

/// The part of a report that is about peers.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct PeersReport {
    #[serde(flatten)]
    pub(crate) stats: PeerStats,
    /// Pages whose copies were recalled because somebody wrote.
    pub(crate) recalls: u64,
    /// From an invalidation to the end of its copies.
    pub(crate) latency: Option<LatencyReport>,
    /// What is left of peers that are gone.
    #[serde(skip)]
    pub(crate) found: Violations,
}

impl Peers {
    /// Makes the socket and serves peers, if there are to be any.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub(super) fn start(
        config: Option<&PeersConfig>,
        machine: &Machine<impl Contract>,
    ) -> anyhow::Result<Option<Self>> {
        let Some(PeersConfig { socket, limit }) = config else {
            return Ok(None);
        };
        let Some(first) = machine.fleet.members.first() else {
            return Ok(None);
        };
        let server_config = ServerConfig { limit: *limit, ..ServerConfig::default() };
        let objects = vec![first.vm.object().clone()];
        let on_cut_off = Box::new(|sentence: &str| output::note(sentence));
        let server = PeerServer::start(socket, &machine.mm, objects, server_config, on_cut_off);
        let server = Arc::new(server.map_err(|error| match error {
            ServeError::Host(_) => anyhow::Error::from(error),
            _ => UsageError(format!("--export-socket {error}")).into(),
        })?);
        // Weak: the server keeps the guest's pages, which must not outlive the run for this.
        let told = Arc::downgrade(&server);
        machine.on_watched(move |first, count| {
            if let Some(told) = told.upgrade() {
                told.note(GUEST, watched(first, count));
            }
        });
        output::note(format_args!("peers are served at {}", socket.display()));
        Ok(Some(Self(server)))
    }

    /// Ends them: everything is taken back.
    pub(super) fn conclude(self, host: &MmStats) -> PeersReport {
        self.0.stop();
        let mut found = Violations::default();
        found.look(EndCheck::Peers, Check::Peer, || self.0.leftovers());
        PeersReport {
            stats: self.0.stats(),
            recalls: host.recalls,
            latency: self.0.latency().as_ref().map(LatencyReport::new),
            found,
        }
    }
}
