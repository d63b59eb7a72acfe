//! The report for people.

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};

use super::{LatencyReport, PeersReport, Report, Verdict};
use crate::cli::args::name_of;
use crate::cli::output::printable;
use crate::cli::values::size;
use crate::lab::text::{human_bytes, human_count, human_nanos};
use crate::lab::{self, PopulationCount};
use crate::peer::PeerStats;

/// One line below the header, nothing else.
const STYLE: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));
/// Violations that are shown in full.
const SHOWN: usize = 20;

/// All of the report: what was run, the figures, what was found, the verdict.
pub(crate) fn render(report: &Report) -> String {
    let mut parts = vec![headline(report), figures(report)];
    parts.extend(latencies(report));
    parts.extend(vms(report));
    parts.extend(report.peers.as_ref().map(|peers| self::peers(report, peers)));
    parts.push(memory(report));
    parts.extend(report.injected.as_ref().map(|injected| injected.lines().join("\n")));
    parts.extend(violations(report));
    parts.extend(cut_short(report));
    parts.push(verdict(report));
    parts.join("\n\n")
}

fn headline(report: &Report) -> String {
    let config = &report.config;
    let names: Vec<String> = config.workloads.iter().map(|&workload| name_of(workload)).collect();
    format!(
        "stress: {}{} guest in {} of frames, {} vCPUs, {}, seed {}",
        if config.vms > 1 { format!("{} VMs, ", config.vms) } else { String::new() },
        size(config.memory_bytes),
        size(config.host_memory_bytes),
        config.vcpus,
        names.join(","),
        config.seed
    )
}

pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(STYLE);
    table.set_header(header);
    for index in 1..header.len() {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn figures(report: &Report) -> String {
    let mut table = table(&["", "total", "per second"]);
    let mut row = |name: &str, count: u64| {
        let rate = if report.seconds > 0.0 { count as f64 / report.seconds } else { 0.0 };
        table.add_row([name.to_owned(), human_count(count), format!("{rate:.0}")]);
    };
    row("accesses verified by the guest", report.guest.verified);
    row("page writes", report.guest.writes);
    row("additions to shared counters", report.guest.shared_adds);
    row("page-table changes", report.guest.paging_ops);
    if report.dma.operations > 0 {
        row("commands carried out by DMA", report.dma.operations);
        row("KiB by DMA", report.dma.bytes >> 10);
        row("IOTLB: hits", report.iotlb.hits);
        row("IOTLB: misses", report.iotlb.misses());
        row("IOTLB: entries removed by invalidations", report.iotlb.invalidated);
        row("IOTLB: flushes that waited", report.iotlb.waits);
    }
    if report.direct.faults > 0 {
        row("faults of the window", report.direct.faults);
        row("faults that had to wait", report.direct.handed_over);
        row("mapped ahead of a fault", report.direct.fault_around);
        row("faults started over", report.direct.retries);
    } else {
        row("faults: read", report.faults.read);
        row("faults: write", report.faults.write);
        row("faults: execute", report.faults.execute);
        row("faults: the guest's own", report.faults.guest);
        row("mapped ahead of a fault", report.shadow.fault_around);
        row("faults started over", report.shadow.retries);
    }
    for storm in &report.storms {
        row(&format!("storm: {}, pages tried", storm.kind), storm.tried);
        row(&format!("storm: {}, pages done", storm.kind), storm.done);
    }
    for observer in &report.observers {
        row(&format!("{}: pages found written", observer.kind), observer.done);
    }
    if report.direct.faults > 0 {
        row("mappings ended by invalidations", report.direct.invalidated);
        row("pages write-protected", report.direct.write_protected);
        row("pages removed from the window", report.direct.removed);
        row("ranges zapped for ageing", report.direct.aged_zaps);
    } else {
        row("SPTEs zapped by invalidations", report.shadow.invalidated);
        row("SPTEs made read-only by cleaning", report.shadow.write_protected);
    }
    row("pages evicted", report.host.evictions);
    row("pages cleaned", report.host.cleans);
    if report.host.failed_evictions > 0 {
        row("evictions that failed", report.host.failed_evictions);
    }
    row("pages written to swap", report.host.swap_outs);
    row("pages read from swap", report.host.swap_ins);
    for (name, count) in [
        ("pages shared", report.host.shared),
        ("shared pages copied on write", report.host.cow_copies),
        ("shared pages left to their last user", report.host.cow_reuses),
        ("pages merged", report.host.merges),
        ("pages migrated", report.host.migrations),
        ("pages remapped", report.host.remaps),
        ("pages given back", report.host.pages_freed),
    ] {
        if count > 0 {
            row(name, count);
        }
    }
    row("exits", report.exits.all);
    if report.exits.recycles > 0 {
        row("shadow pages recycled", report.exits.recycles);
    }
    if report.guest.hot_accesses > 0 {
        row("accesses to the hot set", report.guest.hot_accesses);
        row("pages of the hot set read from swap", report.host.watched_swap_ins);
    }
    table.trim_fmt()
}

fn latencies(report: &Report) -> Option<String> {
    let all = report.fault_latency.all?;
    let mut table = table(&["fault latency", "faults", "p50", "p99", "max"]);
    let mut row = |name: &str, latency: Option<LatencyReport>| {
        if let Some(latency) = latency {
            table.add_row([
                name.to_owned(),
                human_count(latency.count),
                human_nanos(latency.p50_ns),
                human_nanos(latency.p99_ns),
                human_nanos(latency.max_ns),
            ]);
        }
    };
    row("read", report.fault_latency.read);
    row("write", report.fault_latency.write);
    row("execute", report.fault_latency.execute);
    row("all", Some(all));
    Some(table.trim_fmt())
}

/// VMs that have a line of their own; there may be thousands in a run.
const SHOWN_VMS: usize = 16;

fn vms(report: &Report) -> Option<String> {
    let all = &report.vms;
    if all.each.len() < 2 {
        return None;
    }
    let mut each = table(&["VM", "cloned from", "verified", "writes", "faults", "clone ms", "end"]);
    for vm in all.each.iter().take(SHOWN_VMS) {
        each.add_row([
            vm.number.to_string(),
            vm.parent.map_or_else(String::new, |parent| parent.to_string()),
            human_count(vm.guest.verified),
            human_count(vm.guest.writes),
            human_count(vm.faults),
            vm.clone_ms.map_or_else(String::new, |ms| format!("{ms:.1}")),
            vm.fate.to_owned(),
        ]);
    }
    let mut parts = vec![each.trim_fmt()];
    if all.each.len() > SHOWN_VMS {
        parts.push(format!(" ... and {} more", all.each.len() - SHOWN_VMS));
    }
    if let Some(clones) = &all.clones {
        let mut table = table(&["clones", "median", "max"]);
        for (name, spread) in [
            ("clone ms: source paused", clones.paused_ms),
            ("clone ms: pause to first entry", clones.clone_ms),
        ] {
            table.add_row([
                name.to_owned(),
                format!("{:.1}", spread.median),
                format!("{:.1}", spread.max),
            ]);
        }
        let pages = clones.shared_pages;
        table.add_row([
            "pages shared".to_owned(),
            format!("{:.0}", pages.median),
            format!("{:.0}", pages.max),
        ]);
        parts.push(format!("\n{}", table.trim_fmt()));
    }
    let PopulationCount { cloned, failed, killed, asked } = all.population;
    parts.push(format!(
        "\nVMs cloned: {}, attempts that failed: {}, killed at work: {}, asked to finish at work: {}; pages merged across VMs: {}",
        human_count(cloned),
        human_count(failed),
        human_count(killed),
        human_count(asked),
        human_count(all.pages_merged_across)
    ));
    Some(parts.join("\n"))
}

fn peers(report: &Report, peers: &PeersReport) -> String {
    let PeerStats { served, refused, cut_off, lent, unmapped, invalidated, sent, acknowledged } =
        peers.stats;
    let mut table = table(&["peers", "total", "per second"]);
    for (name, count) in [
        ("peers served", served),
        ("connections refused", refused),
        ("peers cut off", cut_off),
        ("pages lent to peers", lent),
        ("pages given back by peers", unmapped),
        ("pages recalled for a write", peers.recalls),
        ("pages taken from peers", invalidated),
        ("invalidations sent to peers", sent),
        ("invalidations acknowledged", acknowledged),
    ] {
        let rate = if report.seconds > 0.0 { count as f64 / report.seconds } else { 0.0 };
        table.add_row([name.to_owned(), human_count(count), format!("{rate:.0}")]);
    }
    let table = table.trim_fmt();
    let Some(LatencyReport { p50_ns, p99_ns, max_ns, .. }) = peers.latency else {
        return table;
    };
    let [p50, p99, max] = [p50_ns, p99_ns, max_ns].map(human_nanos);
    format!("{table}\npeers gave pages up within {p50} (p50), {p99} (p99), {max} (max)")
}

fn memory(report: &Report) -> String {
    let memory = &report.memory;
    let mut table = table(&["memory", "peak", "of budget"]);
    for (name, bytes) in [
        ("frames in use", memory.peak_frame_bytes),
        ("resident, as the kernel counts", memory.peak_resident_bytes),
    ] {
        let share = 100.0 * bytes as f64 / memory.budget_bytes.max(1) as f64;
        table.add_row([name.to_owned(), human_bytes(bytes), format!("{share:.1} %")]);
    }
    table.trim_fmt()
}

fn violations(report: &Report) -> Option<String> {
    let found = &report.violations;
    if found.total == 0 {
        return None;
    }
    let mut lines = vec![format!("violations: {}", human_count(found.total))];
    for violation in found.first.iter().take(SHOWN) {
        lines.push(format!("  {}", printable(&violation.text)));
    }
    let shown = found.first.len().min(SHOWN) as u64;
    if found.total > shown {
        lines.push(format!("  ... and {} more", human_count(found.total - shown)));
    }
    Some(lines.join("\n"))
}

fn cut_short(report: &Report) -> Option<String> {
    lab::cut_short(report.signal?, &report.violations.unchecked)
}

fn verdict(report: &Report) -> String {
    let seconds = report.seconds;
    let sabotage = report.config.sabotage.map(name_of);
    if let (Some(name), Some(detection)) = (&sabotage, &report.detection) {
        return format!(
            "FAILED, as it should: sabotage {name} was caught after {:.1} s by {}",
            detection.seconds, detection.by
        );
    }
    match (report.result, &sabotage) {
        (Verdict::Passed, Some(name)) => {
            format!("PASSED, and should not have: sabotage {name} was not caught in {seconds:.1} s")
        }
        (Verdict::Passed, None) => format!("PASSED after {seconds:.1} s: no violations"),
        (Verdict::Interrupted, _) => format!(
            "INTERRUPTED by signal {} after {:.1} s of {:.1} s: no violations until then",
            report.signal.unwrap_or_default(),
            report.worked_seconds,
            report.config.duration_seconds
        ),
        (Verdict::HostLimit, _) => format!(
            "CUT SHORT by a limit of this host after {:.1} s of {:.1} s, with nothing wrong until then: {}",
            report.worked_seconds,
            report.config.duration_seconds,
            printable(report.host_limit.as_deref().unwrap_or_default())
        ),
        (Verdict::Failed, _) => match &report.detection {
            Some(detection) => format!(
                "FAILED after {seconds:.1} s; the first violation was found after {:.1} s by {}",
                detection.seconds, detection.by
            ),
            None => format!("FAILED after {seconds:.1} s"),
        },
    }
}
