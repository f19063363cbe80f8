//! Histories as JSON lines, one operation a line: what clients asked, when, and what became of it. `tests/HISTORIES.md` is
//! the contract; outside checkers rely on it.
//!
//! ```text
//!   simulator: Record ---> Operation -> write -> lines -> Reader -> Operation -> records() -> Record -> the checks
//!   real clients ---------^
//! ```

use crate::sim::model::{Command, Ended, Half, Record};
use crema_core::{Epoch, OpError, Reply};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::io::{self, BufRead, Read, Write};

/// Longest line in bytes, line end excluded. A list of our workloads grows to some kilobytes; a file that is no history
/// must not fill the memory before that is noticed.
pub const MAX_LINE_BYTES: usize = 4 * 1024 * 1024;

/// Bytes of a value: a JSON string where they are UTF-8, else `{"hex": "00ff…"}`. Never both, so nothing is ambiguous.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text(pub Vec<u8>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum TextForm {
    Plain(String),
    Escaped { hex: String },
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(plain) => s.serialize_str(plain),
            Err(_) => {
                let hex = self.0.iter().map(|b| format!("{b:02x}")).collect();
                TextForm::Escaped { hex }.serialize(s)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let hex = match TextForm::deserialize(d)? {
            TextForm::Plain(text) => return Ok(Text(text.into_bytes())),
            TextForm::Escaped { hex } => hex,
        };
        let digits: Option<Vec<u8>> = hex.bytes().map(|b| char::from(b).to_digit(16).map(|d| d as u8)).collect();
        match digits {
            Some(d) if d.len().is_multiple_of(2) => Ok(Text(d.chunks(2).map(|d| d[0] << 4 | d[1]).collect())),
            _ => Err(serde::de::Error::custom("hex takes an even number of hexadecimal digits")),
        }
    }
}

/// How an operation ended, as far as its client can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Executed once, between call and return. A reply of the server that says no (`nil`, an error) is an answer too.
    Ok,
    /// Certainly not executed, neither then nor later.
    Fail,
    /// Executed once at any time after the call, or never.
    Unknown,
}

/// The answer of the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done.
    Ok,
    /// Nothing there, or the condition did not hold.
    Nil,
    /// A number.
    Int(i64),
    /// Bytes.
    Bulk(Text),
    /// The operation was refused by the state it met, with this text (without a leading `ERR `).
    Error(String),
    /// Answers of a request with several operations, in order.
    Array(Vec<Answer>),
}

/// Errors an answer may carry; their texts are those of the RESP server.
const ERRORS: [OpError; 9] = [
    OpError::NotInteger,
    OpError::Overflow,
    OpError::NotFloat,
    OpError::NotFinite,
    OpError::TooLong,
    OpError::InvalidExpire,
    OpError::WrongSlot { epoch: Epoch(0) },
    OpError::ReplyTooLarge,
    OpError::OutOfMemory,
];

impl From<&Reply> for Answer {
    fn from(reply: &Reply) -> Self {
        match reply {
            Reply::Ok => Answer::Ok,
            Reply::Nil => Answer::Nil,
            Reply::Int(n) => Answer::Int(*n),
            Reply::Bulk(v) => Answer::Bulk(Text(v.to_vec())),
            Reply::Error(e) => Answer::Error(e.to_string()),
            Reply::Array(all) => Answer::Array(all.iter().map(Answer::from).collect()),
            // No operation of a history has such an answer; a reader will refuse it.
            other @ (Reply::Type(_) | Reply::Scan { .. }) => Answer::Error(format!("unexpected answer {other:?}")),
        }
    }
}

impl Answer {
    /// The answer as the checks know it. The error is a text that no operation answers.
    pub fn reply(&self) -> Result<Reply, String> {
        Ok(match self {
            Answer::Ok => Reply::Ok,
            Answer::Nil => Reply::Nil,
            Answer::Int(n) => Reply::Int(*n),
            Answer::Bulk(v) => Reply::Bulk(v.0.clone().into()),
            Answer::Error(text) => {
                let known = ERRORS.iter().find(|e| e.to_string() == *text);
                Reply::Error(*known.ok_or(format!("no operation answers the error {text:?}"))?)
            }
            Answer::Array(all) => Reply::Array(all.iter().map(Answer::reply).collect::<Result<_, _>>()?),
        })
    }
}

/// One operation of a history: one line.
///
/// Built by [`Operation::open`] when it is sent, and finished by [`Operation::answered`] or [`Operation::refused`]; left
/// alone, its outcome stays unknown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Who asked. Operations of one client may overlap, and promise no order among each other.
    pub client: u64,
    /// When it was sent, in nanoseconds of one clock that all clients share, from any beginning.
    pub call: u64,
    /// When its end was known, likewise; `None` while it is open, and where it was never known.
    pub ret: Option<u64>,
    /// What was asked, by its name in `tests/HISTORIES.md`.
    pub op: String,
    /// The key, or the name of the pair.
    pub key: String,
    /// What was written, of operations that write a value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<Text>,
    /// The value that must be there, of `compare_and_set`; without one there must be none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<Text>,
    /// Lifetime of the value in milliseconds, of `set_px`; greatest age, of `get_bounded`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub px: Option<u64>,
    /// How it ended.
    pub outcome: Outcome,
    /// The answer, if and only if the outcome is ok.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<Answer>,
}

impl Operation {
    /// An operation that was sent at `call` and has not ended.
    pub fn open(client: u64, call: u64, key: &str, command: &Command) -> Self {
        let (op, value, px) = match command {
            Command::Get => ("get", None, None),
            Command::GetRelaxed { max_age_ms: Some(ms) } => ("get_bounded", None, Some(*ms)),
            Command::GetRelaxed { max_age_ms: None } => ("get_local", None, None),
            Command::Set(v) => ("set", Some(v), None),
            Command::SetNx(v) => ("set_nx", Some(v), None),
            Command::CompareAndSet { value, .. } => ("compare_and_set", Some(value), None),
            Command::Incr => ("incr", None, None),
            Command::Append(v) => ("append", Some(v), None),
            Command::Del => ("del", None, None),
            Command::SetPx { value, px } => ("set_px", Some(value), Some(*px)),
            Command::PairSet(v) => ("pair_set", Some(v), None),
            Command::PairGet => ("pair_get", None, None),
            Command::PairHalf(Half::A) => ("pair_get_a", None, None),
            Command::PairHalf(Half::B) => ("pair_get_b", None, None),
        };
        let expected = match command {
            Command::CompareAndSet { expected, .. } => expected.clone().map(Text),
            _ => None,
        };
        Operation {
            client,
            call,
            ret: None,
            op: op.into(),
            key: key.into(),
            value: value.cloned().map(Text),
            expected,
            px,
            outcome: Outcome::Unknown,
            reply: None,
        }
    }

    /// The server answered.
    pub fn answered(mut self, ret: u64, reply: &Reply) -> Self {
        (self.ret, self.outcome, self.reply) = (Some(ret), Outcome::Ok, Some(reply.into()));
        self
    }

    /// The server, or whatever stood before it, said that it was not and will not be executed.
    pub fn refused(mut self, ret: u64) -> Self {
        (self.ret, self.outcome) = (Some(ret), Outcome::Fail);
        self
    }

    /// What was asked. The error says what of the line contradicts the contract.
    pub fn command(&self) -> Result<Command, String> {
        let value = || self.value.as_ref().map(|v| v.0.clone()).ok_or(format!("{} needs a value", self.op));
        let command = match self.op.as_str() {
            "get" => Command::Get,
            "get_bounded" => Command::GetRelaxed { max_age_ms: Some(self.px.ok_or("get_bounded needs px")?) },
            "get_local" => Command::GetRelaxed { max_age_ms: None },
            "set" => Command::Set(value()?),
            "set_nx" => Command::SetNx(value()?),
            "compare_and_set" => {
                Command::CompareAndSet { expected: self.expected.as_ref().map(|v| v.0.clone()), value: value()? }
            }
            "incr" => Command::Incr,
            "append" => Command::Append(value()?),
            "del" => Command::Del,
            "set_px" => {
                let px = self.px.filter(|px| *px > 0).ok_or("set_px needs px, at least 1")?;
                Command::SetPx { value: value()?, px }
            }
            "pair_set" => Command::PairSet(value()?),
            "pair_get" => Command::PairGet,
            "pair_get_a" => Command::PairHalf(Half::A),
            "pair_get_b" => Command::PairHalf(Half::B),
            other => return Err(format!("unknown op {other:?}")),
        };
        let plain = Operation::open(self.client, self.call, &self.key, &command);
        if (&plain.value, &plain.expected, plain.px) != (&self.value, &self.expected, self.px) {
            return Err(format!("{} with a value, an expected one or px that it does not take", self.op));
        }
        Ok(command)
    }

    fn ended(&self) -> Result<Ended, String> {
        if self.ret.is_some_and(|ret| ret < self.call) {
            return Err("it returned before it was called".into());
        }
        match (self.outcome, &self.reply, self.ret) {
            (Outcome::Ok, Some(reply), Some(_)) => Ok(Ended::Replied(reply.reply()?)),
            (Outcome::Ok, ..) => Err("outcome ok needs ret and reply".into()),
            (_, Some(_), _) => Err("only outcome ok has a reply".into()),
            (Outcome::Fail, None, Some(_)) => Ok(Ended::NotApplied),
            (Outcome::Fail, None, None) => Err("outcome fail needs ret".into()),
            (Outcome::Unknown, None, _) => Ok(Ended::Unknown),
        }
    }

    /// Whether the line keeps the contract. The error says where it does not.
    pub fn validate(&self) -> Result<(), String> {
        self.command()?;
        self.ended().map(|_| ())
    }
}

impl From<&Record> for Operation {
    fn from(r: &Record) -> Self {
        let open = Operation::open(r.conn, r.call_ns, &r.key, &r.command);
        match &r.ended {
            Some(Ended::Replied(reply)) => open.answered(r.ret_ns, reply),
            Some(Ended::NotApplied) => open.refused(r.ret_ns),
            Some(Ended::Unknown) | None => open,
        }
    }
}

/// The operations as the checks take them, in order of their calls (of the lines, where calls are of one time).
///
/// Order stamps come from the times. At one and the same time calls stand before returns: what may have overlapped did.
pub fn records(operations: &[Operation]) -> Result<Vec<Record>, String> {
    let mut ends: Vec<(u64, bool, usize)> = Vec::with_capacity(2 * operations.len());
    let mut made = Vec::with_capacity(operations.len());
    for (i, o) in operations.iter().enumerate() {
        let told = |e| format!("operation {} ({} {}): {e}", i + 1, o.op, o.key);
        let (command, ended) = (o.command().map_err(told)?, o.ended().map_err(told)?);
        let ret_ns = o.ret.unwrap_or(0);
        ends.push((o.call, false, i));
        if ended != Ended::Unknown {
            ends.push((ret_ns, true, i));
        }
        let (key, conn) = (o.key.clone(), o.client);
        made.push(Record { key, conn, command, call: 0, ret: 0, call_ns: o.call, ret_ns, ended: Some(ended) });
    }
    ends.sort_unstable();
    for (stamp, (_, is_end, i)) in (1..).zip(ends) {
        *(if is_end { &mut made[i].ret } else { &mut made[i].call }) = stamp;
    }
    made.sort_by_key(|r| r.call);
    Ok(made)
}

/// Writes a history, a line each.
pub fn write(out: &mut impl Write, operations: impl IntoIterator<Item = Operation>) -> io::Result<()> {
    for operation in operations {
        serde_json::to_writer(&mut *out, &operation)?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

/// Why a history cannot be read. Each names the line, counted from 1.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be read.
    #[error("line {line}: {error}")]
    Io {
        /// The line.
        line: u64,
        /// Why.
        error: io::Error,
    },
    /// The line is longer than [`MAX_LINE_BYTES`].
    #[error("line {line}: longer than {MAX_LINE_BYTES} bytes")]
    TooLong {
        /// The line.
        line: u64,
    },
    /// The line is no operation as the contract has it. A last line without its end was probably cut off.
    #[error("line {line}: {why}")]
    Malformed {
        /// The line.
        line: u64,
        /// What is wrong with it.
        why: String,
    },
}

/// Reads a history line by line; empty lines are skipped. Ends after the first error.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    line: u64,
    buffer: Vec<u8>,
    done: bool,
}

impl<R: BufRead> Reader<R> {
    /// Reads from the beginning of `input`.
    pub fn new(input: R) -> Self {
        Reader { input, line: 0, buffer: Vec::new(), done: false }
    }

    fn next_operation(&mut self) -> Result<Option<Operation>, ReadError> {
        loop {
            self.line += 1;
            let line = self.line;
            self.buffer.clear();
            // One byte more than allowed, and one for the end of the line.
            let mut bounded = (&mut self.input).take(MAX_LINE_BYTES as u64 + 2);
            let read = bounded.read_until(b'\n', &mut self.buffer).map_err(|error| ReadError::Io { line, error })?;
            if read == 0 {
                return Ok(None);
            }
            let text = self.buffer.strip_suffix(b"\n").unwrap_or(&self.buffer);
            if text.len() > MAX_LINE_BYTES {
                return Err(ReadError::TooLong { line });
            }
            if text.trim_ascii().is_empty() {
                continue;
            }
            let malformed = |why: String| ReadError::Malformed { line, why };
            let operation: Operation = serde_json::from_slice(text).map_err(|e| malformed(e.to_string()))?;
            operation.validate().map_err(malformed)?;
            return Ok(Some(operation));
        }
    }
}

impl<R: BufRead> Iterator for Reader<R> {
    type Item = Result<Operation, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.next_operation().transpose();
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(operations: &[Operation]) -> String {
        let mut out = Vec::new();
        write(&mut out, operations.iter().cloned()).expect("memory takes it");
        String::from_utf8(out).expect("JSON is UTF-8")
    }
    fn read(text: &str) -> Result<Vec<Operation>, ReadError> {
        Reader::new(text.as_bytes()).collect()
    }
    fn error(text: &str) -> String {
        read(text).expect_err("not a history").to_string()
    }

    /// Lines of `tests/HISTORIES.md`: what stands there is read, and written in just that form.
    #[test]
    fn the_examples_of_the_contract_are_true() {
        let contract = include_str!("../HISTORIES.md");
        let (_, rest) = contract.split_once("```json\n").expect("an example");
        let (example, _) = rest.split_once("```").expect("its end");
        let operations = read(example).expect("a valid history");
        assert!(operations.len() >= 10);
        assert_eq!(lines(&operations), example);
        assert!(records(&operations).is_ok());
        // Every operation there is, is in the table.
        for op in operations.iter().map(|o| &o.op) {
            assert!(contract.contains(&format!("| `{op}` |")), "{op}");
        }
    }

    #[test]
    fn every_command_and_every_reply_comes_back_as_it_went() {
        let v = || b"v1,".to_vec();
        let binary = || vec![0, 0xff, b'"', b'\n'];
        let commands = [
            (Command::Get, Reply::Bulk(binary().into())),
            (Command::Get, Reply::Bulk(vec![].into())),
            (Command::Get, Reply::Bulk("{\"hex\":\"00\"} \u{1f980}\u{0}".as_bytes().into())),
            (Command::Set(v()), Reply::Ok),
            (Command::Set(binary()), Reply::Ok),
            (Command::SetNx(v()), Reply::Nil),
            (Command::CompareAndSet { expected: None, value: v() }, Reply::Int(1)),
            (Command::CompareAndSet { expected: Some(binary()), value: v() }, Reply::Int(0)),
            (Command::Incr, Reply::Int(i64::MIN)),
            (Command::Incr, Reply::Error(OpError::NotInteger)),
            (Command::Append(v()), Reply::Error(OpError::TooLong)),
            (Command::Del, Reply::Int(1)),
            (Command::SetPx { value: v(), px: 250 }, Reply::Ok),
            (Command::PairSet(v()), Reply::Array(vec![Reply::Ok, Reply::Ok])),
            (Command::PairGet, Reply::Array(vec![Reply::Nil, Reply::Bulk(v().into())])),
            (Command::PairHalf(Half::A), Reply::Nil),
            (Command::PairHalf(Half::B), Reply::Nil),
        ];
        let mut history = Vec::new();
        for (i, (command, reply)) in (1u64..).zip(commands) {
            for ended in [Some(Ended::Replied(reply)), Some(Ended::NotApplied), Some(Ended::Unknown), None] {
                let ret_ns = if matches!(ended, None | Some(Ended::Unknown)) { 0 } else { i * 100 + 5 };
                let (key, command) = (format!("k{i}"), command.clone());
                history.push(Record { key, conn: i, command, call: 0, ret: 0, call_ns: i * 100, ret_ns, ended });
            }
        }
        let text = lines(&history.iter().map(Operation::from).collect::<Vec<_>>());
        assert_eq!(text.lines().count(), history.len());
        let back = records(&read(&text).expect("what was written is valid")).expect("and known");
        assert_eq!(back.len(), history.len());
        for (a, b) in history.iter().zip(&back) {
            let ended = a.ended.clone().unwrap_or(Ended::Unknown);
            assert_eq!((&a.key, a.conn, &a.command, Some(ended)), (&b.key, b.conn, &b.command, b.ended.clone()));
            assert_eq!((a.call_ns, a.ret_ns), (b.call_ns, b.ret_ns));
        }
    }

    #[test]
    fn stamps_follow_the_times_and_ties_overlap() {
        let get = |call, ret| Operation::open(1, call, "k", &Command::Get).answered(ret, &Reply::Nil);
        let made = records(&[get(20, 30), get(0, 10), get(10, 20)]).expect("valid");
        assert_eq!(made.iter().map(|r| r.call_ns).collect::<Vec<_>>(), [0, 10, 20]);
        assert!(made[1].call < made[0].ret, "the call at 10 overlaps the return at 10");
        assert!(made[2].call > made[0].ret, "what was over at 10 was over at 20");
        assert!(made.iter().all(|r| r.call < r.ret));
    }

    #[test]
    fn errors_name_the_line_and_say_what_is_wrong() {
        let good = r#"{"client":1,"call":5,"ret":9,"op":"get","key":"k","outcome":"ok","reply":"nil"}"#;
        assert_eq!(read(&format!("{good}\n\n{good}")).expect("empty lines pass").len(), 2);
        assert!(read(&good.replace("\"op\"", "\"note\":1,\"op\"")).is_ok(), "fields of others are ignored");
        for (from, to, says) in [
            ("\"ret\":9", "\"ret\":4", "line 2: it returned before it was called"),
            ("\"ret\":9", "\"ret\":null", "outcome ok needs ret and reply"),
            (",\"reply\":\"nil\"", "", "outcome ok needs ret and reply"),
            ("\"ok\"", "\"unknown\"", "only outcome ok has a reply"),
            ("\"ok\"", "\"fail\"", "only outcome ok has a reply"),
            ("\"ok\"", "\"maybe\"", "unknown variant"),
            ("\"get\"", "\"getx\"", "unknown op \"getx\""),
            ("\"get\"", "\"set\"", "set needs a value"),
            ("\"get\"", "\"set_px\",\"value\":\"v\",\"px\":0", "set_px needs px"),
            ("\"get\"", "\"get\",\"value\":\"v\"", "with a value, an expected one or px that it does not take"),
            ("\"get\"", "\"set\",\"value\":{\"hex\":\"0g\"}", "hexadecimal"),
            ("\"nil\"", "{\"error\":\"gone\"}", "no operation answers the error"),
            ("\"call\":5,", "", "missing field `call`"),
            ("}", "", "line 2: EOF while parsing"),
        ] {
            let bad = error(&format!("{good}\n{}\n{good}\n", good.replacen(from, to, 1)));
            assert!(bad.contains(says) && bad.starts_with("line 2: "), "{bad}");
        }
    }

    #[test]
    fn a_line_without_end_is_refused_before_it_fills_the_memory() {
        let mut reader = Reader::new(io::BufReader::new(io::repeat(b'x')));
        assert!(matches!(reader.next(), Some(Err(ReadError::TooLong { line: 1 }))));
        assert!(reader.buffer.len() <= MAX_LINE_BYTES + 2);
        assert!(reader.next().is_none(), "nothing follows an error");
        // The longest one passes.
        let good = r#"{"client":1,"call":5,"ret":null,"op":"get","key":"k","outcome":"unknown"}"#;
        let padded = format!("{}{good}\n", " ".repeat(MAX_LINE_BYTES - good.len()));
        assert_eq!(read(&padded).expect("just as long as allowed").len(), 1);
        assert!(matches!(read(&format!(" {padded}")), Err(ReadError::TooLong { .. })));
    }
}
