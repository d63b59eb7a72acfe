//! Each sentence of `docs/guest-abi.md` has a test that tries it, or a reason why it has none.
//!
//! `guest_page/sentences.txt` has the page's sentences and the rows of its tables, word by word, under
//! the name of their test. Whoever changes the page finds out here which test the change concerns.

use std::fs;
use std::path::Path;

const PAGE: &str = include_str!("../docs/guest-abi.md");
const SENTENCES: &str = include_str!("guest_page/sentences.txt");

/// Sentences of paragraphs and lists, and rows of tables; without headings, heads of tables and code.
fn sentences(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut paragraph = String::new();
    let mut is_code = false;
    let mut lines = page.lines().map(str::trim).peekable();
    while let Some(line) = lines.next() {
        let is_fence = line.starts_with("```");
        let is_item = line.starts_with("- ")
            || line.starts_with(|c: char| c.is_ascii_digit()) && line[1..].starts_with(". ");
        let ends = line.is_empty() || is_fence || is_item || line.starts_with(['#', '|']);
        if ends {
            split(&std::mem::take(&mut paragraph), &mut found);
        }
        is_code ^= is_fence;
        if is_code || is_fence || line.is_empty() || line.starts_with('#') {
            continue;
        }
        if line.starts_with('|') {
            let is_rule = |line: &str| line.starts_with("|---");
            if !is_rule(line) && !lines.peek().is_some_and(|next| is_rule(next)) {
                found.push(words(line));
            }
            continue;
        }
        let text = if is_item { line.split_once(' ').map_or("", |(_, text)| text) } else { line };
        paragraph.push_str(text);
        paragraph.push(' ');
    }
    split(&paragraph, &mut found);
    found
}

/// The text with one space between words.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A sentence ends at a full stop before a capital, code or an exception's sign.
fn split(paragraph: &str, found: &mut Vec<String>) {
    let text = words(paragraph);
    let mut start = 0;
    for (at, _) in text.match_indices(". ") {
        if text[at + 2..].starts_with(|c: char| c.is_ascii_uppercase() || c == '`' || c == '#') {
            found.push(text[start..=at].to_owned());
            start = at + 2;
        }
    }
    if start < text.len() {
        found.push(text[start..].to_owned());
    }
}

/// The sentences of the list, each with the line above that says what tries it.
fn listed(list: &str) -> Vec<(&str, &str)> {
    let mut by = "";
    let lines = list.lines().filter(|line| !line.is_empty() && !line.starts_with("# "));
    lines
        .filter_map(|line| match line.strip_prefix("@ ") {
            Some(name) => {
                by = name;
                None
            }
            None => Some((by, line)),
        })
        .collect()
}

/// What does not fit: sentences of one side only, tests that are not there, missing reasons.
fn misfits(page: &str, list: &str) -> Vec<String> {
    let (said, listed) = (sentences(page), listed(list));
    let mut found = Vec::new();
    for sentence in &said {
        if !listed.iter().any(|(_, entry)| entry == sentence) {
            found.push(format!("no test is named for: {sentence}"));
        }
    }
    for (by, entry) in &listed {
        if !said.iter().any(|sentence| sentence == entry) {
            found.push(format!("the page does not say any more: {entry}"));
        }
        match (by.strip_prefix("- "), by.split_once("::")) {
            (Some(reason), _) if reason.len() > 10 => {}
            (None, Some((file, test))) if has_test(file, test) => {}
            _ => found.push(format!("no reason and no test of this name: {by:?}")),
        }
    }
    found
}

fn has_test(file: &str, test: &str) -> bool {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let source = fs::read_to_string(path).unwrap_or_default();
    source.contains(&format!("fn {test}(")) || source.contains(&format!("\"{test}\""))
}

#[test]
fn every_sentence_has_a_test_or_a_reason() {
    let misfits = misfits(PAGE, SENTENCES);
    assert!(misfits.is_empty(), "tests/guest_page/sentences.txt:\n{}", misfits.join("\n"));
    let tried = listed(SENTENCES).iter().filter(|(by, _)| !by.starts_with("- ")).count();
    assert!(tried > 200, "{tried} sentences are tried");
}

#[test]
fn a_changed_sentence_and_a_missing_test_are_noticed() {
    let page = "# Head\n\nOne is so. Two,\nvol. 3, is not.\n\n| a | b |\n|---|---|\n| 1 |  2 |\n\n- an item\n1. a step\n```\ncode\n```\n";
    assert_eq!(
        sentences(page),
        ["One is so.", "Two, vol. 3, is not.", "| 1 | 2 |", "an item", "a step"]
    );
    let list = "@ tests/guest_page.rs::every_sentence_has_a_test_or_a_reason\nOne is so.\nan item\n\
                @ - a good reason\nTwo, vol. 3, is not.\n@ tests/guest_page.rs::gone\n| 1 | 2 |\n\
                @ -\na step\n";
    assert_eq!(
        misfits(page, list),
        [
            "no reason and no test of this name: \"tests/guest_page.rs::gone\"",
            "no reason and no test of this name: \"-\""
        ]
    );
    let changed = page.replace("One is so", "One is not so");
    assert_eq!(misfits(&changed, list).len(), 4);
}
