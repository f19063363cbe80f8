//! A minimal blocking RESP2 client, written against the protocol and not against the server under test.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest line, longest bulk string, most elements and deepest nesting accepted from a server.
const MAX_LINE: u64 = 64 * 1024;
const MAX_BULK: usize = 16 * 1024 * 1024;
const MAX_ELEMENTS: usize = 1024 * 1024;
const MAX_DEPTH: usize = 8;

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// `+text`
    Simple(String),
    /// `-text`
    Error(String),
    /// `:number`
    Int(i64),
    /// `$length bytes`
    Bulk(Vec<u8>),
    /// A missing value.
    Nil,
    /// `*length elements`
    Array(Vec<Value>),
}

impl Value {
    /// A bulk string with this text.
    pub fn bulk(text: impl AsRef<[u8]>) -> Value {
        Value::Bulk(text.as_ref().to_vec())
    }
    /// `+OK`
    pub fn ok() -> Value {
        Value::Simple("OK".into())
    }
}

/// Appends `args` as one command.
pub fn encode(args: &[&[u8]], into: &mut Vec<u8>) {
    into.extend_from_slice(format!("*{}\r\n", args.len()).as_bytes());
    for arg in args {
        into.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
        into.extend_from_slice(arg);
        into.extend_from_slice(b"\r\n");
    }
}

/// One connection.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    /// Connects. Each later read or write fails after `timeout` without progress.
    ///
    /// # Errors
    ///
    /// If nobody listens.
    pub fn connect(addr: SocketAddr, timeout: Duration) -> io::Result<Client> {
        let stream = TcpStream::connect_timeout(&addr, timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Ok(Client { stream: BufReader::new(stream) })
    }

    /// Sends one command, given as words without spaces in them, and reads its reply.
    ///
    /// # Errors
    ///
    /// Of the connection; an error reply is a [`Value::Error`].
    pub fn call(&mut self, command: &str) -> io::Result<Value> {
        let args: Vec<&[u8]> = command.split_ascii_whitespace().map(str::as_bytes).collect();
        let mut bytes = Vec::new();
        encode(&args, &mut bytes);
        self.send(&bytes)?;
        self.read()
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    ///
    /// Of the connection.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// Reads one reply.
    ///
    /// # Errors
    ///
    /// Of the connection, `UnexpectedEof` at its end, and `InvalidData` if the bytes are no RESP2 reply.
    pub fn read(&mut self) -> io::Result<Value> {
        decode(&mut self.stream, 0)
    }

    /// Reads until the server closes; whether it did so before the timeout. At most 1 MiB is read.
    pub fn closes(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.by_ref().take(1 << 20).read_to_end(&mut rest) {
            Ok(read) => read < 1 << 20,
            Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

fn decode(from: &mut impl BufRead, depth: usize) -> io::Result<Value> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
    let mut line = Vec::new();
    from.take(MAX_LINE).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let Some(line) = line.strip_suffix(b"\r\n") else {
        return Err(bad("a reply line without its end"));
    };
    let Some((kind, text)) = line.split_first() else {
        return Err(bad("an empty reply line"));
    };
    let text = String::from_utf8_lossy(text).into_owned();
    let number = || text.parse::<i64>().map_err(|_| bad("not a number where RESP wants one"));
    let length = |most: usize| match number()? {
        -1 => Ok(None),
        n => match usize::try_from(n) {
            Ok(n) if n <= most => Ok(Some(n)),
            _ => Err(bad("a length out of range")),
        },
    };
    match kind {
        b'+' => Ok(Value::Simple(text)),
        b'-' => Ok(Value::Error(text)),
        b':' => Ok(Value::Int(number()?)),
        b'$' => {
            let Some(length) = length(MAX_BULK)? else {
                return Ok(Value::Nil);
            };
            let mut bytes = vec![0; length + 2];
            from.read_exact(&mut bytes)?;
            if bytes.split_off(length) != b"\r\n" {
                return Err(bad("a bulk string without its end"));
            }
            Ok(Value::Bulk(bytes))
        }
        b'*' if depth < MAX_DEPTH => {
            let Some(length) = length(MAX_ELEMENTS)? else {
                return Ok(Value::Nil);
            };
            (0..length).map(|_| decode(from, depth + 1)).collect::<io::Result<_>>().map(Value::Array)
        }
        _ => Err(bad("not a RESP2 reply")),
    }
}

/// A server of GET, SET, APPEND and INCR in a thread, which a test can make misbehave.
#[cfg(test)]
pub(crate) mod fake {
    use super::*;
    use std::collections::BTreeMap;
    use std::net::{Ipv4Addr, TcpListener};

    /// Serves `connections` connections one after another, over one store. `tamper` sees each command as words; what it
    /// returns is answered in place of executing it, nothing closes the connection.
    pub(crate) fn serve(
        connections: usize,
        mut tamper: impl FnMut(&str) -> Option<Option<String>> + Send + 'static,
    ) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let addr = listener.local_addr().expect("its address");
        std::thread::spawn(move || {
            let mut store = BTreeMap::<Vec<u8>, Vec<u8>>::new();
            for _ in 0..connections {
                let (stream, _) = listener.accept().expect("a client");
                let mut writer = stream.try_clone().expect("a second handle");
                let mut reader = BufReader::new(stream);
                while let Ok(Value::Array(words)) = decode(&mut reader, 0) {
                    let words: Vec<Vec<u8>> =
                        words.into_iter().map(|w| if let Value::Bulk(b) = w { b } else { vec![] }).collect();
                    let line = String::from_utf8_lossy(&words.join(&b' ')).into_owned();
                    let reply = match tamper(&line) {
                        Some(None) => break,
                        Some(Some(reply)) => reply,
                        None => execute(&mut store, &words),
                    };
                    if writer.write_all(reply.as_bytes()).is_err() {
                        break;
                    }
                }
            }
        });
        addr
    }

    fn execute(store: &mut BTreeMap<Vec<u8>, Vec<u8>>, words: &[Vec<u8>]) -> String {
        match words[0].as_slice() {
            b"SET" => {
                store.insert(words[1].clone(), words[2].clone());
                "+OK\r\n".into()
            }
            b"INCR" => {
                let old =
                    store.get(&words[1]).map_or(0, |v| String::from_utf8_lossy(v).parse::<u64>().expect("a counter"));
                store.insert(words[1].clone(), (old + 1).to_string().into_bytes());
                format!(":{}\r\n", old + 1)
            }
            b"APPEND" => {
                let value = store.entry(words[1].clone()).or_default();
                value.extend_from_slice(&words[2]);
                format!(":{}\r\n", value.len())
            }
            _ => match store.get(&words[1]) {
                Some(v) => format!("${}\r\n{}\r\n", v.len(), String::from_utf8_lossy(v)),
                None => "$-1\r\n".into(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_reply_is_read() {
        let bytes = b"+OK\r\n-ERR no\r\n:-7\r\n$3\r\na\r\n\r\n$-1\r\n*2\r\n:1\r\n$0\r\n\r\n*-1\r\n";
        let mut from = &bytes[..];
        let mut next = || decode(&mut from, 0).unwrap();
        assert_eq!(next(), Value::ok());
        assert_eq!(next(), Value::Error("ERR no".into()));
        assert_eq!(next(), Value::Int(-7));
        assert_eq!(next(), Value::bulk("a\r\n"));
        assert_eq!(next(), Value::Nil);
        assert_eq!(next(), Value::Array(vec![Value::Int(1), Value::bulk("")]));
        assert_eq!(next(), Value::Nil);
        assert_eq!(decode(&mut from, 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn wrong_replies_are_errors() {
        for bad in ["+OK\n", "$2\r\nabc\r\n", "$x\r\n", "*99999999999\r\n", "?\r\n", "\r\n", "$-2\r\n"] {
            assert_eq!(decode(&mut bad.as_bytes(), 0).unwrap_err().kind(), io::ErrorKind::InvalidData, "{bad:?}");
        }
        let deep = "*1\r\n".repeat(100);
        assert!(decode(&mut deep.as_bytes(), 0).is_err());
    }

    #[test]
    fn a_command_is_an_array_of_bulk_strings() {
        let mut bytes = Vec::new();
        encode(&[b"GET", b"k\r\n"], &mut bytes);
        assert_eq!(bytes, b"*2\r\n$3\r\nGET\r\n$3\r\nk\r\n\r\n");
    }
}
