//! Export clients that take their time.

use std::sync::Arc;
use std::time::Duration;

use super::{HostFault, Injector, Lab};
use crate::addr::Pfn;
use crate::export_rmap::{
    ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, RevokeError,
};

/// A client that dawdles before it answers, with the page locks of the batch held as in any call.
struct SlowNotifier {
    inner: Arc<dyn ExportNotifier>,
    injector: Arc<Injector>,
}

impl SlowNotifier {
    fn dawdle(&self) {
        let time = self.injector.strike(slowness);
        if let Some(time) = time {
            std::thread::sleep(time);
        }
    }
}

fn slowness(fault: HostFault) -> Option<Duration> {
    if let HostFault::SlowNotifier(time) = fault { Some(time) } else { None }
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

impl Lab {
    /// The client with whatever slowness is to be injected.
    pub(in crate::host_mm) fn slowed(
        &self,
        client: Arc<dyn ExportNotifier>,
    ) -> Arc<dyn ExportNotifier> {
        match &self.injector {
            Some(injector) if injector.has(|fault| slowness(fault).is_some()) => {
                Arc::new(SlowNotifier { inner: client, injector: injector.clone() })
            }
            _ => client,
        }
    }
}
