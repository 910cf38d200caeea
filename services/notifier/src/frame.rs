//! One event, rendered once for everybody.

use std::sync::{Arc, OnceLock};

use axum::extract::ws::Utf8Bytes;
use bytes::{BufMut, Bytes, BytesMut};

use crate::entry::About;

/// An event of the log with its renderings, each made when the first subscriber needs it.
#[derive(Debug)]
pub struct Frame {
    /// Its sequence in the log.
    pub seq: u64,
    /// What it is about.
    pub about: About,
    /// The CloudEvent as the log has it: valid UTF-8.
    pub bytes: Bytes,
    sse: OnceLock<Bytes>,
    ws: OnceLock<Utf8Bytes>,
}

impl Frame {
    /// A frame of an entry that was read as an event.
    #[must_use]
    pub fn new(seq: u64, about: About, bytes: Bytes) -> Arc<Self> {
        Arc::new(Self { seq, about, bytes, sse: OnceLock::new(), ws: OnceLock::new() })
    }

    /// As a server-sent event, with the empty line that ends it.
    pub fn sse(&self) -> &Bytes {
        self.sse.get_or_init(|| {
            let mut out = BytesMut::with_capacity(self.bytes.len() + 64);
            out.put_slice(format!("id: {}\nevent: {}\n", self.seq, self.about.kind).as_bytes());
            // Rollcall's own events are one line. Foreign white space between tokens may hold line ends, each of
            // which would end the field.
            for line in self.bytes.split(|b| matches!(b, b'\n' | b'\r')) {
                out.put_slice(b"data: ");
                out.put_slice(line);
                out.put_u8(b'\n');
            }
            out.put_u8(b'\n');
            out.freeze()
        })
    }

    /// As the text of a WebSocket message.
    pub fn ws(&self) -> &Utf8Bytes {
        self.ws.get_or_init(|| {
            let mut out = BytesMut::with_capacity(self.bytes.len() + 32);
            self.write_json(&mut out);
            // Checked when the entry was read; text that is none would end the connection of everybody.
            Utf8Bytes::try_from(out.freeze()).unwrap_or_default()
        })
    }

    /// Appends `{"seq":n,"event":{...}}`, the event's bytes untouched.
    pub fn write_json(&self, out: &mut BytesMut) {
        write_entry(out, self.seq, &self.bytes);
    }

    /// Bytes it takes in memory, at most, roughly: the event thrice and its bookkeeping.
    #[must_use]
    pub fn weight(&self) -> usize {
        self.bytes.len() * 3 + 512
    }
}

/// Appends `{"seq":n,"event":{...}}`, the event's bytes untouched.
pub fn write_entry(out: &mut BytesMut, seq: u64, event: &[u8]) {
    out.put_slice(format!("{{\"seq\":{seq},\"event\":").as_bytes());
    out.put_slice(event);
    out.put_u8(b'}');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    fn frame(bytes: &[u8]) -> Arc<Frame> {
        let about = About::of(&samples::recovered("e1", "a1", 1));
        Frame::new(7, about, Bytes::copy_from_slice(bytes))
    }

    #[test]
    fn an_event_is_embedded_untouched() {
        let event = samples::recovered("e1", "a1", 1).encode();
        let text = String::from_utf8(event.clone()).unwrap();
        let frame = frame(&event);
        assert_eq!(frame.ws().as_str(), format!("{{\"seq\":7,\"event\":{text}}}"));
        let sse = std::str::from_utf8(frame.sse()).unwrap();
        assert_eq!(sse, format!("id: 7\nevent: execution.recovered\ndata: {text}\n\n"));
    }

    #[test]
    fn line_ends_in_foreign_json_stay_inside_the_field() {
        let frame = frame(b"{\"a\":1,\r\n\"b\":2}");
        let sse = std::str::from_utf8(frame.sse()).unwrap();
        assert_eq!(sse.lines().filter(|l| l.starts_with("data: ")).count(), 3);
        let joined: String = sse.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
        assert_eq!(joined, "{\"a\":1,\"b\":2}");
    }

    #[test]
    fn it_is_rendered_once() {
        let frame = frame(b"{}");
        assert_eq!(frame.sse().as_ptr(), frame.sse().as_ptr());
        assert_eq!(frame.ws().as_ptr(), frame.ws().as_ptr());
    }
}
