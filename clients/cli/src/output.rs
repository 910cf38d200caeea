//! What goes to stdout: tables for people, JSON for programs. A reader that goes away ends the program quietly.

use std::io::{self, ErrorKind, IsTerminal, Write};

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table, presets};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

use crate::failure::Failure;

/// How answers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// One JSON document.
    Json,
    /// One JSON document a line.
    Jsonl,
}

/// Writes answers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) format: Format,
    colour: bool,
    wide: bool,
}

/// How a cell is shown where colours are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Good,
    Warn,
    Bad,
    Dim,
}

/// One cell.
pub(crate) type Shown = (String, Tone);

pub(crate) fn plain(text: impl Into<String>) -> Shown {
    (text.into(), Tone::Plain)
}

impl Output {
    pub(crate) fn new(format: Format) -> Self {
        let terminal = io::stdout().is_terminal();
        // https://no-color.org: set and not empty.
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { format, colour: terminal && !no_colour, wide: !terminal }
    }

    /// Writes a line (or a few).
    pub(crate) fn line(&self, text: &str) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
            Ok(()) => Ok(()),
            // `rollcall events | head`: nobody wants to know.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                std::process::exit(i32::from(crate::exit::OK))
            }
            Err(error) => Err(Failure::failed(format!("stdout can't be written: {error}"))),
        }
    }

    /// Writes one answer: as it came for programs, as an outline for people.
    pub(crate) fn one(&self, answer: &RawValue) -> Result<(), Failure> {
        match self.format {
            Format::Json | Format::Jsonl => self.line(answer.get()),
            Format::Table => self.line(outline(answer).trim_end()),
        }
    }

    /// Writes a list: rows as they came for programs, a table for people.
    pub(crate) fn list(
        &self,
        rows: &[Box<RawValue>],
        header: &[&str],
        cells: impl Fn(&Value) -> Vec<Shown>,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Json => {
                let rows: Vec<&str> = rows.iter().map(|row| row.get()).collect();
                self.line(&format!("[{}]", rows.join(",\n")))
            }
            Format::Jsonl => rows.iter().try_for_each(|row| self.line(row.get())),
            Format::Table => {
                let rows = rows.iter().filter_map(|row| serde_json::from_str::<Value>(row.get()).ok());
                self.table(header, rows.map(|row| cells(&row)))
            }
        }
    }

    /// Writes a table.
    pub(crate) fn table(
        &self,
        header: &[&str],
        rows: impl Iterator<Item = Vec<Shown>>,
    ) -> Result<(), Failure> {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        // Into a pipe each row is one line, however long.
        table.set_content_arrangement(if self.wide {
            ContentArrangement::Disabled
        } else {
            ContentArrangement::Dynamic
        });
        if self.colour {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        table.set_header(header.iter().map(|name| Cell::new(name).add_attribute(Attribute::Bold)));
        for row in rows {
            table.add_row(row.into_iter().map(|(text, tone)| cell(&text, tone)));
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let text: Vec<_> = table.lines().map(|line| line.trim_end().to_owned()).collect();
        self.line(&text.join("\n"))
    }
}

fn cell(text: &str, tone: Tone) -> Cell {
    let cell = Cell::new(printable(text));
    match tone {
        Tone::Plain => cell,
        Tone::Good => cell.fg(Color::Green),
        Tone::Warn => cell.fg(Color::Yellow),
        Tone::Bad => cell.fg(Color::Red),
        Tone::Dim => cell.fg(Color::DarkGrey),
    }
}

/// Text from outside, without anything that moves a terminal's cursor.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A JSON value as indented `name: value` lines, in the order in which it came.
pub(crate) fn outline(value: &RawValue) -> String {
    let mut text = String::new();
    write_outline(value, 0, &mut text);
    text
}

/// The members of an object or an array that holds any, `None` for everything else. Items of an array have no name.
fn members(value: &RawValue) -> Option<Vec<(Option<String>, Box<RawValue>)>> {
    let members: Vec<_> = match value.get().as_bytes().first()? {
        b'{' => serde_json::from_str::<Fields>(value.get()).ok()?.0,
        b'[' => {
            let items: Vec<Box<RawValue>> = serde_json::from_str(value.get()).ok()?;
            items.into_iter().map(|item| (None, item)).collect()
        }
        _ => return None,
    };
    (!members.is_empty()).then_some(members)
}

/// An object's fields in their order, which a map would lose.
struct Fields(Vec<(Option<String>, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    fields.push((Some(name), value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

fn write_outline(value: &RawValue, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    let Some(members) = members(value) else {
        text.push_str(&format!("{indent}{}\n", leaf(value)));
        return;
    };
    for (name, member) in members {
        match name {
            Some(name) => text.push_str(&format!("{indent}{}:", printable(&name))),
            None => text.push_str(&format!("{indent}-")),
        }
        if self::members(&member).is_some() {
            text.push('\n');
            write_outline(&member, depth + 1, text);
        } else {
            text.push_str(&format!(" {}\n", leaf(&member)));
        }
    }
}

fn leaf(value: &RawValue) -> String {
    serde_json::from_str::<Value>(value.get()).map_or_else(|_| printable(value.get()), |value| shown(&value))
}

/// A leaf as text; nothing as `-`.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => printable(text),
        other => other.to_string(),
    }
}

/// A field of an object as text.
pub(crate) fn field(row: &Value, name: &str) -> String {
    shown(row.get(name).unwrap_or(&Value::Null))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outline_is_indented_and_harmless() {
        let json = r#"{"b": 1, "a": {"c": null, "d": ["x\u001b[2J", {"e": true}]}, "f": [], "g": {}}"#;
        let value = RawValue::from_string(json.to_owned()).unwrap();
        assert_eq!(
            outline(&value),
            "b: 1\na:\n  c: -\n  d:\n    - x\u{fffd}[2J\n    -\n      e: true\nf: []\ng: {}\n"
        );
    }
}
