//! Which slots are in use: finds the lowest free one in a few steps, however full swap is.
//!
//! A bitmap with summaries. Level 0 has a bit for each slot, set if it is in use; each level above
//! has a bit for each word of the level below, set if all of that word's bits are; the top level is
//! one word. 2^31 slots make six levels.

/// Bits in a word, and words that one word of the level above summarises.
const WORD_BITS: usize = 64;

/// Slot numbers in use and free.
#[derive(Debug)]
pub(super) struct SlotMap {
    /// From level 0 up. Made of zeros, which the allocator maps lazily: only words that were ever
    /// changed take memory.
    levels: Vec<Vec<u64>>,
    slots: u32,
    used: u32,
}

impl SlotMap {
    /// All of `slots` free.
    pub(super) fn new(slots: u32) -> Self {
        let mut levels = Vec::new();
        let mut bits = slots as usize;
        loop {
            let words = bits.div_ceil(WORD_BITS).max(1);
            let mut level = vec![0u64; words];
            // Bits beyond the last slot (or the last word below) are never free.
            let beyond = words * WORD_BITS - bits;
            if beyond > 0 {
                level[words - 1] =
                    if beyond == WORD_BITS { u64::MAX } else { u64::MAX << (WORD_BITS - beyond) };
            }
            levels.push(level);
            if words == 1 {
                break;
            }
            bits = words;
        }
        Self { levels, slots, used: 0 }
    }

    /// The lowest free slot.
    pub(super) fn lowest_free(&self) -> Option<u32> {
        let mut index = 0;
        for level in self.levels.iter().rev() {
            let bit = level[index].trailing_ones() as usize;
            if bit == WORD_BITS {
                // Only at the top: below, the summary says that the word has a free bit.
                return None;
            }
            index = index * WORD_BITS + bit;
        }
        u32::try_from(index).ok()
    }

    /// Whether the slot exists and is in use.
    pub(super) fn is_used(&self, slot: u32) -> bool {
        slot < self.slots && self.bit(slot)
    }

    /// Whether the slot exists and is free.
    pub(super) fn is_free(&self, slot: u32) -> bool {
        slot < self.slots && !self.bit(slot)
    }

    fn bit(&self, slot: u32) -> bool {
        let index = slot as usize;
        self.levels[0][index / WORD_BITS] >> (index % WORD_BITS) & 1 != 0
    }

    /// Marks a free slot as in use; others are left alone.
    pub(super) fn take(&mut self, slot: u32) {
        if !self.is_free(slot) {
            debug_assert!(false, "slot {slot} is not free");
            return;
        }
        self.used += 1;
        let mut index = slot as usize;
        for level in &mut self.levels {
            let word = &mut level[index / WORD_BITS];
            *word |= 1 << (index % WORD_BITS);
            if *word != u64::MAX {
                break;
            }
            index /= WORD_BITS;
        }
    }

    /// Marks a slot in use as free; others are left alone.
    pub(super) fn release(&mut self, slot: u32) {
        if !self.is_used(slot) {
            debug_assert!(false, "slot {slot} is not in use");
            return;
        }
        self.used -= 1;
        let mut index = slot as usize;
        for level in &mut self.levels {
            let word = &mut level[index / WORD_BITS];
            let was_full = *word == u64::MAX;
            *word &= !(1 << (index % WORD_BITS));
            if !was_full {
                break;
            }
            index /= WORD_BITS;
        }
    }

    pub(super) const fn used(&self) -> u32 {
        self.used
    }

    pub(super) const fn slots(&self) -> u32 {
        self.slots
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn no_slots_at_all() {
        let map = SlotMap::new(0);
        assert_eq!(map.lowest_free(), None);
        assert!(!map.is_used(0) && !map.is_free(0));
    }

    /// Sizes around the words' and levels' ends: exactly so many slots, each once, then none.
    #[test]
    fn every_slot_is_handed_out_once() {
        for slots in [1, 63, 64, 65, 4095, 4096, 4097, 262_145] {
            let mut map = SlotMap::new(slots);
            for expected in 0..slots {
                assert_eq!(map.lowest_free(), Some(expected), "of {slots}");
                map.take(expected);
            }
            assert_eq!((map.lowest_free(), map.used()), (None, slots));
            map.release(slots / 2);
            assert_eq!(map.lowest_free(), Some(slots / 2));
        }
    }

    #[test]
    fn the_largest_map_ends_where_it_should() {
        let slots = super::super::Slot::MAX_SLOTS;
        let map = SlotMap::new(slots);
        assert_eq!(map.levels.len(), 6);
        assert!(map.is_free(slots - 1) && !map.is_free(slots) && !map.is_used(slots));
        assert_eq!(map.lowest_free(), Some(0));
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        TakeLowest,
        TakeAt(u32),
        Release(u32),
    }

    fn steps(slots: u32) -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => Just(Step::TakeLowest),
            1 => (0..slots).prop_map(Step::TakeAt),
            3 => (0..slots).prop_map(Step::Release),
        ];
        prop::collection::vec(step, 0..2000)
    }

    proptest! {
        /// Against a set of the free slots; dense (fills up) and sparse.
        #[test]
        fn agrees_with_a_set(
            (slots, steps) in prop_oneof![1u32..200, Just(4096u32), Just(5000u32)]
                .prop_flat_map(|slots| (Just(slots), steps(slots)))
        ) {
            let mut map = SlotMap::new(slots);
            let mut free: BTreeSet<u32> = (0..slots).collect();
            for step in steps {
                match step {
                    Step::TakeLowest => {
                        let lowest = map.lowest_free();
                        prop_assert_eq!(lowest, free.first().copied());
                        if let Some(slot) = lowest {
                            map.take(slot);
                            free.remove(&slot);
                        }
                    }
                    Step::TakeAt(slot) => {
                        prop_assert_eq!(map.is_free(slot), free.contains(&slot));
                        if free.remove(&slot) {
                            map.take(slot);
                        }
                    }
                    Step::Release(slot) => {
                        prop_assert_eq!(map.is_used(slot), !free.contains(&slot));
                        if free.insert(slot) {
                            map.release(slot);
                        }
                    }
                }
                prop_assert_eq!(map.used() as usize, slots as usize - free.len());
            }
        }
    }
}
