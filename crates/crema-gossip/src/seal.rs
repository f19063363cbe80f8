//! Cluster keys, and the frame in which every datagram of gossip travels.
//!
//! ```text
//!   key file --parse--> ClusterKey --derive("crema gossip …")--> KeyRing: the first seals, all open
//!
//!   version1 | cluster4 | key4 | boot16 | counter8 | sealed( time4 | echo8 | body ) | tag16
//!   '-------------- header, 33 bytes --------------'
//!   XChaCha20-Poly1305; nonce = boot | counter; associated data = header | cluster name
//! ```
//!
//! `boot` is random for each start of a process and `counter` never repeats within it, so that no nonce is used twice, however
//! long a cluster runs with one key. Without keys the same frame travels in the clear, with another version and without tag,
//! so that there is one path. The hash of the cluster's name is readable in both cases: two clusters that meet notice it.
//!
//! Replays. The counters of a known boot pass a window once. An unknown boot must prove that it speaks now: its frame carries
//! the beginning of *our* boot id (`echo`), which nobody could know before this process started, and its clock is within ten
//! minutes of ours. What was captured before an observer restarted therefore shows it nobody. The echo is asked of known boots,
//! too: what one of them sent to somebody else is nothing that it said to us. A frame without it is answered with a greeting
//! (by the shell), after which the sender knows what to echo – unless it would not be taken with it either.
//!
//! No clock and no randomness here: both are arguments.

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use chacha20poly1305::{AeadInOut, KeyInit, Tag, XChaCha20Poly1305, XNonce};
use hkdf::Hkdf;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt;
use zeroize::Zeroize;

/// Length of a cluster key in bytes.
pub const KEY_BYTES: usize = 32;
/// Most keys of a ring, and of a key file.
pub const MAX_KEYS: usize = 8;
/// Longest key file in bytes.
pub const MAX_KEY_FILE_BYTES: usize = 16 * 1024;
/// Bytes of a frame before what is sealed.
pub const HEADER_BYTES: usize = 1 + 4 + 4 + 16 + 8;
/// Bytes of a frame beside its body; without keys the last [`TAG_BYTES`] are not there.
pub const FRAME_OVERHEAD_BYTES: usize = HEADER_BYTES + PREFIX_BYTES + TAG_BYTES;
/// Length of the authentication tag in bytes.
pub const TAG_BYTES: usize = 16;
/// How far the clock of an unknown sender may be from ours, in seconds.
pub const CLOCK_TOLERANCE_S: u64 = 600;
/// How many counters before the highest one a window remembers.
pub const WINDOW_COUNTERS: u64 = 1_024;
/// Most boots that an opener remembers.
pub const MAX_BOOTS: usize = 4_096;

/// Time and echo, sealed in front of each body.
const PREFIX_BYTES: usize = 4 + ECHO_BYTES;
const ECHO_BYTES: usize = 8;
const VERSION_SEALED: u8 = 0xC1;
const VERSION_PLAIN: u8 = 0xC0;
/// The first bytes of chitchat's own datagrams.
const CHITCHAT_MAGIC: [u8; 2] = 45_139_u16.to_le_bytes();
const SEAL_LABEL: &str = "crema gossip 1 seal";
const ID_LABEL: &str = "crema key id 1";

/// The secret of a cluster as it stands in the key file. It seals nothing itself: each use derives its own key from it, so
/// that one file serves several purposes. Printing it shows its id only.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey([u8; KEY_BYTES]);

/// A name for a key that does not tell the key: 32 bits derived from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub u32);

/// Random for each start of a process. Half of a frame's nonce: it must never repeat.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BootId(pub [u8; 16]);

/// A key file that cannot be used. Never contains any of its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// Correct the line.
    #[error("key file, line {line}: {reason}")]
    Line {
        /// The line, from 1 on.
        line: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is no key in it.
    #[error("the key file contains no key; expected are lines of 64 hexadecimal digits or of 32 bytes in base64")]
    Empty,
    /// There are too many keys in it.
    #[error("the key file contains more than {MAX_KEYS} keys; remove the oldest")]
    TooMany,
    /// It cannot be a key file.
    #[error("the key file is longer than {MAX_KEY_FILE_BYTES} bytes")]
    TooLong,
}

/// A change of the ring that is refused; the ring is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyRingError {
    /// Install the key first.
    #[error("key {0} is not installed")]
    Unknown(KeyId),
    /// Use another key first.
    #[error("key {0} is the primary, which seals; use another key before removing it")]
    Primary(KeyId),
    /// Remove a key first.
    #[error("{MAX_KEYS} keys are installed; remove one that is no longer used")]
    Full,
}

impl ClusterKey {
    /// The key of these bytes, which must come from a good source of randomness.
    pub fn new(bytes: [u8; KEY_BYTES]) -> ClusterKey {
        ClusterKey(bytes)
    }

    /// One line of a key file: 64 hexadecimal digits, or 32 bytes in base64 with or without padding.
    ///
    /// Errors: what is wrong with it.
    pub fn parse(text: &str) -> Result<ClusterKey, &'static str> {
        const LENIENT: GeneralPurpose = GeneralPurpose::new(
            &base64::alphabet::STANDARD,
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
        );
        let mut bytes = [0; KEY_BYTES];
        let text = text.trim().as_bytes();
        if text.len() == 2 * KEY_BYTES {
            for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
                let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
                let (Some(high), Some(low)) = (digit(pair[0]), digit(pair[1])) else {
                    return Err("64 characters, but not all are hexadecimal digits");
                };
                *byte = high << 4 | low;
            }
        } else {
            // 44 characters with padding. The bound comes first, so that nothing of unknown size is decoded.
            if text.len() > 44 {
                return Err("too long for a key of 32 bytes");
            }
            let mut decoded = [0; 36];
            let len = LENIENT.decode_slice(text, &mut decoded).map_err(|_| "neither hexadecimal nor base64")?;
            if len != KEY_BYTES {
                decoded.zeroize();
                return Err("a key has 32 bytes");
            }
            bytes.copy_from_slice(&decoded[..KEY_BYTES]);
            decoded.zeroize();
        }
        if bytes.iter().all(|b| *b == bytes[0]) {
            return Err("a placeholder and not a key; make one with: openssl rand -hex 32");
        }
        Ok(ClusterKey(bytes))
    }

    /// A key for one purpose, named by `label`: HKDF-SHA256 with the label as its info. Who knows it learns nothing about the
    /// cluster key or about keys for other labels.
    pub fn derive(&self, label: &str) -> [u8; KEY_BYTES] {
        let mut key = [0; KEY_BYTES];
        let hkdf = Hkdf::<Sha256>::new(None, &self.0);
        hkdf.expand(label.as_bytes(), &mut key).expect("32 bytes are fewer than HKDF can give");
        key
    }

    /// Its id.
    pub fn id(&self) -> KeyId {
        let mut derived = self.derive(ID_LABEL);
        let id = KeyId(u32::from_be_bytes([derived[0], derived[1], derived[2], derived[3]]));
        derived.zeroize();
        id
    }
}

impl Drop for ClusterKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKey({})", self.id())
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl fmt::Debug for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BootId({:08x}…)", u32::from_be_bytes([self.0[0], self.0[1], self.0[2], self.0[3]]))
    }
}

impl BootId {
    fn echo(self) -> [u8; ECHO_BYTES] {
        let mut echo = [0; ECHO_BYTES];
        echo.copy_from_slice(&self.0[..ECHO_BYTES]);
        echo
    }
}

#[derive(Clone)]
struct RingKey {
    key: ClusterKey,
    id: KeyId,
    cipher: XChaCha20Poly1305,
}

impl RingKey {
    fn new(key: ClusterKey) -> RingKey {
        let mut sealing = key.derive(SEAL_LABEL);
        let cipher = XChaCha20Poly1305::new(&sealing.into());
        sealing.zeroize();
        RingKey { id: key.id(), key, cipher }
    }
}

/// The keys of a cluster. The primary seals; all of them open. To change a key while the cluster runs: install the new one on
/// every node, then use it on every node, then remove the old one.
#[derive(Clone)]
pub struct KeyRing {
    /// The primary first; never empty.
    keys: Vec<RingKey>,
}

impl PartialEq for KeyRing {
    fn eq(&self, other: &KeyRing) -> bool {
        self.keys.iter().map(|k| &k.key).eq(other.keys.iter().map(|k| &k.key))
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ids()).finish()
    }
}

impl KeyRing {
    /// A ring of one key.
    pub fn new(primary: ClusterKey) -> KeyRing {
        KeyRing { keys: vec![RingKey::new(primary)] }
    }

    /// The keys of a key file: one a line, the first is the primary. Empty lines and lines that begin with `#` are skipped.
    ///
    /// Errors: the first line that is not a key, or that repeats one; no key or too many.
    pub fn parse(text: &str) -> Result<KeyRing, KeyFileError> {
        if text.len() > MAX_KEY_FILE_BYTES {
            return Err(KeyFileError::TooLong);
        }
        let mut ring: Option<KeyRing> = None;
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let key = ClusterKey::parse(text).map_err(|reason| KeyFileError::Line { line, reason })?;
            match &mut ring {
                None => ring = Some(KeyRing::new(key)),
                Some(ring) if ring.keys.iter().any(|k| k.key == key) => {
                    return Err(KeyFileError::Line { line, reason: "this key stands in the file already" });
                }
                Some(ring) => ring.install(key).map_err(|_| KeyFileError::TooMany)?,
            }
        }
        ring.ok_or(KeyFileError::Empty)
    }

    /// Adds a key that opens but does not seal. A key that is there already changes nothing.
    ///
    /// Errors: [`KeyRingError::Full`].
    pub fn install(&mut self, key: ClusterKey) -> Result<(), KeyRingError> {
        if self.keys.iter().any(|k| k.key == key) {
            return Ok(());
        }
        if self.keys.len() >= MAX_KEYS {
            return Err(KeyRingError::Full);
        }
        self.keys.push(RingKey::new(key));
        Ok(())
    }

    /// Makes an installed key the primary.
    ///
    /// Errors: [`KeyRingError::Unknown`].
    pub fn use_key(&mut self, id: KeyId) -> Result<(), KeyRingError> {
        let at = self.keys.iter().position(|k| k.id == id).ok_or(KeyRingError::Unknown(id))?;
        self.keys[..=at].rotate_right(1);
        Ok(())
    }

    /// Removes a key, which then opens nothing any more.
    ///
    /// Errors: [`KeyRingError::Unknown`] and [`KeyRingError::Primary`].
    pub fn remove(&mut self, id: KeyId) -> Result<(), KeyRingError> {
        match self.keys.iter().position(|k| k.id == id) {
            None => Err(KeyRingError::Unknown(id)),
            Some(0) => Err(KeyRingError::Primary(id)),
            Some(at) => {
                self.keys.remove(at);
                Ok(())
            }
        }
    }

    /// The id of the key that seals.
    pub fn primary(&self) -> KeyId {
        self.keys[0].id
    }

    /// The key that seals, to derive keys for other purposes from it.
    pub fn primary_key(&self) -> &ClusterKey {
        &self.keys[0].key
    }

    /// All keys, the primary first.
    pub fn keys(&self) -> impl Iterator<Item = &ClusterKey> {
        self.keys.iter().map(|k| &k.key)
    }

    /// The ids of all keys, the primary first.
    pub fn ids(&self) -> impl Iterator<Item = KeyId> {
        self.keys.iter().map(|k| k.id)
    }
}

/// The cluster as frames name it.
#[derive(Clone, Debug)]
struct Cluster {
    name: String,
    hash: [u8; 4],
}

impl Cluster {
    fn new(name: &str) -> Cluster {
        let digest = Sha256::digest(name.as_bytes());
        Cluster { name: name.to_owned(), hash: [digest[0], digest[1], digest[2], digest[3]] }
    }

    fn associated_data(&self, header: &[u8]) -> Vec<u8> {
        [header, self.name.as_bytes()].concat()
    }
}

/// Makes frames. One per process and start: its boot id must be new.
#[derive(Debug)]
pub struct Sealer {
    cluster: Cluster,
    boot: BootId,
    counter: u64,
}

impl Sealer {
    /// For the cluster of this name. `boot` must be random and never used before.
    pub fn new(cluster: &str, boot: BootId) -> Sealer {
        Sealer { cluster: Cluster::new(cluster), boot, counter: 0 }
    }

    /// The counter that the next frame will carry.
    pub fn next_counter(&self) -> u64 {
        self.counter
    }

    /// The frame of a body. `now_s` is the wall clock in seconds, `peer` the boot to which the frame goes as far as it is known.
    /// Without a ring the frame is not sealed.
    pub fn seal(&mut self, ring: Option<&KeyRing>, now_s: u64, peer: Option<BootId>, body: &[u8]) -> Vec<u8> {
        let mut frame = Vec::with_capacity(FRAME_OVERHEAD_BYTES + body.len());
        frame.push(if ring.is_some() { VERSION_SEALED } else { VERSION_PLAIN });
        frame.extend_from_slice(&self.cluster.hash);
        frame.extend_from_slice(&ring.map_or(0, |ring| ring.primary().0).to_be_bytes());
        frame.extend_from_slice(&self.boot.0);
        frame.extend_from_slice(&self.counter.to_be_bytes());
        // Seconds fit 32 bits until 2106.
        frame.extend_from_slice(&(now_s as u32).to_be_bytes());
        frame.extend_from_slice(&peer.map_or([0; ECHO_BYTES], BootId::echo));
        frame.extend_from_slice(body);
        if let Some(ring) = ring {
            let (header, content) = frame.split_at_mut(HEADER_BYTES);
            let associated = self.cluster.associated_data(header);
            let sealed = ring.keys[0].cipher.encrypt_inout_detached(
                &nonce(self.boot, self.counter),
                &associated,
                content.into(),
            );
            frame.extend_from_slice(&sealed.expect("a frame is far below the cipher's limit"));
        }
        // 2^64 frames are not reached by any process.
        self.counter += 1;
        frame
    }
}

fn nonce(boot: BootId, counter: u64) -> XNonce {
    let mut nonce = XNonce::default();
    nonce[..16].copy_from_slice(&boot.0);
    nonce[16..].copy_from_slice(&counter.to_be_bytes());
    nonce
}

/// A frame that was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Who made it.
    pub boot: BootId,
    /// Its counter.
    pub counter: u64,
    /// What it carries.
    pub body: Vec<u8>,
}

/// Why a frame is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It does not belong here; says how.
    Foreign(Foreign),
    /// It was made with a key of the cluster, but does not prove that it was made for this boot. Greet the sender: its next
    /// frame will carry the proof.
    Unproven(Opened),
}

/// Kinds of datagrams that are not for this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Foreign {
    /// Not a frame of ours.
    Garbage,
    /// Chitchat's own format, as an old or unconfigured node sends it.
    Plaintext,
    /// A frame without seal, but this node has keys.
    Unsealed,
    /// A sealed frame, but this node has no keys.
    Sealed,
    /// Another cluster's name.
    OtherCluster,
    /// Sealed with a key that is not in the ring, or changed on the way.
    WrongKey,
    /// Seen before, or too old to tell.
    Replay,
    /// From a sender whose clock is more than ten minutes from ours.
    Clock,
    /// Opened, but its content makes no sense.
    Malformed,
}

impl Foreign {
    /// All kinds.
    pub const ALL: [Foreign; 9] = [
        Foreign::Garbage,
        Foreign::Plaintext,
        Foreign::Unsealed,
        Foreign::Sealed,
        Foreign::OtherCluster,
        Foreign::WrongKey,
        Foreign::Replay,
        Foreign::Clock,
        Foreign::Malformed,
    ];

    /// What to tell people.
    pub fn reason(self) -> &'static str {
        match self {
            Foreign::Garbage => "not gossip of Crema",
            Foreign::Plaintext => "plain chitchat: a node of another version, or another program",
            Foreign::Unsealed => "not sealed, but this node has cluster keys: the peer lacks the key file",
            Foreign::Sealed => "sealed, but this node has no cluster keys: give it the peer's key file",
            Foreign::OtherCluster => "of another cluster: the cluster names differ",
            Foreign::WrongKey => "sealed with a key that this node does not have, or altered",
            Foreign::Replay => "a repetition of what was received before",
            Foreign::Clock => "from a node whose clock is more than ten minutes from this one's",
            Foreign::Malformed => "of this cluster, but its content makes no sense",
        }
    }
}

impl From<Foreign> for Refusal {
    fn from(foreign: Foreign) -> Refusal {
        Refusal::Foreign(foreign)
    }
}

/// Opens frames and remembers which it has seen.
#[derive(Debug)]
pub struct Opener {
    cluster: Cluster,
    boot: BootId,
    windows: HashMap<BootId, Window>,
    /// No unknown boot is believed to have spoken first at or before this time; grows when a boot must be forgotten early.
    floor_s: u64,
}

impl Opener {
    /// For the cluster of this name; `boot` is this process's own.
    pub fn new(cluster: &str, boot: BootId) -> Opener {
        Opener { cluster: Cluster::new(cluster), boot, windows: HashMap::new(), floor_s: 0 }
    }

    /// How many boots are remembered.
    pub fn boots(&self) -> usize {
        self.windows.len()
    }

    /// Opens a frame of at most some 64 KiB. `now_s` is the wall clock in seconds. Without a ring only unsealed frames are
    /// taken, and nothing is checked but the cluster's name: who wants to deceive could also invent boots.
    ///
    /// Errors: see [`Refusal`]. Only frames sealed with a key of the ring change what is remembered.
    pub fn open(&mut self, ring: Option<&KeyRing>, now_s: u64, frame: &[u8]) -> Result<Opened, Refusal> {
        let foreign = |kind: Foreign| Err(Refusal::Foreign(kind));
        let Some((header, content)) = frame.split_at_checked(HEADER_BYTES) else {
            return foreign(if frame.starts_with(&CHITCHAT_MAGIC) { Foreign::Plaintext } else { Foreign::Garbage });
        };
        match (header[0], ring) {
            (VERSION_SEALED, Some(_)) | (VERSION_PLAIN, None) => {}
            (VERSION_SEALED | VERSION_PLAIN, _) if header[1..5] != self.cluster.hash => {
                return foreign(Foreign::OtherCluster);
            }
            (VERSION_SEALED, None) => return foreign(Foreign::Sealed),
            (VERSION_PLAIN, Some(_)) => return foreign(Foreign::Unsealed),
            _ if frame.starts_with(&CHITCHAT_MAGIC) => return foreign(Foreign::Plaintext),
            _ => return foreign(Foreign::Garbage),
        }
        if header[1..5] != self.cluster.hash {
            return foreign(Foreign::OtherCluster);
        }
        let boot = BootId(header[9..25].try_into().expect("16 bytes"));
        let counter = u64::from_be_bytes(header[25..33].try_into().expect("8 bytes"));
        let content = match ring {
            None => content.to_vec(),
            Some(ring) => self.decrypt(ring, header, boot, counter, content).ok_or(Foreign::WrongKey)?,
        };
        let Some((prefix, body)) = content.split_at_checked(PREFIX_BYTES) else {
            return foreign(Foreign::Malformed);
        };
        let opened = Opened { boot, counter, body: body.to_vec() };
        if ring.is_none() {
            return Ok(opened);
        }
        let sent_s = u32::from_be_bytes(prefix[..4].try_into().expect("4 bytes")).into();
        if boot == self.boot {
            return foreign(Foreign::Replay);
        }
        let to_us = prefix[4..] == self.boot.echo();
        if let Some(window) = self.windows.get_mut(&boot) {
            return match window.admit(counter, sent_s) {
                false => foreign(Foreign::Replay),
                true if to_us => Ok(opened),
                true => Err(Refusal::Unproven(opened)),
            };
        }
        // First what no echo would mend: a recording must not make this node answer.
        if now_s.abs_diff(sent_s) > CLOCK_TOLERANCE_S {
            return foreign(Foreign::Clock);
        }
        if sent_s <= self.floor_s {
            return foreign(Foreign::Replay);
        }
        if !to_us {
            return Err(Refusal::Unproven(opened));
        }
        self.make_room(now_s);
        self.windows.insert(boot, Window::new(counter, sent_s));
        Ok(opened)
    }

    fn decrypt(&self, ring: &KeyRing, header: &[u8], boot: BootId, counter: u64, content: &[u8]) -> Option<Vec<u8>> {
        let id = KeyId(u32::from_be_bytes(header[5..9].try_into().ok()?));
        let (sealed, tag) = content.split_at_checked(content.len().checked_sub(TAG_BYTES)?)?;
        let tag = Tag::try_from(tag).ok()?;
        // The same id for two keys is a matter of chance, 1 in 2^32.
        let mut candidates = ring.keys.iter().filter(|k| k.id == id).peekable();
        candidates.peek()?;
        let associated = self.cluster.associated_data(header);
        candidates.find_map(|key| {
            let mut plain = sealed.to_vec();
            let opened = key.cipher.decrypt_inout_detached(
                &nonce(boot, counter),
                &associated,
                plain.as_mut_slice().into(),
                &tag,
            );
            opened.ok().map(|()| plain)
        })
    }

    /// A boot may be forgotten once all it ever said is too old for an unknown boot. If there are too many that are not, the one
    /// silent for longest goes, and with it the belief in unknown boots that are as old.
    fn make_room(&mut self, now_s: u64) {
        if self.windows.len() < MAX_BOOTS {
            return;
        }
        self.windows.retain(|_, window| window.last_s.saturating_add(CLOCK_TOLERANCE_S) >= now_s);
        while self.windows.len() >= MAX_BOOTS {
            let Some((boot, last_s)) = self.windows.iter().map(|(b, w)| (*b, w.last_s)).min_by_key(|(b, s)| (*s, b.0))
            else {
                return;
            };
            self.windows.remove(&boot);
            self.floor_s = self.floor_s.max(last_s);
        }
    }
}

const WINDOW_WORDS: usize = (WINDOW_COUNTERS / 64) as usize;

/// Which counters of one boot were seen; RFC 6479 describes the same.
#[derive(Debug)]
struct Window {
    highest: u64,
    /// Latest time that one of its frames carried, in seconds.
    last_s: u64,
    seen: [u64; WINDOW_WORDS],
}

impl Window {
    /// What came before the first frame counts as seen: it may be older than this process.
    fn new(first: u64, sent_s: u64) -> Window {
        Window { highest: first, last_s: sent_s, seen: [u64::MAX; WINDOW_WORDS] }
    }

    fn admit(&mut self, counter: u64, sent_s: u64) -> bool {
        let bit = |counter: u64| (((counter % WINDOW_COUNTERS) / 64) as usize, 1_u64 << (counter % 64));
        if counter > self.highest {
            // Everything between is not seen yet; a whole turn clears all.
            for between in 1..=(counter - self.highest).min(WINDOW_COUNTERS) {
                let (word, mask) = bit(self.highest.wrapping_add(between));
                self.seen[word] &= !mask;
            }
            self.highest = counter;
        } else if self.highest - counter >= WINDOW_COUNTERS {
            return false;
        }
        let (word, mask) = bit(counter);
        let fresh = self.seen[word] & mask == 0;
        self.seen[word] |= mask;
        if fresh {
            self.last_s = self.last_s.max(sent_s);
        }
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    const NOW_S: u64 = 1_700_000_000;
    const A: BootId = BootId([1; 16]);
    const B: BootId = BootId([2; 16]);

    fn key(byte: u8) -> ClusterKey {
        let mut bytes = [byte; KEY_BYTES];
        bytes[0] = !byte;
        ClusterKey::new(bytes)
    }

    fn foreign<T>(kind: Foreign) -> Result<T, Refusal> {
        Err(Refusal::Foreign(kind))
    }

    /// A frame of `A` for `B`, and the opener of `B`.
    fn pair() -> (KeyRing, Sealer, Opener) {
        (KeyRing::new(key(1)), Sealer::new("crema", A), Opener::new("crema", B))
    }

    #[test]
    fn key_files_are_read_and_mistakes_named_without_their_text() {
        let hex = "00112233445566778899aabbccddeeff00112233445566778899AABBCCDDEEFF";
        let base64 = "//8AAREiM0RVZneImaq7zN3u/wARIjNEVWZ3iJmqu8w=";
        let text = format!("# the second is from May\n{hex}\r\n\n  {base64}  \n");
        let ring = KeyRing::parse(&text).unwrap();
        assert_eq!(ring.ids().count(), 2);
        assert_eq!(ring.primary_key(), &ClusterKey::parse(hex).unwrap());
        assert_eq!(ClusterKey::parse(base64.trim_end_matches('=')), ClusterKey::parse(base64));
        assert_eq!(KeyRing::parse("\n# none\n").unwrap_err(), KeyFileError::Empty);
        let many: String = (0..9).map(|i| format!("{}{i}\n", &hex[..63])).collect();
        assert_eq!(KeyRing::parse(&many).unwrap_err(), KeyFileError::TooMany);
        assert_eq!(KeyRing::parse(&"#".repeat(MAX_KEY_FILE_BYTES + 1)).unwrap_err(), KeyFileError::TooLong);
        let zeroes = "0".repeat(64);
        for (text, line) in [
            (format!("{hex}\n{hex}"), 2),
            (format!("{}g", &hex[..63]), 1),
            (hex[..62].to_owned(), 1),
            (format!("{base64}{base64}"), 1),
            ("c2VjcmV0".to_owned(), 1),
            ("my secret passphrase".to_owned(), 1),
            (zeroes, 1),
            ("é".repeat(22), 1),
        ] {
            let error = KeyRing::parse(&text).unwrap_err();
            assert!(matches!(error, KeyFileError::Line { line: at, .. } if at == line), "{error}");
            assert!(!error.to_string().contains(text.lines().next_back().unwrap()));
        }
        let shown = format!("{:?} {ring:?}", ring.primary_key());
        assert!(shown.contains(&ring.primary().to_string()) && !shown.to_lowercase().contains("00112233"), "{shown}");
    }

    #[test]
    fn derived_keys_differ_by_label_and_key() {
        let all = [key(1).derive("a"), key(1).derive("b"), key(2).derive("a")];
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
        assert_eq!(all[0], key(1).derive("a"));
        // RFC 5869 without salt, computed with another implementation: it must not change, or no node could join another.
        let expected = "ef6b771ee237a8398cb9bad2f7ee0e74";
        let hex: String = ClusterKey::new([7; 32]).derive("x")[..16].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, expected);
    }

    #[test]
    fn rings_rotate() {
        let mut ring = KeyRing::new(key(1));
        let (old, new) = (key(1).id(), key(2).id());
        assert_eq!(ring.use_key(new), Err(KeyRingError::Unknown(new)));
        ring.install(key(2)).unwrap();
        ring.install(key(2)).unwrap();
        assert_eq!(ring.primary(), old);
        assert_eq!(ring.remove(old), Err(KeyRingError::Primary(old)));
        ring.use_key(new).unwrap();
        assert_eq!(ring.ids().collect::<Vec<_>>(), [new, old]);
        ring.remove(old).unwrap();
        assert_eq!(ring.remove(old), Err(KeyRingError::Unknown(old)));
        assert_eq!(ring, KeyRing::new(key(2)));
        for i in 3..10 {
            ring.install(key(i)).unwrap();
        }
        assert_eq!(ring.install(key(10)), Err(KeyRingError::Full));
    }

    #[test]
    fn frames_are_opened_once_by_those_who_have_the_key() {
        let (ring, mut sealer, mut opener) = pair();
        let frame = sealer.seal(Some(&ring), NOW_S, Some(B), b"hello");
        assert_eq!(frame.len(), FRAME_OVERHEAD_BYTES + 5);
        assert!(!frame.windows(5).any(|w| w == b"hello"));
        let opened = Opened { boot: A, counter: 0, body: b"hello".to_vec() };
        assert_eq!(opener.open(Some(&ring), NOW_S, &frame), Ok(opened));
        assert_eq!(opener.open(Some(&ring), NOW_S, &frame), foreign(Foreign::Replay));
        // Every changed bit is noticed.
        let next = sealer.seal(Some(&ring), NOW_S, Some(B), b"hello");
        for bit in 0..next.len() * 8 {
            let mut changed = next.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(opener.open(Some(&ring), NOW_S, &changed).is_err(), "bit {bit}");
        }
        for len in 0..next.len() {
            assert!(opener.open(Some(&ring), NOW_S, &next[..len]).is_err(), "length {len}");
        }
        assert_eq!(opener.boots(), 1);
        assert!(opener.open(Some(&ring), NOW_S, &next).is_ok());
        // A second key opens too, whichever seals.
        let mut both = ring.clone();
        both.install(key(2)).unwrap();
        both.use_key(key(2).id()).unwrap();
        let frame = sealer.seal(Some(&both), NOW_S, Some(B), b"");
        assert_eq!(opener.open(Some(&ring), NOW_S, &frame), foreign(Foreign::WrongKey));
        assert!(opener.open(Some(&both), NOW_S, &frame).is_ok());
        assert!(opener.open(Some(&both), NOW_S, &sealer.seal(Some(&ring), NOW_S, Some(B), b"")).is_ok());
    }

    #[test]
    fn what_is_foreign_is_named() {
        let (ring, mut sealer, mut opener) = pair();
        let mut other = Sealer::new("other", BootId([3; 16]));
        let kinds = [
            (sealer.seal(None, NOW_S, Some(B), b"x"), Foreign::Unsealed),
            (other.seal(None, NOW_S, Some(B), b"x"), Foreign::OtherCluster),
            (other.seal(Some(&ring), NOW_S, Some(B), b"x"), Foreign::OtherCluster),
            (sealer.seal(Some(&KeyRing::new(key(9))), NOW_S, Some(B), b"x"), Foreign::WrongKey),
            ([&CHITCHAT_MAGIC[..], &[1, 0]].concat(), Foreign::Plaintext),
            ([&CHITCHAT_MAGIC[..], &[0; 60]].concat(), Foreign::Plaintext),
            (vec![], Foreign::Garbage),
            (vec![7; 100], Foreign::Garbage),
        ];
        for (frame, kind) in kinds {
            assert_eq!(opener.open(Some(&ring), NOW_S, &frame), foreign(kind));
        }
        assert_eq!(opener.boots(), 0);
        // Without keys.
        assert_eq!(opener.open(None, NOW_S, &sealer.seal(Some(&ring), NOW_S, None, b"")), foreign(Foreign::Sealed));
        assert_eq!(opener.open(None, NOW_S, &other.seal(None, NOW_S, None, b"")), foreign(Foreign::OtherCluster));
        let plain = sealer.seal(None, 5, None, b"x");
        assert_eq!(opener.open(None, NOW_S, &plain).unwrap().body, b"x");
        assert_eq!(opener.open(None, NOW_S, &plain[..HEADER_BYTES + 3]), foreign(Foreign::Malformed));
        // The name is also authenticated: a frame is not another cluster's because its readable hash says so.
        let mut renamed = other.seal(Some(&ring), NOW_S, Some(B), b"x");
        renamed[1..5].copy_from_slice(&opener.cluster.hash);
        assert_eq!(opener.open(Some(&ring), NOW_S, &renamed), foreign(Foreign::WrongKey));
    }

    #[test]
    fn an_unknown_boot_must_prove_that_it_speaks_now() {
        let (ring, mut sealer, mut opener) = pair();
        let mut open = |opener: &mut Opener, now_s, peer| {
            let frame = sealer.seal(Some(&ring), now_s, peer, b"x");
            opener.open(Some(&ring), NOW_S, &frame)
        };
        assert!(matches!(open(&mut opener, NOW_S, None), Err(Refusal::Unproven(Opened { boot: A, counter: 0, .. }))));
        assert!(matches!(open(&mut opener, NOW_S, Some(A)), Err(Refusal::Unproven(_))));
        // Whose clock is wrong would not be taken with an echo either: it is not asked for one.
        for peer in [Some(B), None] {
            assert_eq!(open(&mut opener, NOW_S - CLOCK_TOLERANCE_S - 1, peer), foreign(Foreign::Clock));
            assert_eq!(open(&mut opener, NOW_S + CLOCK_TOLERANCE_S + 1, peer), foreign(Foreign::Clock));
        }
        assert_eq!(opener.boots(), 0);
        assert!(open(&mut opener, NOW_S - CLOCK_TOLERANCE_S, Some(B)).is_ok());
        // Once it is known, its clock does not matter.
        assert!(open(&mut opener, 1, Some(B)).is_ok());
        // A frame that comes back to its maker is not a peer's.
        let mut own = Opener::new("crema", A);
        assert_eq!(open(&mut own, NOW_S, Some(A)), foreign(Foreign::Replay));
    }

    #[test]
    fn what_a_known_boot_sent_to_another_is_not_taken() {
        let (ring, mut sealer, mut opener) = pair();
        let own = sealer.seal(Some(&ring), NOW_S, Some(B), b"x");
        assert!(opener.open(Some(&ring), NOW_S, &own).is_ok());
        for peer in [Some(BootId([7; 16])), None] {
            let other = sealer.seal(Some(&ring), NOW_S, peer, b"x");
            assert!(matches!(opener.open(Some(&ring), NOW_S, &other), Err(Refusal::Unproven(_))));
            assert_eq!(opener.open(Some(&ring), NOW_S, &other), foreign(Foreign::Replay), "it is answered once");
        }
        assert!(opener.open(Some(&ring), NOW_S, &sealer.seal(Some(&ring), NOW_S, Some(B), b"x")).is_ok());
    }

    #[test]
    fn a_capture_shows_nobody_to_a_restarted_observer() {
        let (ring, mut sealer, mut opener) = pair();
        let capture: Vec<_> = (0..100).map(|_| sealer.seal(Some(&ring), NOW_S, Some(B), b"x")).collect();
        for frame in &capture {
            assert!(opener.open(Some(&ring), NOW_S, frame).is_ok());
        }
        // Within the same second, so that no clock helps.
        let mut restarted = Opener::new("crema", BootId([4; 16]));
        for frame in &capture {
            assert!(matches!(restarted.open(Some(&ring), NOW_S, frame), Err(Refusal::Unproven(_))));
        }
        assert_eq!(restarted.boots(), 0);
    }

    /// Against a set of all that was admitted, in random order with repetitions.
    #[test]
    fn windows_admit_each_counter_once() {
        let mut rng = Rng::from_clock();
        for _ in 0..100 {
            let first = rng.below(5_000);
            let mut window = Window::new(first, 0);
            let mut admitted = std::collections::HashSet::from([first]);
            let mut highest = first;
            let spread = 1 + rng.below(3_000);
            for _ in 0..2_000 {
                let counter = (highest + 1 + rng.below(8)).saturating_sub(rng.below(spread));
                let expected = counter > first && !admitted.contains(&counter) && counter + WINDOW_COUNTERS > highest;
                assert_eq!(window.admit(counter, 0), expected, "{counter} after {highest}, first {first}");
                if expected {
                    admitted.insert(counter);
                    highest = highest.max(counter);
                }
            }
        }
        let mut window = Window::new(0, 0);
        assert!(window.admit(u64::MAX, 0) && !window.admit(u64::MAX, 0) && window.admit(u64::MAX - 1, 0));
    }

    #[test]
    fn boots_are_bounded_and_only_the_key_makes_one_forgotten() {
        let ring = KeyRing::new(key(1));
        let mut opener = Opener::new("crema", B);
        let mut boot = 0_u32;
        let mut newcomer = |now_s: u64| {
            boot += 1;
            let mut id = [9; 16];
            id[..4].copy_from_slice(&boot.to_be_bytes());
            Sealer::new("crema", BootId(id)).seal(Some(&ring), now_s, Some(B), b"x")
        };
        let first = newcomer(NOW_S);
        assert!(opener.open(Some(&ring), NOW_S, &first).is_ok());
        for i in 1..MAX_BOOTS as u64 {
            assert!(opener.open(Some(&ring), NOW_S + 1, &newcomer(NOW_S + 1 + i % 2)).is_ok());
        }
        assert_eq!(opener.boots(), MAX_BOOTS);
        // Full of young ones: the oldest goes, but its frames are not taken again.
        assert!(opener.open(Some(&ring), NOW_S + 2, &newcomer(NOW_S + 2)).is_ok());
        assert_eq!(opener.boots(), MAX_BOOTS);
        assert_eq!(opener.open(Some(&ring), NOW_S + 2, &first), foreign(Foreign::Replay));
        assert_eq!(opener.open(Some(&ring), NOW_S + 2, &newcomer(NOW_S)), foreign(Foreign::Replay));
        let silent = Sealer::new("crema", BootId([8; 16])).seal(Some(&ring), NOW_S, None, b"x");
        assert_eq!(opener.open(Some(&ring), NOW_S + 2, &silent), foreign(Foreign::Replay), "no echo would mend it");
        // Old ones go by themselves.
        let later = NOW_S + CLOCK_TOLERANCE_S + 10;
        assert!(opener.open(Some(&ring), later, &newcomer(later)).is_ok());
        assert_eq!(opener.boots(), 1);
    }

    /// Random and mutated frames: nothing panics and nothing is taken. `CREMA_FUZZ` sets their number.
    #[test]
    fn random_and_mutated_frames_are_refused() {
        let mut rng = Rng::from_clock();
        let (ring, mut sealer, mut opener) = pair();
        for i in 0..crate::testing::fuzz_count() {
            let body: Vec<u8> = (0..rng.below(60)).map(|_| rng.next() as u8).collect();
            let mut frame = sealer.seal(Some(&ring), NOW_S, Some(B), &body);
            if i % 3 == 0 {
                frame = (0..rng.below(150)).map(|_| rng.next() as u8).collect();
                if let Some(version) = frame.first_mut().filter(|_| i % 2 == 0) {
                    *version = VERSION_SEALED;
                }
            } else if i % 3 == 1 {
                let at = rng.below(frame.len() as u64) as usize;
                frame[at] ^= 1 + rng.below(255) as u8;
            } else {
                frame.truncate(rng.below(frame.len() as u64) as usize);
            }
            assert!(opener.open(Some(&ring), NOW_S, &frame).is_err());
            // Whether a plain one is taken is a matter of its content; it must not panic.
            let _ = opener.open(None, NOW_S, &frame);
        }
        assert_eq!(opener.boots(), 0);
    }
}
