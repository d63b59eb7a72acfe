//! The part of a report that is about several VMs.

use std::time::Duration;

use serde::Serialize;

use super::GuestReport;
use crate::lab::{Fate, PopulationCount, Record};

/// All VMs of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct VmsReport {
    /// How the number of VMs was kept up.
    #[serde(flatten)]
    pub(crate) population: PopulationCount,
    /// What the clones took; `None` without any.
    pub(crate) clones: Option<ClonesReport>,
    /// Pages of one VM that were merged with those of another.
    pub(crate) pages_merged_across: u64,
    /// Each of them, in the order in which they were made.
    pub(crate) each: Vec<VmReport>,
}

/// One VM.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct VmReport {
    pub(crate) number: u32,
    /// The number of the VM that it was cloned from.
    pub(crate) parent: Option<u32>,
    /// What was done to end it: `asked`, `killed`; `works` if the run ended otherwise.
    pub(crate) fate: &'static str,
    pub(crate) guest: GuestReport,
    pub(crate) violations: u64,
    pub(crate) faults: u64,
    /// How long its source was paused for it.
    pub(crate) paused_ms: Option<f64>,
    /// From the pause of its source to its first entry into the guest.
    pub(crate) clone_ms: Option<f64>,
    pub(crate) shared_pages: Option<u64>,
}

/// Figures of all clones.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct ClonesReport {
    /// How long the source was paused, in milliseconds.
    pub(crate) paused_ms: Spread,
    /// From the pause of the source to the clone's first entry into its guest, in milliseconds.
    pub(crate) clone_ms: Spread,
    /// Pages shared at once.
    pub(crate) shared_pages: Spread,
}

/// The middle and the end of a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// `None` of nothing.
    fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        Some(Self { median: *values.get(values.len() / 2)?, max })
    }
}

impl VmsReport {
    /// The report of these VMs.
    pub(crate) fn new(records: &[Record], population: PopulationCount, merged: u64) -> Self {
        let each: Vec<VmReport> = records.iter().map(VmReport::from).collect();
        let spread = |of: fn(&VmReport) -> Option<f64>| Spread::of(each.iter().filter_map(of));
        let clones = match (
            spread(|vm| vm.paused_ms),
            spread(|vm| vm.clone_ms),
            spread(|vm| vm.shared_pages.map(|pages| pages as f64)),
        ) {
            (Some(paused_ms), Some(clone_ms), Some(shared_pages)) => {
                Some(ClonesReport { paused_ms, clone_ms, shared_pages })
            }
            _ => None,
        };
        Self { population, clones, pages_merged_across: merged, each }
    }
}

impl From<&Record> for VmReport {
    fn from(record: &Record) -> Self {
        let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
        let clone = record.clone;
        Self {
            number: record.number,
            parent: record.parent,
            fate: match record.fate {
                Fate::Works => "works",
                Fate::Asked => "asked",
                Fate::Killed => "killed",
            },
            guest: GuestReport::from(record.guest),
            violations: record.guest.violations,
            faults: record.faults,
            paused_ms: clone.map(|clone| millis(clone.paused)),
            clone_ms: clone.and_then(|clone| clone.to_first_entry).map(millis),
            shared_pages: clone.map(|clone| clone.shared_pages),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::{CloneFigures, GuestCounters};

    fn record(number: u32, clone_ms: Option<u64>) -> Record {
        let clone = clone_ms.map(|ms| CloneFigures {
            paused: Duration::from_millis(ms / 2),
            to_first_entry: Some(Duration::from_millis(ms)),
            shared_pages: ms * 10,
        });
        let parent = clone.map(|_| 1);
        let guest = GuestCounters { verified: 5, violations: 1, ..GuestCounters::default() };
        Record { number, parent, fate: Fate::Killed, guest, faults: 2, clone }
    }

    #[test]
    fn clones_are_summed_up_by_median_and_maximum() {
        let records =
            [record(1, None), record(2, Some(4)), record(3, Some(100)), record(4, Some(6))];
        let report = VmsReport::new(&records, PopulationCount::default(), 7);
        let clones = report.clones.unwrap();
        assert_eq!(clones.clone_ms, Spread { median: 6.0, max: 100.0 });
        assert_eq!(clones.paused_ms, Spread { median: 3.0, max: 50.0 });
        assert_eq!(clones.shared_pages.max, 1000.0);
        let value = serde_json::to_value(&report).unwrap();
        assert_eq!(value["each"][1]["parent"], 1);
        assert_eq!(value["each"][0]["clone_ms"], serde_json::Value::Null);
        assert_eq!(value["each"][0]["guest"]["verified"], 5);
        assert_eq!((&value["cloned"], &value["pages_merged_across"]), (&0.into(), &7.into()));
        assert!(VmsReport::new(&records[..1], PopulationCount::default(), 0).clones.is_none());
    }
}
