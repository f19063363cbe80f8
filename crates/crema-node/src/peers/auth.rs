//! Who may speak at all, where the cluster has keys: a handshake ahead of the handshake.
//!
//! ```text
//!  dialer:    magic "CRMK" | version u16 | key id u32 | nonce 32
//!  acceptor:  magic "CRMK" | version u16 | key id u32 | nonce 32 | mac("acceptor", -)        key id 0: not a key of ours
//!  dialer:    mac("dialer", Hello) 32 | Hello                                                as in `wire`
//!  acceptor:  mac("answer", Answer) 32 | Answer
//!
//!  mac(label, body) = HMAC-SHA-256(key derived for peers, label | both nonces | body)
//! ```
//!
//! Each side proves that it has the key before the other decodes a byte of it. Both nonces are fresh, so that nothing recorded
//! is of any use. What follows on the connection is neither encrypted nor authenticated. So two are out of scope until there is
//! TLS: whoever can change packets on their way, and whoever owns an address that a node still dials, such as that of a pod
//! which is gone. That one can pass the handshake on between two who have the key, and then send frames of its own in the
//! dialer's name, and read those that it passes on.

use super::wire::{HandshakeError, PREAMBLE_BYTES};
use crema_gossip::{ClusterKey, KeyRing};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// First bytes of a connection whose dialer has keys.
pub(super) const KEYED_MAGIC: [u8; 4] = *b"CRMK";
const VERSION: u16 = 1;
const NONCE_BYTES: usize = 32;
/// Length of a proof in bytes.
pub(super) const MAC_BYTES: usize = 32;
/// In the place of a key's id: none that is known here.
const NO_KEY: u32 = 0;
const LABEL: &str = "crema peer 1 handshake";

/// One connection between two that have the same key.
pub(super) struct Session {
    key: [u8; 32],
    nonces: [u8; 2 * NONCE_BYTES],
}

/// Which side, and which message, a proof is for: none is valid for another.
#[derive(Clone, Copy, Debug)]
pub(super) enum Proof {
    Acceptor,
    Dialer,
    Answer,
}

impl Session {
    fn new(key: &ClusterKey, dialer: &[u8; NONCE_BYTES], acceptor: &[u8; NONCE_BYTES]) -> Session {
        let mut nonces = [0; 2 * NONCE_BYTES];
        nonces[..NONCE_BYTES].copy_from_slice(dialer);
        nonces[NONCE_BYTES..].copy_from_slice(acceptor);
        Session { key: key.derive(LABEL), nonces }
    }

    fn hmac(&self, of: Proof, body: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("HMAC takes keys of any length");
        mac.update(&[of as u8]);
        mac.update(&self.nonces);
        mac.update(body);
        mac
    }

    /// The proof that whoever sends `body` has the key.
    pub(super) fn prove(&self, of: Proof, body: &[u8]) -> [u8; MAC_BYTES] {
        self.hmac(of, body).finalize().into_bytes().into()
    }

    /// Judges such a proof, in constant time.
    pub(super) fn check(&self, of: Proof, body: &[u8], mac: &[u8; MAC_BYTES]) -> Result<(), HandshakeError> {
        self.hmac(of, body).verify_slice(mac).map_err(|_| HandshakeError::Keys("its proof of the cluster key is wrong"))
    }
}

fn nonce() -> Result<[u8; NONCE_BYTES], HandshakeError> {
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(|_| HandshakeError::Keys("the system gives no random numbers"))?;
    Ok(nonce)
}

fn opening(id: u32, nonce: &[u8; NONCE_BYTES]) -> Vec<u8> {
    let mut out = KEYED_MAGIC.to_vec();
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&id.to_le_bytes());
    out.extend_from_slice(nonce);
    out
}

/// Reads the other side's opening: the key that it names, and its nonce.
async fn read_opening(stream: &mut TcpStream) -> Result<(u32, [u8; NONCE_BYTES]), HandshakeError> {
    let mut magic = [0; 4];
    stream.read_exact(&mut magic).await?;
    if magic == super::wire::MAGIC {
        return Err(HandshakeError::Keys("it has no cluster key, and this node has one"));
    }
    if magic != KEYED_MAGIC {
        return Err(HandshakeError::Garbage("unknown magic"));
    }
    let version = stream.read_u16_le().await?;
    if version != VERSION {
        return Err(HandshakeError::Version(version));
    }
    let id = stream.read_u32_le().await?;
    let mut nonce = [0; NONCE_BYTES];
    stream.read_exact(&mut nonce).await?;
    Ok((id, nonce))
}

/// A handshake message, behind its proof where there is a session.
pub(super) fn prove(session: Option<&Session>, of: Proof, message: Vec<u8>) -> Vec<u8> {
    let Some(session) = session else { return message };
    // What is proved is what is decoded: all behind the preamble.
    let mut out = session.prove(of, &message[PREAMBLE_BYTES..]).to_vec();
    out.extend_from_slice(&message);
    out
}

/// Reads a proof; its body follows on the stream.
pub(super) async fn read_proof(stream: &mut TcpStream) -> Result<[u8; MAC_BYTES], HandshakeError> {
    let mut mac = [0; MAC_BYTES];
    stream.read_exact(&mut mac).await?;
    Ok(mac)
}

/// The dialer's part. Its time is limited by the caller.
pub(super) async fn dial(stream: &mut TcpStream, ring: &KeyRing) -> Result<Session, HandshakeError> {
    let (key, own) = (ring.primary_key(), nonce()?);
    stream.write_all(&opening(key.id().0, &own)).await?;
    let (id, theirs) = read_opening(stream).await?;
    if id != key.id().0 {
        return Err(HandshakeError::Keys("it has other cluster keys"));
    }
    let session = Session::new(key, &own, &theirs);
    let mac = read_proof(stream).await?;
    session.check(Proof::Acceptor, &[], &mac)?;
    Ok(session)
}

/// The acceptor's part. Its time is limited by the caller.
pub(super) async fn accept(stream: &mut TcpStream, ring: &KeyRing) -> Result<Session, HandshakeError> {
    let (id, theirs) = read_opening(stream).await?;
    let own = nonce()?;
    let Some(key) = ring.keys().find(|key| key.id().0 == id && id != NO_KEY) else {
        stream.write_all(&opening(NO_KEY, &own)).await?;
        return Err(HandshakeError::Keys("it has other cluster keys"));
    };
    let session = Session::new(key, &theirs, &own);
    let mut answer = opening(id, &own);
    answer.extend_from_slice(&session.prove(Proof::Acceptor, &[]));
    stream.write_all(&answer).await?;
    Ok(session)
}
