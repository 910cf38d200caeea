//! What a command writes, kept within bounds, and what it means.

use std::collections::VecDeque;

use rollcall_agent::{Finish, Progress, RESULT_BYTES_MAX};
use serde_json::value::RawValue;
use tokio::io::{AsyncRead, AsyncReadExt};

/// End of stderr that becomes the message of a failure, in bytes.
pub(crate) const STDERR_TAIL_BYTES: usize = 8 * 1024;
/// Bytes read at once.
const CHUNK_BYTES: usize = 16 * 1024;

/// All of stdout up to what a report can hold, and how much there was.
#[derive(Debug, Default)]
pub(crate) struct Whole {
    kept: Vec<u8>,
    bytes: usize,
}

/// The end of stderr, and how much there was.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    kept: VecDeque<u8>,
    bytes: usize,
}

pub(crate) trait Sink {
    fn take(&mut self, bytes: &[u8]);
}

impl Sink for Whole {
    fn take(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len();
        if self.bytes <= RESULT_BYTES_MAX {
            self.kept.extend_from_slice(bytes);
        } else {
            // It can't be a result any more; only its size is worth knowing.
            self.kept = Vec::new();
        }
    }
}

impl Sink for Tail {
    fn take(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len();
        let fresh = &bytes[bytes.len().saturating_sub(STDERR_TAIL_BYTES)..];
        let surplus = (self.kept.len() + fresh.len()).saturating_sub(STDERR_TAIL_BYTES);
        self.kept.drain(..surplus);
        self.kept.extend(fresh);
    }
}

/// Reads to the end, counting lines as progress. Goes on reading what it does not keep, so that the command can go on.
pub(crate) async fn read_into<S: Sink>(mut from: impl AsyncRead + Unpin, sink: &mut S, progress: &Progress) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        // An error is the end too: the other side of a pipe can't be asked again.
        let Ok(n @ 1..) = from.read(&mut chunk).await else { return };
        let lines = chunk[..n].iter().filter(|byte| **byte == b'\n').count();
        if lines > 0 {
            progress.add(lines as u64);
        }
        sink.take(&chunk[..n]);
    }
}

impl Whole {
    /// The result that this is.
    pub(crate) fn into_result(self) -> Finish {
        if self.bytes > RESULT_BYTES_MAX {
            return Finish::failed(
                "too_large",
                format!(
                    "the command wrote {} bytes to stdout, at most {RESULT_BYTES_MAX} fit into a report",
                    self.bytes
                ),
            );
        }
        let Ok(text) = String::from_utf8(self.kept) else {
            return Finish::failed(
                "not_text",
                format!("the command wrote {} bytes to stdout that are not UTF-8", self.bytes),
            );
        };
        if text.trim().is_empty() {
            return Finish::Completed(None);
        }
        match json(&text) {
            Some(json) => Finish::Completed(Some(json)),
            None => Finish::completed(&text.strip_suffix('\n').unwrap_or(&text)),
        }
    }

    /// The checkpoint that this is: JSON, or none.
    pub(crate) fn into_checkpoint(self) -> Option<Box<RawValue>> {
        json(std::str::from_utf8(&self.kept).ok()?)
    }
}

fn json(text: &str) -> Option<Box<RawValue>> {
    serde_json::from_str::<Box<RawValue>>(text.trim()).ok()
}

impl Tail {
    /// The text, saying when it is not all of it.
    pub(crate) fn into_message(self) -> String {
        let kept: Vec<u8> = self.kept.into();
        let text = String::from_utf8_lossy(&kept);
        if self.bytes > kept.len() {
            format!("... (the last {} of {} bytes) {}", kept.len(), self.bytes, text.trim_end())
        } else {
            text.trim_end().to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result_of(text: &[u8]) -> Finish {
        let mut whole = Whole::default();
        whole.take(text);
        whole.into_result()
    }

    fn completed(text: &[u8]) -> Option<String> {
        match result_of(text) {
            Finish::Completed(result) => result.map(|raw| raw.get().to_owned()),
            other => panic!("{other:?}"),
        }
    }

    fn code(text: &[u8]) -> String {
        match result_of(text) {
            Finish::Failed(error) => error.code,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn json_stays_what_it_is_and_text_becomes_a_string() {
        assert_eq!(completed(b" {\"a\": 1}\n").unwrap(), "{\"a\": 1}");
        assert_eq!(completed(b"7\n").unwrap(), "7");
        assert_eq!(completed(b"hello\nworld\n").unwrap(), "\"hello\\nworld\"");
        assert_eq!(completed(b"{\"a\": 1}\n{\"b\": 2}\n").unwrap(), "\"{\\\"a\\\": 1}\\n{\\\"b\\\": 2}\"");
        assert_eq!(completed(b" \n"), None);
    }

    #[test]
    fn too_much_and_no_text_are_failures_that_say_so() {
        assert_eq!(code(&vec![b'x'; RESULT_BYTES_MAX + 1]), "too_large");
        assert_eq!(code(b"\xff\xfe"), "not_text");
        assert!(completed(format!("\"{}\"", "x".repeat(RESULT_BYTES_MAX - 2)).as_bytes()).is_some());
        let mut whole = Whole::default();
        whole.take(&vec![b'x'; RESULT_BYTES_MAX]);
        whole.take(b"xx");
        match whole.into_result() {
            Finish::Failed(error) => assert!(error.message.contains(&(RESULT_BYTES_MAX + 2).to_string())),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_end_of_stderr_is_kept_and_says_what_is_missing() {
        let mut tail = Tail::default();
        tail.take(b"first\n");
        assert_eq!(tail.into_message(), "first");
        let mut tail = Tail::default();
        for _ in 0..100 {
            tail.take(&[b'x'; 1000]);
        }
        tail.take(b"the end\n");
        let message = tail.into_message();
        assert!(message.ends_with("xthe end"), "{message}");
        assert!(message.contains("8192 of 100008 bytes"), "{message}");
        let mut tail = Tail::default();
        tail.take(&[b'y'; 3 * STDERR_TAIL_BYTES]);
        assert_eq!(tail.kept.len(), STDERR_TAIL_BYTES);
    }

    #[tokio::test]
    async fn lines_are_progress() {
        let progress = Progress::default();
        let mut whole = Whole::default();
        read_into(&b"a\nb\nc"[..], &mut whole, &progress).await;
        assert_eq!(progress.get(), Some(2));
    }
}
