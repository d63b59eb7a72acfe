//! Invariant I3: the reverse map lists exactly the mappings that a client has.

use std::collections::HashMap;

use crate::addr::Pfn;
use crate::export_rmap::frame_table::{Frame, FrameTable};
use crate::export_rmap::rmap::ClientId;

/// Most differences that are described.
const MOST: usize = 16;

impl FrameTable {
    /// Compares the map of every frame with what `client` says that it maps, as (location, frame):
    /// a sentence for each frame that differs, up to a bound. Nothing may change meanwhile; `what`
    /// is what the client calls its mappings.
    #[must_use]
    pub fn client_differences(
        &self,
        client: ClientId,
        what: &str,
        mappings: impl IntoIterator<Item = (u64, Pfn)>,
    ) -> Vec<String> {
        let mut mapped_of: HashMap<Pfn, Vec<u64>> = HashMap::new();
        for (location, pfn) in mappings {
            mapped_of.entry(pfn).or_default().push(location);
        }
        let compare = |pfn| {
            let mapped = mapped_of.remove(&pfn);
            if mapped.is_none() && self.is_rmap_empty(pfn) {
                return None;
            }
            let entries = self.rmap_entries(pfn);
            let own = entries.iter().filter(|entry| entry.client() == client);
            let mut listed: Vec<u64> = own.map(|entry| entry.location()).collect();
            let mut mapped = mapped.unwrap_or_default();
            listed.sort_unstable();
            mapped.sort_unstable();
            (listed != mapped).then(|| {
                format!(
                    "I3: frame {pfn} has {what} {mapped:x?}, but its reverse map lists {listed:x?}"
                )
            })
        };
        (0..self.len()).map(Pfn::new).filter_map(compare).take(MOST).collect()
    }

    /// Those of a client's writable mappings, as (location, frame), whose frames nobody may write: a
    /// sentence for each, up to a bound. The client holds its MMU lock, without which no page becomes
    /// shared or lent that it maps.
    #[must_use]
    pub fn forbidden_writers(
        &self,
        what: &str,
        writable: impl IntoIterator<Item = (u64, Pfn)>,
    ) -> Vec<String> {
        let is_forbidden = |&(_, pfn): &(u64, Pfn)| self.get(pfn).is_some_and(Frame::is_read_only);
        let found = writable.into_iter().filter(is_forbidden).take(MOST);
        let tell = |(location, pfn)| {
            format!("I3: frame {pfn} is shared or lent, but {what} {location:x} may write it")
        };
        found.map(tell).collect()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::export_rmap::RmapEntry;

    #[test]
    fn an_entry_too_many_and_one_too_few_are_told() {
        let table = FrameTable::new(2);
        let [mine, other] = [1, 2].map(|raw| ClientId::new(raw).unwrap());
        table.rmap_add(Pfn::new(0), RmapEntry::new(mine, 5));
        table.rmap_add(Pfn::new(1), RmapEntry::new(other, 6));
        let differences = |mappings: &[(u64, Pfn)]| {
            table.client_differences(mine, "mappings", mappings.iter().copied())
        };
        assert!(differences(&[(5, Pfn::new(0))]).is_empty());
        assert_eq!(differences(&[]).len(), 1);
        let found = differences(&[(5, Pfn::new(0)), (6, Pfn::new(1))]);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("frame 0x1 has mappings [6]"), "{}", found[0]);
    }
}
