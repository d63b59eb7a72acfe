//! A client for tests that stops the host in the middle of an invalidation.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use crate::addr::Pfn;
use crate::sync::{Mutex, lock};

use super::{ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, RevokeError};

/// More than a machine with much else to do takes.
const GIVE_UP: Duration = Duration::from_secs(60);

/// Sleeps in `invalidate_page`, with the page lock held, until it is let go.
pub struct PausingClient {
    reached: mpsc::SyncSender<()>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

/// The other end of a [`PausingClient`].
pub struct Pause {
    is_reached: mpsc::Receiver<()>,
    go: mpsc::Sender<()>,
}

impl PausingClient {
    pub fn new() -> (Arc<Self>, Pause) {
        let (reached, is_reached) = mpsc::sync_channel(1);
        let (go, go_on) = mpsc::channel();
        (Arc::new(Self { reached, go_on: Mutex::new(go_on) }), Pause { is_reached, go })
    }
}

impl Pause {
    /// Waits until the client was called.
    pub fn wait(&self) {
        self.is_reached.recv_timeout(GIVE_UP).expect("nobody called the client");
    }

    /// Lets the client return from one call.
    pub fn end(&self) {
        self.go.send(()).expect("there is no client any more");
    }
}

impl ExportNotifier for PausingClient {
    fn invalidate_page(&self, _page: &LockedPage<'_>, _kind: Invalidation) -> Harvest {
        self.reached.send(()).expect("nobody waits for the call");
        lock(&self.go_on).recv_timeout(GIVE_UP).expect("nobody lets the client go on");
        Harvest::default()
    }

    fn age_page(&self, _page: &LockedPage<'_>) -> bool {
        false
    }

    fn flush(&self, _frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        Ok(())
    }
}
