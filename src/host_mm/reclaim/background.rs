//! The reclaim thread: from below the low watermark of free frames up to the high one.

use std::io;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use crate::host_mm::HostMm;
use crate::host_mm::frames::alarm::Alarm;

pub(super) fn spawn(mm: &Arc<HostMm>, alarm: &Arc<Alarm>) -> io::Result<JoinHandle<()>> {
    // Weak: the thread must not keep alive what it works for.
    let (mm, alarm) = (Arc::downgrade(mm), alarm.clone());
    std::thread::Builder::new().name("gnomon-reclaim".to_owned()).spawn(move || {
        while alarm.wait() {
            let Some(mm) = Weak::upgrade(&mm) else { return };
            refill(&mm, &alarm);
        }
    })
}

/// Reclaims until the high watermark is reached, or a round gets nothing: then it is for the fault
/// that needs a frame to find out why.
fn refill(mm: &HostMm, alarm: &Alarm) {
    while !alarm.is_stopped() {
        let missing = mm.free.missing() as usize;
        if missing == 0 {
            return;
        }
        mm.counters.background_reclaims.add(1);
        if mm.reclaim(missing).frames == 0 {
            return;
        }
    }
}
