//! From bytes to commands: RESP arrays of bulk strings, and inline commands as a person types them.
//!
//! ```text
//!   read buffer  [*2 $3 GET $1 k][*3 $3 SET ...        poll() -> a command stands at the front of the buffer
//!                 ^ranges of its arguments              args() -> borrowed from the buffer, nothing is copied
//!                                                       finish() -> drops it; the next one is at the front
//! ```
//!
//! The decoder remembers where it stopped, so bytes are looked at once however they are cut into reads. Every length is
//! compared with its limit before anything is allocated for it, and nothing is ever reserved on a client's word: the
//! buffer grows with the bytes that have arrived. Connections that have not authenticated get small limits.

use bytes::{Buf, BytesMut};
use crema_core::limits::{MAX_REQUEST_BYTES, MAX_VALUE_BYTES};
use std::borrow::Cow;

/// Longest argument in bytes.
pub const MAX_BULK_BYTES: usize = MAX_VALUE_BYTES;
/// Longest command in bytes, headers included.
pub const MAX_FRAME_BYTES: usize = MAX_REQUEST_BYTES;
/// Most arguments of one command, its name included.
pub const MAX_ARGS: usize = 64 * 1024;
/// Longest inline command, and longest header line, in bytes.
pub const MAX_LINE_BYTES: usize = 64 * 1024;
/// Most arguments before authentication.
pub const PRE_AUTH_ARGS: usize = 10;
/// Longest argument before authentication, in bytes.
pub const PRE_AUTH_BULK_BYTES: usize = 16 * 1024;
/// Argument positions kept between commands; a larger list is freed after its command.
const KEPT_RANGES: usize = 1024;

/// Bytes that are no RESP, or over a limit. The stream cannot be followed any further: answer and close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// An inline command longer than [`MAX_LINE_BYTES`].
    InlineTooBig,
    /// Quotes of an inline command that do not close, or text right behind a closing one.
    UnbalancedQuotes,
    /// The line of an array's length has no end within [`MAX_LINE_BYTES`].
    CountTooBig,
    /// The line of an argument's length has no end within [`MAX_LINE_BYTES`].
    BulkCountTooBig,
    /// An array's length that is no number or above [`MAX_ARGS`].
    BadCount,
    /// More than [`PRE_AUTH_ARGS`] arguments before authentication.
    CountBeforeAuth,
    /// Something else where an argument should begin.
    NotBulk(u8),
    /// An argument's length that is no number, negative or above [`MAX_BULK_BYTES`].
    BadBulk,
    /// An argument longer than [`PRE_AUTH_BULK_BYTES`] before authentication.
    BulkBeforeAuth,
    /// No line end after an argument. Redis skips two bytes without a look; but whoever sends a wrong length there would
    /// have values executed as commands.
    NoBulkEnd,
    /// A command longer than [`MAX_FRAME_BYTES`].
    FrameTooBig,
}

impl ProtocolError {
    /// The error's text as Redis words it, without the leading code.
    pub fn text(&self) -> Cow<'static, [u8]> {
        Cow::Borrowed(match self {
            ProtocolError::InlineTooBig => b"Protocol error: too big inline request".as_slice(),
            ProtocolError::UnbalancedQuotes => b"Protocol error: unbalanced quotes in request",
            ProtocolError::CountTooBig => b"Protocol error: too big mbulk count string",
            ProtocolError::BulkCountTooBig => b"Protocol error: too big bulk count string",
            ProtocolError::BadCount => b"Protocol error: invalid multibulk length",
            ProtocolError::CountBeforeAuth => b"Protocol error: unauthenticated multibulk length",
            ProtocolError::NotBulk(got) => {
                let mut text = b"Protocol error: expected '$', got '".to_vec();
                text.extend_from_slice(&[*got, b'\'']);
                return Cow::Owned(text);
            }
            ProtocolError::BadBulk => b"Protocol error: invalid bulk length",
            ProtocolError::BulkBeforeAuth => b"Protocol error: unauthenticated bulk length",
            ProtocolError::NoBulkEnd => b"Protocol error: expected CRLF after a bulk string",
            ProtocolError::FrameTooBig => b"Protocol error: too big request",
        })
    }
}

/// The arguments of one command, the name first, borrowed from wherever they lie. Never empty as the decoder gives it.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    bytes: &'a [u8],
    ranges: &'a [(u32, u32)],
}

impl<'a> Args<'a> {
    /// Number of arguments, the name included.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }
    /// Whether there is none, not even a name.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
    /// The argument at `i`; empty beyond the last one, so that no count of a client's can make it panic.
    pub fn get(&self, i: usize) -> &'a [u8] {
        self.ranges.get(i).map_or(&[], |(start, end)| &self.bytes[*start as usize..*end as usize])
    }
    /// The arguments from the one at `from` on.
    pub fn from(&self, from: usize) -> impl ExactSizeIterator<Item = &'a [u8]> + use<'a> {
        let bytes = self.bytes;
        let tail = self.ranges.get(from..).unwrap_or_default();
        tail.iter().map(move |(start, end)| &bytes[*start as usize..*end as usize])
    }
}

/// Arguments kept beyond their read buffer, as MULTI keeps them until EXEC.
#[derive(Clone, Debug)]
pub struct OwnedArgs {
    bytes: Box<[u8]>,
    ranges: Box<[(u32, u32)]>,
}

impl OwnedArgs {
    /// Copies of `args`, whose lengths must add up to less than 4 GiB.
    pub fn new<'a>(args: impl IntoIterator<Item = &'a [u8]>) -> OwnedArgs {
        let (mut bytes, mut ranges) = (Vec::new(), Vec::new());
        for arg in args {
            let start = bytes.len() as u32;
            bytes.extend_from_slice(arg);
            ranges.push((start, bytes.len() as u32));
        }
        OwnedArgs { bytes: bytes.into_boxed_slice(), ranges: ranges.into_boxed_slice() }
    }
    /// The arguments.
    pub fn args(&self) -> Args<'_> {
        Args { bytes: &self.bytes, ranges: &self.ranges }
    }
    /// Bytes that the copy takes.
    pub fn size(&self) -> usize {
        self.bytes.len() + size_of_val(&*self.ranges)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// At the first byte of a command.
    Start,
    /// Within the line of an inline command.
    Inline,
    /// Within the line of an array's length.
    Count,
    /// At the `$` of an argument, or within the line of its length.
    Bulk,
    /// Within an argument of this length.
    Data(usize),
    /// A whole command of this many bytes is at the front.
    Ready(usize),
}

/// The decoder of one connection.
#[derive(Debug)]
pub struct Decoder {
    stage: Stage,
    /// Next byte of the buffer to look at; everything before it is understood.
    pos: usize,
    /// Bytes after `pos` that were searched for a line's end already.
    searched: usize,
    /// Arguments still to come.
    missing: usize,
    ranges: Vec<(u32, u32)>,
    /// Arguments of an inline command, quotes and escapes resolved.
    inline: Vec<u8>,
    is_inline: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder {
            stage: Stage::Start,
            pos: 0,
            searched: 0,
            missing: 0,
            ranges: Vec::new(),
            inline: Vec::new(),
            is_inline: false,
        }
    }
}

impl Decoder {
    /// Whether a whole command is at the front of `buf`; call it again when more bytes have been appended. Empty
    /// commands are skipped, and their bytes dropped. `trusted` lifts the limits of connections that have not
    /// authenticated. After an error the stream must not be decoded any further.
    pub fn poll(&mut self, buf: &mut BytesMut, trusted: bool) -> Result<bool, ProtocolError> {
        loop {
            match self.stage {
                Stage::Ready(_) => return Ok(true),
                Stage::Start => match buf.first() {
                    None => return Ok(false),
                    Some(b'*') => {
                        self.is_inline = false;
                        self.pos = 1;
                        self.stage = Stage::Count;
                    }
                    Some(_) => {
                        self.is_inline = true;
                        self.stage = Stage::Inline;
                    }
                },
                Stage::Inline => {
                    let Some(end) = self.search(buf, b'\n', 0, ProtocolError::InlineTooBig)? else { return Ok(false) };
                    let line = &buf[..end];
                    let line = line.strip_suffix(b"\r").unwrap_or(line);
                    split_inline(line, &mut self.inline, &mut self.ranges).ok_or(ProtocolError::UnbalancedQuotes)?;
                    if self.ranges.is_empty() {
                        self.skip(buf, end + 1);
                    } else {
                        self.stage = Stage::Ready(end + 1);
                    }
                }
                Stage::Count => {
                    let Some(end) = self.search(buf, b'\r', 1, ProtocolError::CountTooBig)? else { return Ok(false) };
                    let count = parse_i64(&buf[self.pos..end]).filter(|_| buf[end + 1] == b'\n');
                    let count = count.filter(|n| *n <= MAX_ARGS as i64).ok_or(ProtocolError::BadCount)?;
                    let Some(count) = usize::try_from(count).ok().filter(|n| *n > 0) else {
                        self.skip(buf, end + 2);
                        continue;
                    };
                    if count > PRE_AUTH_ARGS && !trusted {
                        return Err(ProtocolError::CountBeforeAuth);
                    }
                    self.missing = count;
                    self.pos = end + 2;
                    self.stage = Stage::Bulk;
                }
                Stage::Bulk if self.missing == 0 => self.stage = Stage::Ready(self.pos),
                Stage::Bulk => {
                    match buf.get(self.pos) {
                        None => return Ok(false),
                        Some(b'$') => {}
                        Some(other) => return Err(ProtocolError::NotBulk(*other)),
                    }
                    let Some(end) = self.search(buf, b'\r', 1, ProtocolError::BulkCountTooBig)? else {
                        return Ok(false);
                    };
                    let len = parse_i64(&buf[self.pos + 1..end]).filter(|_| buf[end + 1] == b'\n');
                    let len = len.and_then(|n| usize::try_from(n).ok()).filter(|n| *n <= MAX_BULK_BYTES);
                    let len = len.ok_or(ProtocolError::BadBulk)?;
                    if len > PRE_AUTH_BULK_BYTES && !trusted {
                        return Err(ProtocolError::BulkBeforeAuth);
                    }
                    self.pos = end + 2;
                    if self.pos + len + 2 > MAX_FRAME_BYTES {
                        return Err(ProtocolError::FrameTooBig);
                    }
                    self.stage = Stage::Data(len);
                }
                Stage::Data(len) => {
                    let end = self.pos + len;
                    let Some(line_end) = buf.get(end..end + 2) else { return Ok(false) };
                    if line_end != b"\r\n" {
                        return Err(ProtocolError::NoBulkEnd);
                    }
                    // Both are below the frame's limit, hence fit.
                    self.ranges.push((self.pos as u32, end as u32));
                    self.pos = end + 2;
                    self.missing -= 1;
                    self.stage = Stage::Bulk;
                }
            }
        }
    }

    /// The arguments of the command at the front of `buf`; none unless [`Decoder::poll`] has just said that one is there.
    pub fn args<'a>(&'a self, buf: &'a BytesMut) -> Args<'a> {
        match self.stage {
            Stage::Ready(_) if self.is_inline => Args { bytes: &self.inline, ranges: &self.ranges },
            Stage::Ready(_) => Args { bytes: buf, ranges: &self.ranges },
            _ => Args { bytes: &[], ranges: &[] },
        }
    }

    /// Bytes of the command at the front; 0 if none is there.
    pub fn frame_len(&self) -> usize {
        if let Stage::Ready(len) = self.stage { len } else { 0 }
    }

    /// Drops the command at the front of `buf`, if one is there.
    pub fn finish(&mut self, buf: &mut BytesMut) {
        if let Stage::Ready(len) = self.stage {
            self.skip(buf, len);
        }
    }

    /// How many bytes beyond the `buffered` ones are known to be needed for the argument at hand; at most
    /// [`MAX_BULK_BYTES`] and its line end. A hint for the size of the next read.
    pub fn wanted(&self, buffered: usize) -> usize {
        match self.stage {
            Stage::Data(len) => (self.pos + len + 2).saturating_sub(buffered),
            _ => 0,
        }
    }

    fn skip(&mut self, buf: &mut BytesMut, len: usize) {
        buf.advance(len);
        self.stage = Stage::Start;
        self.pos = 0;
        self.searched = 0;
        self.inline.clear();
        self.ranges.clear();
        self.ranges.shrink_to(KEPT_RANGES);
        self.inline.shrink_to(KEPT_RANGES);
    }

    /// Where the next `wanted` is, with `behind` more bytes present after it. Goes on where the last search ended.
    fn search(
        &mut self,
        buf: &[u8],
        wanted: u8,
        behind: usize,
        too_big: ProtocolError,
    ) -> Result<Option<usize>, ProtocolError> {
        let from = self.pos + self.searched;
        let unseen = buf.get(from..).unwrap_or_default();
        let end = unseen.iter().position(|b| *b == wanted).map(|i| from + i);
        let length = end.unwrap_or(buf.len()) - self.pos;
        if length > MAX_LINE_BYTES {
            return Err(too_big);
        }
        match end {
            Some(end) if end + behind < buf.len() => {
                self.searched = 0;
                Ok(Some(end))
            }
            // The found byte itself is looked at again when what follows it has come.
            _ => {
                self.searched = length;
                Ok(None)
            }
        }
    }
}

/// A 64-bit integer as Redis reads one: digits with at most a minus before them; no plus, no space, no leading zero, and
/// no minus zero.
pub fn parse_i64(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, text),
    };
    match digits {
        [b'0'] if !negative => return Some(0),
        [b'1'..=b'9', ..] => {}
        _ => return None,
    }
    let mut value: i64 = 0;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        // Counted downward: the range has one more negative number than positive ones.
        value = value.checked_mul(10)?.checked_sub(i64::from(digit - b'0'))?;
    }
    if negative { Some(value) } else { value.checked_neg() }
}

/// Splits a line as a shell would: blanks separate, `"..."` knows `\n \r \t \b \a \xHH` and `\` before anything else,
/// `'...'` knows `\'`. `None` if a quote does not close or has text right behind it.
fn split_inline(line: &[u8], out: &mut Vec<u8>, ranges: &mut Vec<(u32, u32)>) -> Option<()> {
    let blank = |b: &u8| matches!(*b, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c);
    let mut rest = line;
    loop {
        let skip = rest.iter().position(|b| !blank(b)).unwrap_or(rest.len());
        rest = &rest[skip..];
        if rest.is_empty() {
            return Some(());
        }
        let start = out.len() as u32;
        let mut quote = None;
        loop {
            match (quote, rest) {
                (None, []) => break,
                (None, [b, ..]) if blank(b) => break,
                (None, [q @ (b'"' | b'\''), tail @ ..]) => {
                    quote = Some(*q);
                    rest = tail;
                }
                (Some(_), []) => return None,
                (Some(b'"'), [b'\\', b'x', high, low, tail @ ..])
                    if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
                {
                    out.push(hex(*high) << 4 | hex(*low));
                    rest = tail;
                }
                (Some(b'"'), [b'\\', escaped, tail @ ..]) => {
                    out.push(match escaped {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'b' => 0x08,
                        b'a' => 0x07,
                        other => *other,
                    });
                    rest = tail;
                }
                (Some(b'\''), [b'\\', b'\'', tail @ ..]) => {
                    out.push(b'\'');
                    rest = tail;
                }
                (Some(q), [b, tail @ ..]) if *b == q => {
                    rest = tail;
                    if !tail.first().is_none_or(blank) {
                        return None;
                    }
                    break;
                }
                (_, [b, tail @ ..]) => {
                    out.push(*b);
                    rest = tail;
                }
            }
        }
        ranges.push((start, out.len() as u32));
    }
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit.wrapping_sub(b'A').wrapping_add(10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Decoded = (Vec<Vec<Vec<u8>>>, Option<ProtocolError>);

    /// Everything that comes out of `stream` when it arrives cut at `cuts`.
    fn decode(stream: &[u8], cuts: &[usize], trusted: bool) -> Decoded {
        let (mut buf, mut d, mut out, mut from) = (BytesMut::new(), Decoder::default(), Vec::new(), 0);
        for cut in cuts.iter().copied().chain([stream.len()]) {
            buf.extend_from_slice(&stream[from..cut]);
            from = cut;
            loop {
                match d.poll(&mut buf, trusted) {
                    Ok(false) => break,
                    Ok(true) => {
                        out.push(d.args(&buf).from(0).map(<[u8]>::to_vec).collect());
                        assert!(d.frame_len() > 0);
                        d.finish(&mut buf);
                    }
                    Err(e) => return (out, Some(e)),
                }
            }
        }
        (out, None)
    }

    fn words(commands: &[&[&str]]) -> Vec<Vec<Vec<u8>>> {
        commands.iter().map(|c| c.iter().map(|a| a.as_bytes().to_vec()).collect()).collect()
    }

    const STREAM: &[u8] = b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n*-1\r\n*0\r\n\r\nPING \"a b\\x41\"\r\n\n*3\r\n$3\r\nSET\r\n$0\r\n\r\n$5\r\na\r\nb\n\r\nECHO 'it\\'s' x\n  \r\n*1\r\n$4\r\nQUIT\r\n";

    #[test]
    fn every_cut_of_a_pipelined_stream_gives_the_same_commands() {
        let wanted =
            words(&[&["GET", "k"], &["PING", "a bA"], &["SET", "", "a\r\nb\n"], &["ECHO", "it's", "x"], &["QUIT"]]);
        assert_eq!(decode(STREAM, &[], false), (wanted.clone(), None));
        for first in 0..=STREAM.len() {
            for second in first..=STREAM.len() {
                assert_eq!(decode(STREAM, &[first, second], false), (wanted.clone(), None), "{first} {second}");
            }
        }
        let every: Vec<usize> = (0..STREAM.len()).collect();
        assert_eq!(decode(STREAM, &every, false), (wanted, None));
    }

    #[test]
    fn errors_are_worded_as_redis_words_them() {
        // Each checked against Redis 7.0.15, the last two excepted.
        let ones = b"1".repeat(70_000);
        let long = |head: &[u8]| [head, &ones].concat();
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (b"*99999999999\r\n".to_vec(), "invalid multibulk length"),
            (b"*x\r\n".to_vec(), "invalid multibulk length"),
            (b"*+1\r\n$4\r\nPING\r\n".to_vec(), "invalid multibulk length"),
            (b"*1\r\n#4\r\nPING\r\n".to_vec(), "expected '$', got '#'"),
            (b"*1\r\n\x01\r\n".to_vec(), "expected '$', got '\x01'"),
            (b"*1\r\n$x\r\n".to_vec(), "invalid bulk length"),
            (b"*1\r\n$-1\r\n".to_vec(), "invalid bulk length"),
            (b"*1\r\n$99999999999\r\n".to_vec(), "invalid bulk length"),
            (long(b""), "too big inline request"),
            (long(b"*"), "too big mbulk count string"),
            (long(b"*1\r\n$"), "too big bulk count string"),
            (b"ECHO \"a b\r\n".to_vec(), "unbalanced quotes in request"),
            (b"ECHO \"a\"b\r\n".to_vec(), "unbalanced quotes in request"),
            (b"ECHO 'a\r\n".to_vec(), "unbalanced quotes in request"),
            (b"*1\r\n$4\r\nPINGxx".to_vec(), "expected CRLF after a bulk string"),
            (b"*65537\r\n".to_vec(), "invalid multibulk length"),
        ];
        for (stream, text) in cases {
            let shown = String::from_utf8_lossy(&stream[..stream.len().min(40)]).into_owned();
            for step in [1, 7, 64, stream.len()] {
                let cuts: Vec<usize> = (0..stream.len()).step_by(step).collect();
                let (commands, error) = decode(&stream, &cuts, true);
                assert!(commands.is_empty());
                let error = error.unwrap_or_else(|| panic!("{shown}"));
                assert_eq!(error.text(), format!("Protocol error: {text}").as_bytes(), "{shown} in steps of {step}");
            }
        }
    }

    #[test]
    fn before_authentication_the_limits_are_small() {
        assert_eq!(decode(b"*11\r\n", &[], false).1, Some(ProtocolError::CountBeforeAuth));
        assert_eq!(decode(b"*10\r\n$16385\r\n", &[], false).1, Some(ProtocolError::BulkBeforeAuth));
        assert_eq!(decode(b"*10\r\n$16384\r\n", &[], false).1, None);
        assert_eq!(decode(b"*11\r\n$16385\r\n", &[], true).1, None);
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_by_its_header() {
        let (mut buf, mut d) = (BytesMut::new(), Decoder::default());
        buf.extend_from_slice(b"*3\r\n");
        for _ in 0..2 {
            buf.extend_from_slice(format!("${}\r\n", MAX_BULK_BYTES - 100).as_bytes());
            assert_eq!(d.poll(&mut buf, true), Ok(false));
            assert_eq!(d.wanted(buf.len()), MAX_BULK_BYTES - 98);
            buf.resize(buf.len() + MAX_BULK_BYTES - 100, b'x');
            buf.extend_from_slice(b"\r\n");
            assert_eq!(d.poll(&mut buf, true), Ok(false));
        }
        buf.extend_from_slice(b"$200\r\n");
        assert_eq!(d.poll(&mut buf, true), Err(ProtocolError::FrameTooBig));
    }

    /// A large argument in small reads: work per read must not depend on what lies in the buffer already.
    #[test]
    fn a_large_argument_is_not_searched_again_with_each_read() {
        let (mut buf, mut d) = (BytesMut::new(), Decoder::default());
        buf.extend_from_slice(format!("*2\r\n$4\r\nECHO\r\n${MAX_BULK_BYTES}\r\n").as_bytes());
        let chunk = [b'\r'; 512];
        for _ in 0..MAX_BULK_BYTES / chunk.len() {
            assert_eq!(d.poll(&mut buf, true), Ok(false));
            assert_eq!((d.searched, d.stage), (0, Stage::Data(MAX_BULK_BYTES)));
            buf.extend_from_slice(&chunk);
        }
        buf.extend_from_slice(b"\r\n");
        assert_eq!(d.poll(&mut buf, true), Ok(true));
        assert_eq!(d.args(&buf).get(1).len(), MAX_BULK_BYTES);
        // A line that comes byte by byte is searched byte by byte.
        d.finish(&mut buf);
        for n in 0..MAX_LINE_BYTES {
            buf.extend_from_slice(b"a");
            assert_eq!(d.poll(&mut buf, true), Ok(false));
            assert_eq!(d.searched, n + 1);
        }
    }

    /// xorshift64*: enough for noise, and a failure is repeated by its seed.
    fn noise(seed: &mut u64) -> u64 {
        *seed ^= *seed >> 12;
        *seed ^= *seed << 25;
        *seed ^= *seed >> 27;
        seed.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    #[test]
    fn noise_never_panics_and_keeps_memory_bounded() {
        let alphabet = b"*$0123456789-\r\n\"'\\x GETa\x00\xff";
        let mut seed = 0x9e37_79b9_7f4a_7c15;
        eprintln!("seed {seed:#x}");
        for round in 0..3000 {
            let trusted = round % 2 == 0;
            let mut stream: Vec<u8> = if round % 3 == 0 { STREAM.to_vec() } else { Vec::new() };
            for _ in 0..noise(&mut seed) % 120 {
                let byte = alphabet[(noise(&mut seed) % alphabet.len() as u64) as usize];
                let at = (noise(&mut seed) % (stream.len() as u64 + 1)) as usize;
                if noise(&mut seed).is_multiple_of(2) { stream.insert(at, byte) } else { stream.push(byte) }
            }
            let whole = decode(&stream, &[], trusted);
            let every: Vec<usize> = (0..stream.len()).collect();
            assert_eq!(decode(&stream, &every, trusted), whole, "round {round}");
            let argument_bytes: usize = whole.0.iter().flatten().map(Vec::len).sum();
            assert!(argument_bytes <= stream.len());
        }
    }

    #[test]
    fn announced_lengths_reserve_nothing() {
        let (mut buf, mut d) = (BytesMut::new(), Decoder::default());
        buf.extend_from_slice(b"*65536\r\n$8388608\r\n");
        let before = buf.capacity();
        assert_eq!(d.poll(&mut buf, true), Ok(false));
        assert_eq!((buf.capacity(), d.ranges.capacity()), (before, 0));
    }

    #[test]
    fn large_argument_lists_are_not_kept() {
        let (mut buf, mut d) = (BytesMut::new(), Decoder::default());
        buf.extend_from_slice(b"*65536\r\n");
        buf.extend_from_slice(&b"$1\r\na\r\n".repeat(65536));
        assert_eq!(d.poll(&mut buf, true), Ok(true));
        assert_eq!(d.args(&buf).len(), 65536);
        d.finish(&mut buf);
        assert!(d.ranges.capacity() <= KEPT_RANGES);
        assert_eq!(d.poll(&mut buf, true), Ok(false));
    }

    #[test]
    fn integers_are_read_as_strictly_as_redis_reads_them() {
        for n in [0, 1, -1, 10, i64::MAX, i64::MIN] {
            assert_eq!(parse_i64(n.to_string().as_bytes()), Some(n));
        }
        for text in
            ["", "-", "+1", " 1", "1 ", "01", "-0", "-01", "1.0", "0x1", "9223372036854775808", "-9223372036854775809"]
        {
            assert_eq!(parse_i64(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn owned_arguments_are_the_same() {
        let owned = OwnedArgs::new([b"SET".as_slice(), b"", b"v"]);
        let again = OwnedArgs::new(owned.args().from(0));
        assert_eq!(again.args().from(0).collect::<Vec<_>>(), [b"SET".as_slice(), b"", b"v"]);
        assert_eq!(again.args().get(9), b"");
        assert_eq!(again.args().from(7).len(), 0);
        assert!(!again.args().is_empty() && again.size() >= 4);
    }
}
