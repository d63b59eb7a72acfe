//! Export clients that take their time.

use std::sync::Arc;

use super::SLOW_NOTIFIER;
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::lab::Lab;
use gnomon_export_rmap::{
    ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, RevokeError,
};

/// A client that dawdles before it answers, with the page locks of the batch held as in any call.
struct SlowNotifier {
    inner: Arc<dyn ExportNotifier>,
    lab: Lab,
}

impl SlowNotifier {
    fn dawdle(&self) {
        if let Some(time) = self.lab.slowness(SLOW_NOTIFIER) {
            std::thread::sleep(time);
        }
    }
}

impl ExportNotifier for SlowNotifier {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        self.dawdle();
        self.inner.invalidate_page(page, kind)
    }

    fn age_page(&self, page: &LockedPage<'_>) -> bool {
        self.dawdle();
        self.inner.age_page(page)
    }

    fn still_allows(&self, page: &LockedPage<'_>, kind: Invalidation) -> bool {
        self.inner.still_allows(page, kind)
    }

    fn flush(&self, frames: &[Pfn], reason: FlushReason) -> Result<(), RevokeError> {
        self.dawdle();
        self.inner.flush(frames, reason)
    }
}

/// The client with whatever slowness is to be injected.
pub(crate) fn slowed(lab: &Lab, client: Arc<dyn ExportNotifier>) -> Arc<dyn ExportNotifier> {
    if lab.has(&[SLOW_NOTIFIER]) {
        Arc::new(SlowNotifier { inner: client, lab: lab.clone() })
    } else {
        client
    }
}
