//! A sorted map that is never changed: each change makes another one, which shares nearly all with the one before.
//!
//! ```text
//!   firsts   [   0x1000   |   0x9000   |   0x20000  ]      the first key of each chunk
//!   chunks   [     |      |     |      |     |      ]
//!                  v            v            v
//!              [ a b c ]    [ d e f ]    [ g h ]           at most 256 entries
//! ```
//! A change copies one chunk and the list of chunks. Of 65,000 entries that is 512 of them at most; a tree would copy
//! fewer, and a look-up in it would wait for memory at each level: here it does so twice.

use std::sync::Arc;

/// Entries of a chunk at most.
const MOST: usize = 256;

type Chunk<V> = Arc<[(u64, V)]>;

/// Values by key, in the keys' order.
#[derive(Clone, Debug)]
pub(crate) struct Sorted<V> {
    firsts: Arc<[u64]>,
    /// None of them is empty.
    chunks: Arc<[Chunk<V>]>,
    len: usize,
}

impl<V> Default for Sorted<V> {
    fn default() -> Self {
        Self {
            firsts: Arc::default(),
            chunks: Arc::default(),
            len: 0,
        }
    }
}

impl<V: Clone> Sorted<V> {
    /// Of entries whose keys are sorted and differ.
    pub(crate) fn new(entries: &[(u64, V)]) -> Self {
        debug_assert!(entries.is_sorted_by(|a, b| a.0 < b.0));
        // Half full, so that the first insertions split nothing.
        let chunks: Arc<[Chunk<V>]> = entries.chunks(MOST / 2).map(Arc::from).collect();
        Self::of(chunks, entries.len())
    }

    fn of(chunks: Arc<[Chunk<V>]>, len: usize) -> Self {
        Self {
            firsts: chunks.iter().map(|c| c[0].0).collect(),
            chunks,
            len,
        }
    }

    /// How many entries there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// All entries, in the keys' order.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (u64, &V)> {
        let all = self.chunks.iter().flat_map(|c| c.iter());
        all.map(|(key, value)| (*key, value))
    }

    /// The entry with the highest key that is at most `key`.
    pub(crate) fn at_most(&self, key: u64) -> Option<(u64, &V)> {
        let chunk = &self.chunks[self.firsts.partition_point(|f| *f <= key).checked_sub(1)?];
        // Its first key is at most `key`.
        let (found, value) = &chunk[chunk.partition_point(|e| e.0 <= key) - 1];
        Some((*found, value))
    }

    /// The entries from the lowest key that is at least `key`, in the keys' order.
    pub(crate) fn from(&self, key: u64) -> impl Iterator<Item = (u64, &V)> {
        let first = self.firsts.partition_point(|f| *f <= key).saturating_sub(1);
        let skip = self
            .chunks
            .get(first)
            .map_or(0, |c| c.partition_point(|e| e.0 < key));
        let rest = self.chunks[first.min(self.chunks.len())..].iter();
        rest.flat_map(|c| c.iter())
            .skip(skip)
            .map(|(key, value)| (*key, value))
    }

    /// With another entry, or another value of an entry that there is.
    pub(crate) fn with(&self, key: u64, value: V) -> Self {
        let Some(last) = self.chunks.len().checked_sub(1) else {
            return Self::new(&[(key, value)]);
        };
        // The chunk that the key belongs to; what is lower than all goes to the first.
        let i = self
            .firsts
            .partition_point(|f| *f <= key)
            .saturating_sub(1)
            .min(last);
        let old = &self.chunks[i];
        let at = old.partition_point(|e| e.0 < key);
        let there = old.get(at).is_some_and(|e| e.0 == key);
        let new: Vec<_> = old[..at]
            .iter()
            .cloned()
            .chain([(key, value)])
            .chain(old[at + usize::from(there)..].iter().cloned())
            .collect();
        let parts = match new.len() {
            ..=MOST => vec![Arc::from(new)],
            len => new.chunks(len.div_ceil(2)).map(Arc::from).collect(),
        };
        self.replaced(i, 1, parts, self.len + usize::from(!there))
    }

    /// Without the entry that has this key, where there is one.
    pub(crate) fn without(&self, key: u64) -> Self {
        let Some(i) = self.firsts.partition_point(|f| *f <= key).checked_sub(1) else {
            return self.clone();
        };
        let old = &self.chunks[i];
        let Ok(at) = old.binary_search_by_key(&key, |e| e.0) else {
            return self.clone();
        };
        let mut new: Vec<_> = [&old[..at], &old[at + 1..]].concat();
        let next = self.chunks.get(i + 1);
        let mut taken = 1;
        // Else many removals would leave as many chunks of one entry.
        if let Some(next) = next.filter(|next| new.len() + next.len() <= MOST / 2) {
            new.extend_from_slice(next);
            taken = 2;
        }
        let parts = match new.is_empty() {
            true => Vec::new(),
            false => vec![Arc::from(new)],
        };
        self.replaced(i, taken, parts, self.len - 1)
    }

    /// With `parts` in the place of `taken` chunks from `i` on.
    fn replaced(&self, i: usize, taken: usize, parts: Vec<Chunk<V>>, len: usize) -> Self {
        let before = self.chunks[..i].iter().cloned();
        let after = self.chunks[i + taken..].iter().cloned();
        Self::of(before.chain(parts).chain(after).collect(), len)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bluff_testing::{Chance, times};

    use super::*;

    fn agree(sorted: &Sorted<u64>, model: &BTreeMap<u64, u64>) {
        assert_eq!(sorted.len(), model.len());
        assert!(
            sorted
                .iter()
                .map(|(k, v)| (k, *v))
                .eq(model.iter().map(|(k, v)| (*k, *v)))
        );
        let most = sorted.chunks.iter().map(|c| c.len()).max().unwrap_or(0);
        assert!(most <= MOST, "{most} in a chunk");
        // Not ever more chunks than a fraction of the entries needs, and a constant.
        let needed = sorted.len().div_ceil(MOST / 4) + 1;
        assert!(
            sorted.chunks.len() <= 2 * needed,
            "{} chunks of {}",
            sorted.chunks.len(),
            sorted.len()
        );
    }

    fn look(sorted: &Sorted<u64>, model: &BTreeMap<u64, u64>, key: u64) {
        let at_most = model.range(..=key).next_back();
        assert_eq!(
            sorted.at_most(key).map(|(k, v)| (k, *v)),
            at_most.map(|(k, v)| (*k, *v))
        );
        let from: Vec<_> = sorted.from(key).take(3).map(|(k, v)| (k, *v)).collect();
        let want: Vec<_> = model.range(key..).take(3).map(|(k, v)| (*k, *v)).collect();
        assert_eq!(from, want);
    }

    #[test]
    fn it_agrees_with_a_tree() {
        let mut chance = Chance::new(1);
        let keys = 3000;
        let (mut sorted, mut model) = (Sorted::default(), BTreeMap::new());
        for round in 0..times(20_000, 200_000) {
            // It grows, shrinks, and grows again.
            let grows = if round / 5000 % 2 == 0 { 70 } else { 30 };
            let key = chance.below(keys) * 7;
            let before = sorted.clone();
            let (len, there) = (before.len(), model.contains_key(&key));
            if chance.percent(grows) {
                sorted = sorted.with(key, round as u64);
                model.insert(key, round as u64);
                assert_eq!(sorted.len(), len + usize::from(!there));
            } else {
                sorted = sorted.without(key);
                model.remove(&key);
                assert_eq!(sorted.len(), len - usize::from(there));
            }
            assert_eq!(before.len(), len, "what was before stays as it was");
            look(&sorted, &model, chance.below(7 * keys + 10));
            if round % 500 == 0 {
                agree(&sorted, &model);
            }
        }
        for key in 0..keys {
            sorted = sorted.without(key * 7);
            model.remove(&(key * 7));
        }
        agree(&sorted, &model);
        assert_eq!(sorted.len(), 0);
        look(&sorted, &model, 5);
    }

    #[test]
    fn a_change_shares_all_chunks_but_one() {
        let entries: Vec<_> = (0..65_000u64).map(|i| (i * 4096, i)).collect();
        let sorted = Sorted::new(&entries);
        let changed = sorted.with(4096 * 30_000 + 1, 7);
        let same = sorted
            .chunks
            .iter()
            .filter(|c| changed.chunks.iter().any(|d| Arc::ptr_eq(c, d)));
        assert_eq!(same.count(), sorted.chunks.len() - 1);
    }

    #[test]
    fn the_ends_of_the_keys() {
        let sorted = Sorted::new(&[(0, 'a'), (u64::MAX, 'z')]);
        assert_eq!(sorted.at_most(0), Some((0, &'a')));
        assert_eq!(sorted.at_most(u64::MAX - 1), Some((0, &'a')));
        assert_eq!(sorted.at_most(u64::MAX), Some((u64::MAX, &'z')));
        assert_eq!(sorted.from(1).next(), Some((u64::MAX, &'z')));
        assert_eq!(sorted.without(u64::MAX).from(1).next(), None);
        let sorted = Sorted::new(&[(5, 'b')]).with(2, 'a');
        assert_eq!(sorted.at_most(4), Some((2, &'a')));
        assert_eq!(sorted.at_most(1), None);
    }
}
