//! Messages of JSON-RPC in an answer: alone, several at once, or as a stream of events.

use bytes::{Bytes, BytesMut};
use serde_json::Value;

/// The events of a stream, as its bytes come in. Whoever reads it bounds how many bytes that are.
#[derive(Debug, Default)]
pub(super) struct Events {
    /// Lines that were not taken yet.
    lines: BytesMut,
    /// How many bytes of them hold no end of a line.
    unended: usize,
    /// Data of the event that is not complete yet.
    data: Vec<u8>,
}

impl Events {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.lines.extend_from_slice(bytes);
    }

    /// The data of the next complete event that has any. Events without are there to keep a stream open, or to name
    /// where it can be resumed.
    pub(super) fn next(&mut self) -> Option<Bytes> {
        while let Some(end) = self.lines.iter().skip(self.unended).position(|byte| *byte == b'\n') {
            let line = self.lines.split_to(self.unended + end + 1);
            self.unended = 0;
            let line = line.strip_suffix(b"\n").unwrap_or(&line);
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if let Some(data) = line.strip_prefix(b"data:") {
                self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
                self.data.push(b'\n');
            } else if line.is_empty() {
                let data = std::mem::take(&mut self.data);
                if !data.trim_ascii().is_empty() {
                    return Some(Bytes::from(data));
                }
            }
        }
        self.unended = self.lines.len();
        None
    }
}

/// The answer to our request `id` among what was sent. Not requests and notifications of the other side, and no answers
/// to others. An error without an id is ours too: whoever could not read the request does not know its id.
pub(super) fn reply_to(id: u32, sent: &[u8]) -> Option<Value> {
    let ours = |message: &Value| {
        message["method"].is_null()
            && (message["id"] == id || message["id"].is_null() && message["error"].is_object())
    };
    match serde_json::from_slice(sent).ok()? {
        Value::Array(all) => all.into_iter().find(ours),
        message => Some(message).filter(ours),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(chunks: &[&str]) -> Vec<String> {
        let (mut events, mut found) = (Events::default(), Vec::new());
        for chunk in chunks {
            events.push(chunk.as_bytes());
            while let Some(data) = events.next() {
                found.push(String::from_utf8(data.to_vec()).unwrap());
            }
        }
        found
    }

    #[test]
    fn events_are_what_has_data_however_it_is_cut() {
        let stream = "id: 1\r\nretry: 5\r\ndata:\r\n\r\n: note\n\nevent: message\ndata: {\"a\":\ndata:1}\n\ndata: \u{e9}\n\ndata: cut";
        let wanted = ["{\"a\":\n1}\n", "\u{e9}\n"];
        assert_eq!(events(&[stream]), wanted);
        let bytes: Vec<String> = stream.chars().map(String::from).collect();
        assert_eq!(events(&bytes.iter().map(String::as_str).collect::<Vec<_>>()), wanted);
    }

    #[test]
    fn only_the_answer_to_our_request_is_ours() {
        for (sent, ours) in [
            (r#"{"id":1,"result":{}}"#, true),
            (r#"{"id":1,"error":{"code":-1}}"#, true),
            (r#"{"id":null,"error":{"code":-32700}}"#, true),
            (r#"[{"method":"notifications/message"},{"id":1,"result":{}}]"#, true),
            (r#"{"id":2,"result":{}}"#, false),
            (r#"{"id":"1","result":{}}"#, false),
            (r#"{"id":1,"method":"ping"}"#, false),
            (r#"{"method":"notifications/progress","params":{}}"#, false),
            (r#"{"result":{}}"#, false),
            ("[]", false),
            ("7", false),
            ("", false),
        ] {
            assert_eq!(reply_to(1, sent.as_bytes()).is_some(), ours, "{sent}");
        }
    }
}
