//! `docs/LESSONS.md` names guards and tests: each of them is where the page says.

use std::path::{Path, PathBuf};

/// What a cell names: `` [`name`](path from docs/) ``.
struct Named<'a> {
    name: &'a str,
    file: PathBuf,
}

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

fn named(cell: &str) -> Vec<Named<'_>> {
    let links = cell.split("[`").skip(1);
    links
        .filter_map(|link| {
            link.split_once("`](").and_then(|(name, rest)| Some((name, rest.split_once(')')?.0)))
        })
        .map(|(name, path)| Named { name, file: docs().join(path) })
        .collect()
}

/// The cells of every row of every table, their headings apart.
fn rows(page: &str) -> Vec<Vec<&str>> {
    let lines: Vec<&str> = page.lines().collect();
    let is_rule = |line: Option<&&str>| line.is_some_and(|line| line.starts_with("|---"));
    lines
        .iter()
        .enumerate()
        .filter(|(n, line)| line.starts_with("| ") && !is_rule(lines.get(n + 1)))
        .map(|(_, line)| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect()
}

fn is_word_in(text: &str, word: &str) -> bool {
    let part_of_a_word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).any(|(at, _)| {
        !text[..at].ends_with(part_of_a_word) && !text[at + word.len()..].starts_with(part_of_a_word)
    })
}

/// A function of this name with a test's attribute above it, or a rule that the file's macro makes tests of.
fn is_test_in(text: &str, name: &str) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let begins = |line: &str| {
        let function = line.trim_start_matches("async ").strip_prefix("fn ");
        function.and_then(|rest| rest.strip_prefix(name)).is_some_and(|rest| rest.starts_with(['(', '<']))
    };
    let Some(at) = lines.iter().position(|line| begins(line)) else { return false };
    let above = lines[..at].iter().rev().take_while(|line| line.starts_with('#') || line.starts_with("//"));
    let has_attribute =
        above.into_iter().any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"));
    let made_by_macro = text
        .split_once("on_both!(")
        .and_then(|(_, rest)| rest.split_once(");"))
        .is_some_and(|(listed, _)| listed.lines().any(|line| line.trim() == format!("{name},")));
    has_attribute || made_by_macro
}

#[test]
fn every_guard_and_every_test_on_the_page_of_lessons_is_there() {
    let page = std::fs::read_to_string(docs().join("LESSONS.md")).expect("the page is there");
    let rows = rows(&page);
    assert!(rows.len() >= 60, "{} rows", rows.len());
    let mut wrong = Vec::new();
    for row in rows {
        let [what, _, guards, tests] = row[..] else {
            wrong.push(format!("{row:?} has not four cells"));
            continue;
        };
        let (guards, tests) = (named(guards), named(tests));
        if guards.is_empty() || tests.is_empty() {
            wrong.push(format!("{what:?} names no guard or no test"));
        }
        for Named { name, file } in &guards {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            let is_file = file.ends_with(name) && !text.is_empty();
            if !is_file && !is_word_in(&text, name) {
                wrong.push(format!("{what:?}: {name} is not in {}", file.display()));
            }
        }
        for Named { name, file } in &tests {
            if !is_test_in(&std::fs::read_to_string(file).unwrap_or_default(), name) {
                wrong.push(format!("{what:?}: {name} is no test in {}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "docs/LESSONS.md:\n{}", wrong.join("\n"));
}

/// The check itself: what only looks like a test is none.
#[test]
fn only_what_runs_counts_as_a_test() {
    let source = "#[test]\nfn one() {}\n\nfn two() {}\n#[tokio::test(flavor = \"multi_thread\")]\n// why\nasync fn three() {}\n\
         on_both!(\n    four,\n);\nasync fn four<C>(c: C) {}\n#[test]\nfn fivefold() {}\n// fn six() {}\n";
    for (name, is_one) in
        [("one", true), ("two", false), ("three", true), ("four", true), ("five", false), ("six", false)]
    {
        assert_eq!(is_test_in(source, name), is_one, "{name}");
    }
}
