//! What can go wrong and where threads can pause, of all layers.
//!
//! Guarantee: the same seed has the same calls struck, and the same passings of points be pauses: a point's
//! place in the list is a part of what the seed decides, so the list keeps its order, and grows at its end.

use crate::export_rmap::client::{FAULT_CHECKED, FAULT_NOTED, FLUSHING, TOLD};
use crate::export_rmap::lab::Point;
use crate::host_mm::hooks::{
    COMPARED, COPIED, COUNTED, DETACHED, EXCHANGING, FILLING, FLUSHED, FREEING, HARVESTED, LENDING,
    MOVED, RECALLED, SAVED, SHARING, SLOT_FREED, SLOT_TAKEN,
};
use crate::host_mm::{Injection, InjectionPlan};
use crate::iotlb::hooks::{DEVICE_ACCESS, DEVICE_NOTED};
use crate::peer::hooks::{PEER_HANG, PEER_KILL};
use crate::shadow_mmu::hooks::{AROUND_NOTED, UPGRADE_CHECKED, ZAP_FLUSHED, ZAPPED};

/// Every point of the protocol.
const POINTS: &[Point] = &[
    FAULT_NOTED,
    AROUND_NOTED,
    FAULT_CHECKED,
    UPGRADE_CHECKED,
    DEVICE_NOTED,
    DEVICE_ACCESS,
    COUNTED,
    TOLD,
    DETACHED,
    FLUSHING,
    FLUSHED,
    SAVED,
    FILLING,
    ZAPPED,
    ZAP_FLUSHED,
    SHARING,
    COPIED,
    LENDING,
    RECALLED,
    COMPARED,
    MOVED,
    EXCHANGING,
    FREEING,
    HARVESTED,
    SLOT_TAKEN,
    SLOT_FREED,
];

/// What these items are to do, with pauses at any point.
#[must_use]
pub fn plan(items: Vec<Injection>, seed: u64) -> InjectionPlan {
    InjectionPlan { items, seed, points: POINTS }
}

/// Whether only a run that serves peers can meet this.
#[must_use]
pub fn concerns_peers(item: &Injection) -> bool {
    [PEER_HANG, PEER_KILL].contains(&item.fault.kind)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    /// What the sources write between `start` and the next quotation mark; not those of the laboratory
    /// itself, whose tests make names up.
    fn written(folder: &Path, start: &str, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("lab/on") {
                written(&path, start, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let names = text.split(start).skip(1).filter_map(|rest| rest.split('"').next());
                found.extend(names.map(str::to_owned));
            }
        }
    }

    #[test]
    fn every_point_that_a_layer_has_is_in_the_list_once() {
        let mut known = BTreeSet::new();
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        written(&src, "Point::new(\"", &mut known);
        let listed: Vec<&str> = POINTS.iter().map(|point| point.name()).collect();
        assert_eq!(listed.iter().map(|&name| name.to_owned()).collect::<BTreeSet<_>>(), known);
        assert_eq!(listed.len(), known.len(), "each has one place");
    }

    /// Another order would have other passings be pauses with the seeds of yesterday.
    #[test]
    fn the_points_keep_their_places() {
        let first = ["fault-noted", "around-noted", "fault-checked", "upgrade-checked"];
        let devices_and_clients = ["device-noted", "device-access", "counted", "told", "detached"];
        let flushes = ["flushing", "flushed", "saved", "filling", "zapped", "zap-flushed"];
        let sharing = ["sharing", "copied", "lending", "recalled", "compared", "moved"];
        let last = ["exchanging", "freeing", "harvested", "slot-taken", "slot-freed"];
        let order = [&first[..], &devices_and_clients, &flushes, &sharing, &last].concat();
        assert_eq!(POINTS.iter().map(|point| point.name()).collect::<Vec<_>>(), order);
    }
}
