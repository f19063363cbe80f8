//! Hash slots exactly as Redis Cluster defines them (Redis Cluster specification, "Key distribution model").

use serde::{Deserialize, Serialize};

/// Number of slots on the ring.
pub const SLOT_COUNT: u16 = 16_384;

/// One of the 16,384 hash slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Slot(pub u16);

/// A contiguous arc of slots, `start..end` with `end` exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRange {
    /// First slot of the arc.
    pub start: u16,
    /// One past the last slot of the arc.
    pub end: u16,
}

impl SlotRange {
    /// Whether the arc holds `slot`.
    pub fn contains(&self, slot: Slot) -> bool {
        (self.start..self.end).contains(&slot.0)
    }
    /// Number of slots.
    pub fn len(&self) -> usize {
        usize::from(self.end.saturating_sub(self.start))
    }
    /// Whether the arc is empty.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }
}

/// CRC16-CCITT (XMODEM): polynomial 0x1021, initial value 0, no reflection.
const CRC16: [u16; 256] = {
    let mut table = [0u16; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = (byte as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 { crc << 1 ^ 0x1021 } else { crc << 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, &b| crc << 8 ^ CRC16[usize::from((crc >> 8) as u8 ^ b)])
}

/// The part of `key` that is hashed: what stands between the first `{` and the next `}` if that is not empty, else all.
pub fn hash_tag(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|&b| b == b'{') else { return key };
    let tail = &key[open + 1..];
    match tail.iter().position(|&b| b == b'}') {
        Some(close) if close > 0 => &tail[..close],
        _ => key,
    }
}

/// The slot of `key`.
pub fn slot_of(key: &[u8]) -> Slot {
    Slot(crc16(hash_tag(key)) % SLOT_COUNT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc16_test_vector_of_the_specification() {
        assert_eq!(crc16(b"123456789"), 0x31C3);
    }

    #[test]
    fn hash_tags_of_the_specification() {
        assert_eq!(hash_tag(b"{user1000}.following"), b"user1000");
        assert_eq!(hash_tag(b"foo{}{bar}"), b"foo{}{bar}");
        assert_eq!(hash_tag(b"foo{{bar}}zap"), b"{bar");
        assert_eq!(hash_tag(b"foo{bar}{zap}"), b"bar");
        assert_eq!(slot_of(b"{user1000}.following"), slot_of(b"{user1000}.followers"));
    }

    #[test]
    fn slots_as_redis_answers_them() {
        // CLUSTER KEYSLOT of Redis 7.0.15.
        for (key, slot) in [
            ("", 0),
            ("foo", 12182),
            ("bar", 5061),
            ("hello", 866),
            ("somekey", 11058),
            ("123456789", 12739),
            ("{user1000}.following", 3443),
            ("{user1000}.followers", 3443),
            ("foo{}{bar}", 8363),
            ("foo{{bar}}zap", 4015),
            ("foo{bar}{zap}", 5061),
            ("{}", 15257),
            ("{}a", 10875),
            ("a{b", 13340),
            ("a}b{c", 13587),
            ("{a", 10276),
            ("x{y}z", 12222),
            ("key:1", 6657),
            ("key:2", 10850),
            ("日本", 10949),
            ("session:abc", 14788),
        ] {
            assert_eq!(slot_of(key.as_bytes()), Slot(slot), "{key}");
        }
    }

    #[test]
    fn slots_of_odd_keys_as_redis_answers_them() {
        // CLUSTER KEYSLOT of Redis 7.0.15: braces at every place, and bytes that are no text.
        let answers: [(&[u8], u16); 28] = [
            (b"a", 15495),
            (b"b", 3300),
            (b"key:000000000042", 7803),
            (b"user1000", 3443),
            (b"{", 4092),
            (b"}", 12090),
            (b"}{", 12793),
            (b"}{a}", 15495),
            (b"a}", 5921),
            (b"{a}", 15495),
            (b"{}{a}", 13650),
            (b"{{}}", 4092),
            (b"{{}", 4092),
            (b"{}}", 14790),
            (b"{a}{b}", 15495),
            (b"x{a}y{b}z", 15495),
            (b"x{a", 6541),
            (b"x{}", 2608),
            (b"{ }", 9314),
            (b" ", 9314),
            (b"\x00", 0),
            (b"{\x00}x", 0),
            (b"\xff\xfe{\xff}\x80", 7920),
            (b"\r\n", 5910),
            (b"{a}\x00{b}", 15495),
            ("caf\u{e9}".as_bytes(), 5735),
            (b"{user}:{id}:1", 5474),
            (b"page:/index.html?x={y}", 12222),
        ];
        for (key, slot) in answers {
            assert_eq!(slot_of(key), Slot(slot), "{}", key.escape_ascii());
        }
        assert_eq!(slot_of(&[b'x'; 300]), Slot(11216));
        assert_eq!(slot_of(&[b"{".as_slice(), &[b'y'; 299], b"}tail"].concat()), Slot(133));
    }
}
