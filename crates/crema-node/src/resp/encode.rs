//! From replies to bytes, in RESP2 or RESP3.
//!
//! Everything appends to a buffer of the connection. The protocols differ in nulls, maps, sets and verbatim strings;
//! what a command answers is written once, for both.

use crate::resp::ops::Fmt;
use bytes::{BufMut, BytesMut};
use crema_core::reply::ValueType;
use crema_core::{OpError, Reply};

/// The protocol that a connection has chosen with HELLO.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Proto {
    /// RESP2, the default.
    #[default]
    Resp2,
    /// RESP3.
    Resp3,
}

/// Appends `prefix`, a decimal number and a line end.
fn line(out: &mut BytesMut, prefix: u8, n: i64) {
    // Sign and 19 digits, prefix and line end.
    let mut text = [0u8; 24];
    let mut at = text.len() - 2;
    text[at..].copy_from_slice(b"\r\n");
    let mut rest = n.unsigned_abs();
    loop {
        at -= 1;
        text[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if n < 0 {
        at -= 1;
        text[at] = b'-';
    }
    at -= 1;
    text[at] = prefix;
    out.put_slice(&text[at..]);
}

/// `+text`. The text is ours and has no line ends.
pub fn simple(out: &mut BytesMut, text: &str) {
    out.put_u8(b'+');
    out.put_slice(text.as_bytes());
    out.put_slice(b"\r\n");
}

/// Appends `head`, the text with its line ends turned into blanks, so that a client's own bytes in a message cannot end
/// it, and a line end.
fn message(out: &mut BytesMut, head: &[u8], text: &[u8]) {
    out.reserve(head.len() + text.len() + 2);
    out.put_slice(head);
    let from = out.len();
    out.put_slice(text);
    for byte in &mut out[from..] {
        if matches!(byte, b'\r' | b'\n') {
            *byte = b' ';
        }
    }
    out.put_slice(b"\r\n");
}

/// `-text`, beginning with its code; line ends become blanks.
pub fn error(out: &mut BytesMut, text: &[u8]) {
    message(out, b"-", text);
}

/// `-ERR text`; line ends become blanks.
pub fn err(out: &mut BytesMut, text: &[u8]) {
    message(out, b"-ERR ", text);
}

/// An integer.
pub fn int(out: &mut BytesMut, n: i64) {
    line(out, b':', n);
}

/// A string of bytes.
pub fn bulk(out: &mut BytesMut, bytes: &[u8]) {
    out.reserve(bytes.len() + 16);
    line(out, b'$', bytes.len() as i64);
    out.put_slice(bytes);
    out.put_slice(b"\r\n");
}

/// A text for people to read: a verbatim string in RESP3.
pub fn verbatim(out: &mut BytesMut, proto: Proto, text: &[u8]) {
    match proto {
        Proto::Resp2 => bulk(out, text),
        Proto::Resp3 => {
            line(out, b'=', text.len() as i64 + 4);
            out.put_slice(b"txt:");
            out.put_slice(text);
            out.put_slice(b"\r\n");
        }
    }
}

/// Nothing there.
pub fn nil(out: &mut BytesMut, proto: Proto) {
    out.put_slice(match proto {
        Proto::Resp2 => b"$-1\r\n".as_slice(),
        Proto::Resp3 => b"_\r\n",
    });
}

/// The head of an array of `n` elements.
pub fn array(out: &mut BytesMut, n: usize) {
    line(out, b'*', n as i64);
}

/// The head of a map of `n` pairs; in RESP2 an array of twice as many elements.
pub fn map(out: &mut BytesMut, proto: Proto, n: usize) {
    match proto {
        Proto::Resp2 => line(out, b'*', 2 * n as i64),
        Proto::Resp3 => line(out, b'%', n as i64),
    }
}

/// The head of a set of `n` elements; in RESP2 an array.
pub fn set(out: &mut BytesMut, proto: Proto, n: usize) {
    line(out, if proto == Proto::Resp3 { b'~' } else { b'*' }, n as i64);
}

/// A floating-point number: its own type in RESP3, a string in RESP2.
pub fn double(out: &mut BytesMut, proto: Proto, v: f64) {
    let text = match v {
        v if v.is_nan() => "nan".to_owned(),
        v if v.is_infinite() => if v > 0.0 { "inf" } else { "-inf" }.to_owned(),
        v => v.to_string(),
    };
    match proto {
        Proto::Resp2 => bulk(out, text.as_bytes()),
        Proto::Resp3 => {
            out.put_u8(b',');
            out.put_slice(text.as_bytes());
            out.put_slice(b"\r\n");
        }
    }
}

/// The answer to one operation as command `name` words it.
pub fn reply(out: &mut BytesMut, proto: Proto, reply: &Reply, fmt: Fmt, name: &str) {
    match (reply, fmt) {
        (Reply::Error(e), _) => op_error(out, e, name),
        (Reply::Ok, Fmt::OneIfDone) => int(out, 1),
        (Reply::Nil, Fmt::OneIfDone) => int(out, 0),
        // To the nearest second; the negative answers are no times.
        (Reply::Int(ms), Fmt::Seconds) if *ms >= 0 => int(out, ms.saturating_add(500) / 1000),
        (Reply::Scan { next, keys }, fmt) => {
            let cursor = match (next, fmt) {
                (Some(next), _) => *next,
                (None, Fmt::Scan { then }) => then,
                (None, _) => 0,
            };
            array(out, 2);
            bulk(out, cursor.to_string().as_bytes());
            array(out, keys.len());
            for key in keys {
                bulk(out, key);
            }
        }
        (Reply::Ok, _) => out.put_slice(b"+OK\r\n"),
        (Reply::Nil, _) => nil(out, proto),
        (Reply::Int(n), _) => int(out, *n),
        (Reply::Bulk(bytes), _) => bulk(out, bytes),
        (Reply::Type(ValueType::None), _) => simple(out, "none"),
        (Reply::Type(ValueType::String), _) => simple(out, "string"),
        (Reply::Array(replies), fmt) => {
            array(out, replies.len());
            for r in replies {
                // One level: the answers of one request never nest.
                match r {
                    Reply::Array(_) => err(out, b"internal error: nested answers"),
                    r => self::reply(out, proto, r, fmt, name),
                }
            }
        }
    }
}

/// An operation's error as command `name` words it.
pub fn op_error(out: &mut BytesMut, e: &OpError, name: &str) {
    match e {
        OpError::InvalidExpire => err(out, format!("invalid expire time in '{name}' command").as_bytes()),
        OpError::WrongSlot { .. } => error(out, MOVING.as_bytes()),
        OpError::OutOfMemory => error(out, format!("OOM {e}").as_bytes()),
        e => err(out, e.to_string().as_bytes()),
    }
}

/// The slot has no owner that would answer just now.
pub const MOVING: &str = "TRYAGAIN the slot is moving between shards; the command was not executed";

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use crema_core::Epoch;

    fn written(f: impl FnOnce(&mut BytesMut)) -> String {
        let mut out = BytesMut::from("before ");
        f(&mut out);
        String::from_utf8(out.to_vec()).unwrap().strip_prefix("before ").unwrap().to_owned()
    }

    fn both(r: &Reply, fmt: Fmt) -> [String; 2] {
        [Proto::Resp2, Proto::Resp3].map(|p| written(|out| reply(out, p, r, fmt, "set")))
    }

    #[test]
    fn numbers() {
        for n in [0, 7, -7, 10, 1_000_000, i64::MAX, i64::MIN] {
            assert_eq!(written(|o| int(o, n)), format!(":{n}\r\n"));
        }
        assert_eq!(written(|o| double(o, Proto::Resp3, 1.5)), ",1.5\r\n");
        assert_eq!(written(|o| double(o, Proto::Resp3, f64::NEG_INFINITY)), ",-inf\r\n");
        assert_eq!(written(|o| double(o, Proto::Resp3, f64::NAN)), ",nan\r\n");
        assert_eq!(written(|o| double(o, Proto::Resp2, 10.0)), "$2\r\n10\r\n");
    }

    #[test]
    fn errors_stay_on_their_line() {
        assert_eq!(written(|o| err(o, b"a\r\nb\n-c")), "-ERR a  b -c\r\n");
        assert_eq!(written(|o| error(o, b"CODE x\ry")), "-CODE x y\r\n");
    }

    #[test]
    fn both_protocols() {
        assert_eq!(both(&Reply::Nil, Fmt::Plain), ["$-1\r\n", "_\r\n"]);
        assert_eq!(both(&Reply::Ok, Fmt::Plain), ["+OK\r\n", "+OK\r\n"]);
        assert_eq!(
            both(&Reply::Bulk(Bytes::from_static(b"a\r\n")), Fmt::Plain),
            ["$3\r\na\r\n\r\n", "$3\r\na\r\n\r\n"]
        );
        assert_eq!(both(&Reply::Type(ValueType::None), Fmt::Plain)[0], "+none\r\n");
        assert_eq!(both(&Reply::Type(ValueType::String), Fmt::Plain)[0], "+string\r\n");
        let two = Reply::Array(vec![Reply::Int(-1), Reply::Nil]);
        assert_eq!(both(&two, Fmt::Plain), ["*2\r\n:-1\r\n$-1\r\n", "*2\r\n:-1\r\n_\r\n"]);
        assert_eq!([Proto::Resp2, Proto::Resp3].map(|p| written(|o| map(o, p, 3))), ["*6\r\n", "%3\r\n"]);
        assert_eq!([Proto::Resp2, Proto::Resp3].map(|p| written(|o| set(o, p, 3))), ["*3\r\n", "~3\r\n"]);
        let info = [Proto::Resp2, Proto::Resp3].map(|p| written(|o| verbatim(o, p, b"ab")));
        assert_eq!(info, ["$2\r\nab\r\n", "=6\r\ntxt:ab\r\n"]);
    }

    #[test]
    fn forms_of_single_commands() {
        assert_eq!(both(&Reply::Ok, Fmt::OneIfDone)[0], ":1\r\n");
        assert_eq!(both(&Reply::Nil, Fmt::OneIfDone), [":0\r\n", ":0\r\n"]);
        // PTTL to TTL as Redis rounds it.
        for (ms, s) in [(-2, -2), (-1, -1), (0, 0), (499, 0), (500, 1), (1499, 1), (99_999, 100)] {
            assert_eq!(both(&Reply::Int(ms), Fmt::Seconds)[0], format!(":{s}\r\n"));
        }
        let scan = |next| Reply::Scan { next, keys: vec![Bytes::from_static(b"k")] };
        assert_eq!(both(&scan(Some(5)), Fmt::Scan { then: 9 })[0], "*2\r\n$1\r\n5\r\n*1\r\n$1\r\nk\r\n");
        assert_eq!(both(&scan(None), Fmt::Scan { then: 9 })[0], "*2\r\n$1\r\n9\r\n*1\r\n$1\r\nk\r\n");
    }

    #[test]
    fn operation_errors() {
        let text = |e| both(&Reply::Error(e), Fmt::Plain)[0].clone();
        assert_eq!(text(OpError::NotInteger), "-ERR value is not an integer or out of range\r\n");
        assert_eq!(text(OpError::Overflow), "-ERR increment or decrement would overflow\r\n");
        assert_eq!(text(OpError::InvalidExpire), "-ERR invalid expire time in 'set' command\r\n");
        assert!(text(OpError::WrongSlot { epoch: Epoch(1) }).starts_with("-TRYAGAIN "));
        assert_eq!(text(OpError::OutOfMemory), "-OOM command not allowed when used memory > 'maxmemory'.\r\n");
    }
}
