//! `gnomon peer`: maps pages of a guest that another process stresses, and checks what comes.
//!
//! Guarantee: the exit code is 0 only if nothing was wrong and the peer was not cut off.

use std::time::Duration;

use comfy_table::Table;

use super::args::PeerArgs;
use super::config::new_seed;
use super::ending::Ending;
use super::{EXIT_FAILURE, exit_code_of_signal, output, report};
use crate::lab::text::human_count;
use crate::peer::client::{Client, ClientConfig, ClientReport, Findings};
use crate::peer::protocol::Closing;

/// Runs a peer and returns the exit code.
///
/// # Errors
/// If it cannot connect, or the server is gone.
pub(crate) fn run(args: &PeerArgs) -> anyhow::Result<u8> {
    let ending = Ending::install()?;
    let config = ClientConfig {
        duration: args.duration,
        pages: args.pages,
        hold: args.hold_ms,
        seed: args.seed.unwrap_or_else(new_seed),
        hang_after: args.hang_after,
    };
    let client = Client::connect(&args.socket, config)?;
    ending.phase("connected to the server");
    let found = client.run(|| ending.signal().is_some())?;
    output::print(render(&found, config.seed));
    if let Some(why) = found.closed.filter(|&why| why != Closing::EndOfRun) {
        output::note(format_args!(
            "this peer was cut off: {why}; what it had mapped was taken from it"
        ));
    }
    Ok(exit_code(&found, ending.signal()))
}

fn exit_code(found: &ClientReport, signal: Option<i32>) -> u8 {
    let is_cut_off = found.closed.is_some_and(|why| why != Closing::EndOfRun);
    match signal {
        _ if is_cut_off || found.findings.violations > 0 => EXIT_FAILURE,
        Some(signal) => exit_code_of_signal(signal),
        None => 0,
    }
}

fn render(found: &ClientReport, seed: u64) -> String {
    let Findings { violations, first, .. } = &found.findings;
    let mut parts = vec![format!("peer: seed {seed}"), figures(&found.findings, found.elapsed)];
    let seconds = found.elapsed.as_secs_f64();
    if *violations > 0 {
        let mut lines = vec![format!("violations: {}", human_count(*violations))];
        lines.extend(first.iter().map(|text| format!("  {text}")));
        parts.push(lines.join("\n"));
    }
    parts.push(match (found.closed, violations) {
        (_, 1..) => format!("FAILED after {seconds:.1} s"),
        (Some(Closing::EndOfRun), _) => {
            format!("PASSED after {seconds:.1} s, when the run ended: no violations")
        }
        (Some(_), _) => format!("CUT OFF after {seconds:.1} s: no violations until then"),
        (None, _) => format!("PASSED after {seconds:.1} s: no violations"),
    });
    parts.join("\n\n")
}

fn figures(findings: &Findings, elapsed: Duration) -> String {
    let mut table: Table = report::table::table(&["", "total", "per second"]);
    let seconds = elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
    for (name, count) in [
        ("pages mapped", findings.mapped),
        ("pages refused", findings.refused),
        ("pages invalidated", findings.invalidated),
        ("invalidations acknowledged", findings.acknowledged),
        ("pages given up unasked", findings.unmapped),
        ("pages read again and compared", findings.verified),
        ("pairs of copies compared", findings.twins),
        ("freed slots found empty", findings.empty),
        ("pages copied in the middle of a write", findings.torn),
        ("violations", findings.violations),
    ] {
        let rate = count as f64 / seconds;
        table.add_row([name.to_owned(), human_count(count), format!("{rate:.0}")]);
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(violations: u64, closed: Option<Closing>) -> ClientReport {
        let first = (0..violations).map(|page| format!("page {page} is wrong")).collect();
        let findings = Findings { mapped: 1234, violations, first, ..Findings::default() };
        ClientReport { elapsed: Duration::from_secs(2), findings, closed }
    }

    #[test]
    fn only_a_peer_that_found_nothing_and_stayed_to_the_end_passes() {
        for (found, code, verdict) in [
            (report(0, None), 0, "PASSED after 2.0 s: no"),
            (report(0, Some(Closing::EndOfRun)), 0, "PASSED after 2.0 s, when the run ended"),
            (report(0, Some(Closing::TooSlow)), 1, "CUT OFF after 2.0 s"),
            (report(2, None), 1, "FAILED after 2.0 s"),
            (report(2, Some(Closing::EndOfRun)), 1, "page 1 is wrong\n\nFAILED"),
        ] {
            assert_eq!(exit_code(&found, None), code, "{found:?}");
            let rendered = render(&found, 5);
            assert!(rendered.contains(verdict), "{rendered}");
            assert!(rendered.contains("1,234") && rendered.contains("617"), "{rendered}");
        }
        assert_eq!(exit_code(&report(0, None), Some(2)), 130);
    }
}
