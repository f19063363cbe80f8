//! Counts RESP2 replies in a stream, at the speed of a load generator: nothing is copied out of the read buffer.

use std::io;

/// Longest reply accepted.
const MAX_REPLY_BYTES: usize = 16 * 1024 * 1024;

/// A complete reply, as far as the benchmark cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply<'a> {
    /// `+text`
    Simple(&'a [u8]),
    /// `-text`
    Error(&'a [u8]),
    /// A bulk string.
    Bulk(&'a [u8]),
    /// A missing value.
    Nil,
}

/// The first reply in `bytes` and its length, or `None` while it is incomplete.
///
/// # Errors
///
/// If the bytes are no reply that SET or GET may have.
pub(crate) fn parse(bytes: &[u8]) -> io::Result<Option<(Reply<'_>, usize)>> {
    let bad = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what.to_string()));
    let Some(end) = bytes.iter().position(|&b| b == b'\n') else {
        return if bytes.len() > MAX_REPLY_BYTES { bad("a reply line without end") } else { Ok(None) };
    };
    let Some(line) = bytes[..end].strip_suffix(b"\r") else {
        return bad("a reply line without CR");
    };
    let Some((kind, text)) = line.split_first() else {
        return bad("an empty reply line");
    };
    match kind {
        b'+' => Ok(Some((Reply::Simple(text), end + 1))),
        b'-' => Ok(Some((Reply::Error(text), end + 1))),
        b'$' if text == b"-1" => Ok(Some((Reply::Nil, end + 1))),
        b'$' => {
            let length = std::str::from_utf8(text).ok().and_then(|t| t.parse::<usize>().ok());
            let Some(length) = length.filter(|n| *n <= MAX_REPLY_BYTES) else {
                return bad("a wrong length");
            };
            let total = end + 1 + length + 2;
            match bytes.get(end + 1..total) {
                None => Ok(None),
                Some(body) if body.ends_with(b"\r\n") => Ok(Some((Reply::Bulk(&body[..length]), total))),
                Some(_) => bad("a bulk string without its end"),
            }
        }
        _ => bad("an unexpected kind of reply"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_found_at_any_cut() {
        let stream = b"+OK\r\n$3\r\na\n\n\r\n-ERR no\r\n$-1\r\n$0\r\n\r\n";
        let expected =
            [Reply::Simple(b"OK"), Reply::Bulk(b"a\n\n"), Reply::Error(b"ERR no"), Reply::Nil, Reply::Bulk(b"")];
        let (mut at, mut found) = (0, Vec::new());
        while let Some((reply, used)) = parse(&stream[at..]).unwrap() {
            for cut in 0..used {
                assert_eq!(parse(&stream[at..at + cut]).unwrap(), None, "the reply at {at}, cut at {cut}");
            }
            found.push(reply);
            at += used;
        }
        assert_eq!(found, expected);
        assert_eq!(at, stream.len());
    }

    #[test]
    fn nonsense_is_an_error() {
        for bad in ["+OK\n", "\r\n", "$x\r\n", "$99999999999\r\n", "*1\r\n", "$1\r\nabc\r\n"] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }
}
