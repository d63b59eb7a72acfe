//! Words to arguments, and what is wrong with them as one sentence.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::Cli;

/// The command line of these words. What begins with a minus and a digit is the value of the option
/// before it, with a unit, too: clap takes `-1s` for options of one letter.
///
/// # Errors
/// As clap: see [`complaint`].
pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut joined: Vec<OsString> = Vec::new();
    for word in words {
        match joined.last_mut() {
            Some(option) if is_option(option) && is_negative(&word) => {
                option.push("=");
                option.push(word);
            }
            _ => joined.push(word),
        }
    }
    Cli::try_parse_from(joined)
}

/// Whether a word is an option whose value is another word, if it has one.
fn is_option(word: &OsStr) -> bool {
    let bytes = word.as_bytes();
    bytes.len() > 2 && bytes.starts_with(b"--") && !bytes.contains(&b'=')
}

fn is_negative(word: &OsStr) -> bool {
    matches!(word.as_bytes(), [b'-', digit, ..] if digit.is_ascii_digit())
}

/// What clap has to say about a command line, in one sentence; `None` if it is help or the version
/// that the user asked for.
pub(crate) fn complaint(error: &clap::Error) -> Option<String> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.join(", "),
        _ => String::new(),
    };
    let sentence = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => return None,
        ErrorKind::ValueValidation => {
            let reason = std::error::Error::source(error).map(ToString::to_string);
            let value = text(ContextKind::InvalidValue);
            let usage = text(ContextKind::InvalidArg);
            let option = option_name(&usage);
            format!("{option} {value:?}: {}", reason.unwrap_or_default())
        }
        ErrorKind::InvalidValue => {
            let (value, option) = (text(ContextKind::InvalidValue), text(ContextKind::InvalidArg));
            let valid = text(ContextKind::ValidValue);
            match (value.is_empty(), valid.is_empty()) {
                (true, true) => format!("{option} needs a value"),
                (true, false) => format!("{option} needs a value: one of {valid}"),
                _ => format!(
                    "{} {value:?} does not exist; choose from {valid}",
                    option_name(&option)
                ),
            }
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            "no command given; use one of boot, stress, peer, doctor".to_owned()
        }
        _ => first_paragraphs(&error.render().to_string()),
    };
    Some(format!("{sentence} (gnomon --help tells more)"))
}

/// `--memory` of `--memory <SIZE>`.
fn option_name(usage: &str) -> &str {
    usage.split_whitespace().next().unwrap_or(usage)
}

/// Clap's own message and its tips, joined to one line, without the usage.
fn first_paragraphs(rendered: &str) -> String {
    let message = rendered.strip_prefix("error: ").unwrap_or(rendered);
    let said = message.split("\n\n").take_while(|paragraph| {
        !paragraph.starts_with("Usage:") && !paragraph.starts_with("For more")
    });
    let words: Vec<&str> = said.flat_map(str::split_whitespace).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint_about(words: &[&str]) -> String {
        let words = ["gnomon"].iter().chain(words).map(OsString::from);
        complaint(&parse(words).unwrap_err()).unwrap()
    }

    #[test]
    fn bad_values_are_one_sentence_with_the_value_and_the_remedy() {
        let cases: [(&[&str], &[&str]); 16] = [
            (&["stress", "--dma", "101"], &["--dma \"101\"", "0 to 100"]),
            (&["boot", "--memory", "12Q"], &["--memory \"12Q\"", "such as 256M"]),
            (&["boot", "--memory", "0"], &["--memory \"0\"", "give at least 4K"]),
            (&["boot", "--host-memory", "5000"], &["--host-memory \"5000\"", "8192"]),
            (&["boot", "--vcpus", "0"], &["--vcpus \"0\"", "1 to 1023"]),
            (&["stress", "--vms", "0"], &["--vms \"0\"", "1 to 64"]),
            (&["stress", "--churn", "1"], &["--churn \"1\"", "such as 30s"]),
            (&["stress", "--duration", "30"], &["--duration \"30\"", "such as 30s"]),
            (&["stress", "--duration", "-1s"], &["--duration \"-1s\"", "below 0", "such as 30s"]),
            (&["stress", "--churn", "-2m"], &["--churn \"-2m\"", "below 0"]),
            (&["boot", "--memory", "-1M"], &["--memory \"-1M\"", "such as 256M"]),
            (&["stress", "--rate", "-5/s"], &["--rate \"-5/s\"", "such as 20000/s"]),
            (&["stress", "--rate", "0/s"], &["--rate \"0/s\"", "--invalidate none"]),
            (&["stress", "--seed", "x"], &["--seed \"x\"", "whole number"]),
            (
                &["stress", "--sabotage", "gremlin"],
                &["--sabotage \"gremlin\"", "skip-flush", "swap-corrupt"],
            ),
            (&["stress", "--workload", "seq,walk"], &["\"walk\"", "hotscan"]),
        ];
        for (words, parts) in cases {
            let said = complaint_about(words);
            assert!(!said.contains('\n'), "{said}");
            for part in parts {
                assert!(said.contains(part), "{words:?}: {said}");
            }
        }
    }

    #[test]
    fn bad_options_and_commands_are_one_line() {
        for (words, part) in [
            (&["boot", "--memmory", "1G"][..], "--memmory"),
            (&["boot", "--memory"], "--memory <SIZE> needs a value"),
            (&["stress", "--sabotage"], "skip-flush"),
            (&["dance"], "dance"),
            (&[], "boot, stress, peer, doctor"),
            (&["boot", "surplus"], "surplus"),
            (&["boot", "--vcpus", "1", "--vcpus", "2"], "--vcpus"),
        ] {
            let said = complaint_about(words);
            assert!(said.contains(part), "{words:?}: {said}");
            assert!(!said.contains('\n') && !said.contains("Usage"), "{said}");
        }
    }

    #[test]
    fn help_and_version_are_no_complaints() {
        for word in ["--help", "--version"] {
            let error = Cli::try_parse_from(["gnomon", word]).unwrap_err();
            assert_eq!(complaint(&error), None);
        }
    }
}
