//! Touches memory with patterns and checks them: `pages MIB THREADS [spoil|hold]`.
//!
//! Every page is written whole, with its own number, the number of the pass, and words that depend
//! on both. The second pass checks the first's pages and writes its own, and the third checks those.
//! A page that was lost, mixed up with another, brought back in an older state or damaged is told,
//! and the exit status is 1. With `spoil` one bit of one page is changed after the first pass: the
//! program must then fail, or it proves nothing when it does not. With `hold` the memory is kept until
//! a line comes.

use std::process::ExitCode;
use std::thread;
use std::time::Instant;

const WORDS: usize = 512;
const PAGES_PER_MIB: usize = 256;
/// Where in a page it says what it is.
const NUMBER: usize = 0;
const PASS: usize = 1;
/// Bad pages that are told in full.
const SHOWN: usize = 5;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| arguments.get(index)?.parse().ok().filter(|&number| number > 0);
    let (Some(mib), Some(threads)) = (number(0), number(1)) else {
        eprintln!("usage: pages MIB THREADS [spoil|hold]");
        return ExitCode::from(2);
    };
    let option = arguments.get(2).map(String::as_str);
    let pages = mib * PAGES_PER_MIB;
    // Not touched yet: memory that is asked for as zeros comes so from the kernel.
    let mut memory = vec![0u64; pages * WORDS];

    let first = pass(&mut memory, threads, |number, page| write(page, number, 1));
    if option == Some("spoil") {
        memory[pages / 2 * WORDS + WORDS / 2] ^= 1;
    }
    let second = pass(&mut memory, threads, |number, page| {
        let complaint = check(page, number, 1);
        write(page, number, 2);
        complaint
    });
    let third = pass(&mut memory, threads, |number, page| check(page, number, 2));

    println!("pages: {pages}, by {threads} threads");
    if option == Some("hold") {
        println!("pages: held");
        // The end of input is as good as a line.
        let _ = std::io::stdin().read_line(&mut String::new());
    }
    drop(memory);

    let complaints = [first, second, third].map(|pass| pass.complaints).concat();
    for complaint in complaints.iter().take(SHOWN) {
        println!("pages: {complaint}");
    }
    if complaints.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("pages: {} bad", complaints.len());
    ExitCode::FAILURE
}

struct Pass {
    complaints: Vec<String>,
}

/// Calls `visit` with every page and its number, from several threads.
fn pass(
    memory: &mut [u64],
    threads: usize,
    visit: impl Fn(u64, &mut [u64]) -> Option<String> + Sync,
) -> Pass {
    let begun = Instant::now();
    let share = (memory.len() / WORDS).div_ceil(threads);
    let complaints = thread::scope(|scope| {
        let shares = memory.chunks_mut(share * WORDS).enumerate();
        let workers: Vec<_> = shares
            .map(|(index, pages)| {
                let visit = &visit;
                scope.spawn(move || {
                    let numbers = (index * share) as u64..;
                    let pages = numbers.zip(pages.chunks_mut(WORDS));
                    pages.filter_map(|(number, page)| visit(number, page)).collect::<Vec<_>>()
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    let milliseconds = begun.elapsed().as_millis();
    println!("pages: a pass of {milliseconds} ms");
    Pass { complaints }
}

fn write(page: &mut [u64], number: u64, pass: u64) -> Option<String> {
    for (slot, word) in page.iter_mut().zip(words(number, pass)) {
        *slot = word;
    }
    None
}

fn check(page: &[u64], number: u64, pass: u64) -> Option<String> {
    let mut words = page.iter().zip(words(number, pass)).enumerate();
    let (index, (found, expected)) = words.find(|(_, (found, expected))| *found != expected)?;
    let (says_number, says_pass) = (page[NUMBER], page[PASS]);
    Some(format!(
        "page {number} of pass {pass}: word {index} is {found:#x} and ought to be {expected:#x}; it says that it is page {says_number} of pass {says_pass}"
    ))
}

/// What is in a page. Each word depends on the number, the pass, and its place.
fn words(number: u64, pass: u64) -> impl Iterator<Item = u64> {
    let seed = (number << 8 | pass).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let next = |word: &u64| Some(word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1));
    [number, pass].into_iter().chain(std::iter::successors(Some(seed), next))
}
