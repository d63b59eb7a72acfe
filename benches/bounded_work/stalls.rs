//! How long others wait while a guest with very many mappings of one page is being told that the page
//! goes, or flushes them all: a report, since it depends on the machine.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use gnomon::addr::{Gva, PAGE_SHIFT};
use gnomon::shadow_mmu::Access;

use crate::guest::{Guest, host_memory};

const ALIASES: u64 = 1 << 16;
const ROUNDS: usize = 4;

/// The longest of some calls.
#[derive(Default)]
struct Longest {
    calls: u64,
    longest: Duration,
}

impl Longest {
    fn of(&mut self, call: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        call()?;
        self.calls += 1;
        self.longest = self.longest.max(start.elapsed());
        Ok(())
    }

    fn print(&self, what: &str) {
        println!("{what}: {:.2} ms at most, of {}", self.longest.as_secs_f64() * 1e3, self.calls);
    }
}

/// Measures `call` again and again while `work` is done to the guest, each time with all its aliases
/// mapped. Returns the times of the work, and those of the calls.
fn beside(
    guest: &Guest,
    work: fn(&Guest) -> Result<()>,
    call: impl Fn() -> Result<()>,
) -> Result<(Longest, Longest)> {
    let (mut works, mut calls) = (Longest::default(), Longest::default());
    for _ in 0..ROUNDS {
        guest.touch_groups(ALIASES)?;
        let (is_over, works) = (AtomicBool::new(false), &mut works);
        std::thread::scope(|scope| -> Result<()> {
            let worker = scope.spawn(|| {
                let done = works.of(|| work(guest));
                is_over.store(true, Ordering::Relaxed);
                done
            });
            while !is_over.load(Ordering::Relaxed) {
                calls.of(&call)?;
            }
            worker.join().unwrap_or(Ok(()))
        })?;
    }
    Ok((works, calls))
}

pub(crate) fn report() -> Result<()> {
    println!("\nwith {ALIASES} aliases of one page, {ROUNDS} times:");
    let mm = host_memory(16 << 20)?;
    let other = Guest::of_large_pages(&mm, 1024)?;
    let number = AtomicU64::new(0);
    let faults = || {
        let number = number.fetch_add(1, Ordering::Relaxed) % 512;
        other.shadow.invlpg(other.root, Gva::new(number << PAGE_SHIFT))?;
        other.touch(number, Access::Write)
    };
    type Work = fn(&Guest) -> Result<()>;
    let works: [(_, Work); 2] = [
        ("CR3 load", |guest| {
            guest.shadow.load_root(&guest.context)?;
            Ok(())
        }),
        ("eviction", Guest::evict_data),
    ];
    let (_, alone) = beside(
        &Guest::of_aliases(&mm, ALIASES)?,
        |_| {
            std::thread::sleep(Duration::from_millis(50));
            Ok(())
        },
        faults,
    )?;
    alone.print("  nothing, a fault of another VM beside it");
    for (what, work) in works {
        let guest = Guest::of_aliases(&mm, ALIASES)?;
        let (whole, stalls) = beside(&guest, work, faults)?;
        let own_lock = || {
            black_box(guest.shadow.root_machine_address(guest.root));
            Ok(())
        };
        let (_, waits) = beside(&guest, work, own_lock)?;
        whole.print(&format!("  {what}, whole"));
        waits.print(&format!("  {what}, the wait for the same MMU lock beside it"));
        stalls.print(&format!("  {what}, a fault of another VM beside it"));
    }
    Ok(())
}
