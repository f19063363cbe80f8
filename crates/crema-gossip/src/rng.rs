//! A small generator for choices where only spread matters, such as whom to tell first. Nothing secret depends on it.

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub(crate) struct SplitMix(u64);

impl SplitMix {
    pub(crate) fn new(seed: u64) -> Self {
        SplitMix(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0. The bias is below `bound` / 2^64.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Moves `count` random elements to the front, or all if there are fewer, and drops the others.
    pub(crate) fn keep_random<T>(&mut self, from: &mut Vec<T>, count: usize) {
        let count = count.min(from.len());
        for i in 0..count {
            let j = i + self.below((from.len() - i) as u64) as usize;
            from.swap(i, j);
        }
        from.truncate(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_distinct_elements_and_reaches_all() {
        let mut rng = SplitMix::new(1);
        let mut seen = [0_u32; 10];
        for _ in 0..1_000 {
            let mut some: Vec<usize> = (0..10).collect();
            rng.keep_random(&mut some, 3);
            some.sort_unstable();
            some.dedup();
            assert_eq!(some.len(), 3);
            some.iter().for_each(|i| seen[*i] += 1);
        }
        assert!(seen.iter().all(|n| (200..400).contains(n)), "{seen:?}");
        let mut few = vec![1, 2];
        rng.keep_random(&mut few, 16);
        few.sort_unstable();
        assert_eq!(few, [1, 2]);
        rng.keep_random(&mut Vec::<u8>::new(), 3);
    }
}
