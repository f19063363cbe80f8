//! A minimal blocking HTTP/1.1 GET for the admin API.

use super::{Context, Failure, Result};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const MAX_ANSWER_BYTES: u64 = 16 * 1024 * 1024;
const TIMEOUT: Duration = Duration::from_secs(5);

/// Status code and body of `GET path`.
///
/// # Errors
///
/// If nobody answers within 5 s, or not in HTTP.
pub fn get(addr: SocketAddr, path: &str) -> Result<(u16, String)> {
    let what = format!("GET http://{addr}{path}");
    let mut stream = TcpStream::connect_timeout(&addr, TIMEOUT).context(&what)?;
    stream.set_read_timeout(Some(TIMEOUT)).context(&what)?;
    stream.set_write_timeout(Some(TIMEOUT)).context(&what)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n").context(&what)?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer).context(&what)?;
    parse(&String::from_utf8_lossy(&answer)).ok_or_else(|| Failure::new(format!("{what}: no HTTP answer")))
}

/// The body of `GET path` as JSON, whatever the status.
///
/// # Errors
///
/// As [`get`], and if the body is not JSON.
pub fn get_json(addr: SocketAddr, path: &str) -> Result<serde_json::Value> {
    let (_, body) = get(addr, path)?;
    serde_json::from_str(&body).context(format!("GET http://{addr}{path}: {body}"))
}

fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    // The admin API's answers have a length; chunks would need joining.
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    (!chunked).then(|| (status, body.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_body_are_taken_apart() {
        let answer = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(parse(answer), Some((503, "{}".into())));
        assert_eq!(parse("SSH-2.0\r\n\r\n"), None);
        assert_eq!(parse(""), None);
    }
}
