//! A hash table that takes little more room than its items.
//!
//! ```text
//!   home = tag scaled to the places --> tag? --> tag? --> empty: not here         items    | item | item |      | item |
//!                                  fifteen bits of the hash                       tags     |  tag |  tag |   0  |   1  |
//! ```
//!
//! Open addressing with linear probing over one tag a place. It grows by a seventh to a fourth, in the sizes that the
//! allocator gives without waste. A table that doubles is half empty afterwards, and most of a shard's tables hold some
//! dozens of records: with hashbrown's, a million keys took 205 resident bytes each, with these 197. Growing more often
//! moves an item more often; but the tag alone says where to, so that nothing of the item is looked at.
//!
//! An item's place is its caller's to keep things beside it, such as how often it was used.

/// A place that never held an item since the table was built.
const EMPTY: u16 = 0;
/// A place whose item was removed while the one behind it was taken: a search must go on.
const GRAVE: u16 = 1;
/// Tags of items have this bit, and fifteen bits of the hash.
const TAKEN: u16 = 0x8000;

/// Items by their hash, which the table does not keep. `T`'s default stands in places without an item, and should cost
/// nothing.
#[derive(Debug, Default)]
pub(crate) struct Packed<T> {
    tags: Box<[u16]>,
    items: Box<[T]>,
    len: usize,
    graves: usize,
}

/// How many places may be taken or graves: seven of eight, so that searches end.
fn most(places: usize) -> usize {
    places * 7 / 8
}

/// The least number of places that holds so many items: four sizes a power of two.
fn places_for(items: usize) -> usize {
    let least = (items * 8).div_ceil(7).max(4);
    let step = (least.next_power_of_two() / 8).max(2);
    let places = least.next_multiple_of(step);
    debug_assert!(most(places) >= items);
    places
}

impl<T: Default> Packed<T> {
    /// With room for `items`.
    pub(crate) fn with_capacity(items: usize) -> Self {
        if items == 0 {
            return Packed::default();
        }
        let places = places_for(items);
        Packed {
            tags: vec![EMPTY; places].into(),
            items: (0..places).map(|_| T::default()).collect(),
            len: 0,
            graves: 0,
        }
    }

    /// Number of items.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Number of places; an item's is below it.
    pub(crate) fn places(&self) -> usize {
        self.tags.len()
    }

    /// Most items without another table.
    pub(crate) fn capacity(&self) -> usize {
        most(self.tags.len())
    }

    /// Whether an item more needs another table, by [`Packed::rebuilt`].
    pub(crate) fn is_full(&self) -> bool {
        self.len + self.graves >= self.capacity()
    }

    /// The fifteen low bits; see `eviction::Name`. They are enough to tell items apart even in a table of thousands: those
    /// that lie beside each other have nearly the same home, and agree in the rest by chance only.
    fn tag(hash: u64) -> u16 {
        TAKEN | (hash as u16 & !TAKEN)
    }

    /// Where the search for a tag begins.
    fn home(&self, tag: u16) -> usize {
        (usize::from(tag & !TAKEN) * self.tags.len()) >> 15
    }

    /// Places whose items may have this hash, in the order of their probing.
    fn candidates(&self, hash: u64) -> impl Iterator<Item = usize> + '_ {
        let tag = Self::tag(hash);
        let home = self.home(tag);
        let probes = (home..self.tags.len()).chain(0..home);
        probes.take_while(|p| self.tags[*p] != EMPTY).filter(move |p| self.tags[*p] == tag)
    }

    /// The place of the item with this hash for which `eq` holds.
    pub(crate) fn find(&self, hash: u64, eq: impl Fn(&T) -> bool) -> Option<usize> {
        self.candidates(hash).find(|p| eq(&self.items[*p]))
    }

    /// Items that may have this hash.
    pub(crate) fn with_hash(&self, hash: u64) -> impl Iterator<Item = &T> {
        self.candidates(hash).map(|p| &self.items[p])
    }

    /// The item of a place that is taken.
    pub(crate) fn item(&self, place: usize) -> &T {
        &self.items[place]
    }

    /// The same, to be changed.
    pub(crate) fn item_mut(&mut self, place: usize) -> &mut T {
        &mut self.items[place]
    }

    /// Adds an item that is not there; its place. The table must not be full.
    pub(crate) fn insert(&mut self, hash: u64, item: T) -> usize {
        self.put(Self::tag(hash), item)
    }

    fn put(&mut self, tag: u16, item: T) -> usize {
        debug_assert!(!self.is_full(), "room is made before");
        let home = self.home(tag);
        let mut probes = (home..self.tags.len()).chain(0..home);
        let place = probes.find(|p| self.tags[*p] < TAKEN).expect("an eighth of the places is free");
        self.graves -= usize::from(self.tags[place] == GRAVE);
        self.tags[place] = tag;
        self.items[place] = item;
        self.len += 1;
        place
    }

    /// Takes the item of a taken place out.
    pub(crate) fn remove(&mut self, place: usize) -> T {
        debug_assert!(self.tags[place] >= TAKEN);
        self.len -= 1;
        let places = self.tags.len();
        let next = if place + 1 == places { 0 } else { place + 1 };
        if self.tags[next] == EMPTY {
            // No search goes beyond this place any more, nor beyond graves before it.
            self.tags[place] = EMPTY;
            let mut before = place;
            loop {
                before = if before == 0 { places - 1 } else { before - 1 };
                if self.tags[before] != GRAVE {
                    break;
                }
                self.tags[before] = EMPTY;
                self.graves -= 1;
            }
        } else {
            self.tags[place] = GRAVE;
            self.graves += 1;
        }
        std::mem::take(&mut self.items[place])
    }

    /// The same items in a table with room for `items`, which are not fewer; `moved` is told where each went.
    pub(crate) fn rebuilt(self, items: usize, mut moved: impl FnMut(usize, usize)) -> Packed<T> {
        let mut table = Packed::with_capacity(items.max(self.len));
        for (from, (tag, item)) in self.tags.iter().zip(self.items).enumerate() {
            if *tag >= TAKEN {
                moved(from, table.put(*tag, item));
            }
        }
        table
    }

    /// The items, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.tags.iter().zip(&self.items).filter(|(tag, _)| **tag >= TAKEN).map(|(_, item)| item)
    }

    /// The items, to be changed, but not in their hashes.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.tags.iter().zip(&mut self.items).filter(|(tag, _)| **tag >= TAKEN).map(|(_, item)| item)
    }

    /// All items, out of the table.
    pub(crate) fn into_items(self) -> impl Iterator<Item = T> {
        self.tags.into_iter().zip(self.items).filter(|(tag, _)| *tag >= TAKEN).map(|(_, item)| item)
    }

    /// Takes out the items for which `goes` holds.
    pub(crate) fn extract(&mut self, mut goes: impl FnMut(&T) -> bool, mut with: impl FnMut(T)) {
        for place in 0..self.tags.len() {
            if self.tags[place] >= TAKEN && goes(&self.items[place]) {
                with(self.remove(place));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Numbers whose hashes agree in many bits, or in none.
    fn hash(n: u64, spread: bool) -> u64 {
        if spread { n.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23) } else { n % 5 }
    }

    #[test]
    fn it_is_a_map_whatever_is_inserted_and_removed() {
        for (seed, spread) in [(1u64, true), (2, true), (3, false), (4, true)] {
            let (mut t, mut model, mut rng) = (Packed::default(), BTreeMap::new(), seed);
            let keys = if spread { 2000 } else { 60 };
            for step in 0..60_000u64 {
                rng ^= rng << 13;
                rng ^= rng >> 7;
                rng ^= rng << 17;
                let key = rng % keys;
                let place = t.find(hash(key, spread), |i: &(u64, u64)| i.0 == key);
                assert_eq!(place.map(|p| t.item(p).1), model.get(&key).copied());
                // Grows, then shrinks, then grows.
                let remove = rng >> 32 & 7 < if step / 15_000 % 2 == 0 { 2 } else { 6 };
                match place {
                    Some(place) if remove => {
                        assert_eq!(Some(t.remove(place).1), model.remove(&key));
                        if t.len() < t.capacity() / 4 {
                            let len = t.len();
                            t = t.rebuilt(len * 2, |_, _| {});
                        }
                    }
                    Some(place) => {
                        t.item_mut(place).1 = step;
                        model.insert(key, step);
                    }
                    None if remove => {}
                    None => {
                        if t.is_full() {
                            let len = t.len();
                            t = t.rebuilt(len + 1, |_, _| {});
                        }
                        let place = t.insert(hash(key, spread), (key, step));
                        assert_eq!(*t.item(place), (key, step));
                        model.insert(key, step);
                    }
                }
                assert_eq!(t.len(), model.len());
                let count = |tag| t.tags.iter().filter(|t| **t == tag).count();
                assert_eq!((t.graves, count(EMPTY) > 0 || t.places() == 0), (count(GRAVE), true));
            }
            let mut items: Vec<_> = t.iter().copied().collect();
            items.sort_unstable();
            assert!(items.iter().map(|i| (&i.0, &i.1)).eq(&model), "seed {seed}");
            t.extract(|i| i.0 % 2 == 0, |i| assert_eq!(model.remove(&i.0), Some(i.1)));
            assert_eq!(t.len(), model.len());
            assert!(t.iter_mut().all(|i| i.0 % 2 == 1));
            assert_eq!(t.into_items().count(), model.len());
        }
    }

    #[test]
    fn it_is_filled_to_three_quarters_and_more() {
        assert_eq!((Packed::<u64>::default().capacity(), Packed::<u64>::default().is_full()), (0, true));
        assert_eq!(Packed::<u64>::default().find(7, |_| true), None);
        for items in 1..3000 {
            let places = places_for(items);
            assert!(most(places) >= items && places > most(places));
            assert!(places < 8 || (places - 2) * 10 <= items * 15, "{items} in {places}");
            // With items of 16 bytes a size that the allocator gives without waste.
            let class = (places * 16).next_power_of_two() / 8;
            assert!(places < 16 || (places * 16).is_multiple_of(class), "{places}");
        }
        let t = (0..1000u64).fold(Packed::<u64>::default(), |mut t, n| {
            if t.is_full() {
                let len = t.len();
                t = t.rebuilt(len + 1, |_, _| {});
            }
            t.insert(hash(n, true), n);
            t
        });
        assert!(t.places() <= 1280, "{}", t.places());
    }

    #[test]
    fn moves_are_told() {
        let mut t = Packed::with_capacity(3);
        for n in 0..3u64 {
            t.insert(hash(n, true), Some(n));
        }
        let before: Vec<Option<u64>> = t.items.to_vec();
        let mut moves = Vec::new();
        let t = t.rebuilt(40, |from, to| moves.push((from, to)));
        assert!(moves.len() == 3 && moves.iter().all(|(from, to)| before[*from] == *t.item(*to)));
    }
}
