//! The guest's command line.

/// What the guest does after its set-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A bounded run of everything, reported item by item.
    Boot,
    /// The named workloads until the host says stop.
    Stress,
}

/// One of the guest's workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Sweeps over the owned pages, first to last.
    Seq,
    /// Owned pages, each as likely.
    Random,
    /// Owned pages by Zipf's law.
    Zipf,
    /// A pointer chase through all owned pages.
    Chase,
    /// Counters that all vCPUs add to.
    Shared,
    /// Page-table changes.
    Paging,
    /// A hot set in steady use while the rest is scanned once.
    Hotscan,
}

impl Workload {
    /// Every workload, in the order of a round.
    pub const ALL: [Workload; 7] = [
        Workload::Seq,
        Workload::Random,
        Workload::Zipf,
        Workload::Chase,
        Workload::Shared,
        Workload::Paging,
        Workload::Hotscan,
    ];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Workload::Seq => "seq",
            Workload::Random => "random",
            Workload::Zipf => "zipf",
            Workload::Chase => "chase",
            Workload::Shared => "shared",
            Workload::Paging => "paging",
            Workload::Hotscan => "hotscan",
        }
    }

    fn from_name(name: &str) -> Option<Workload> {
        Workload::ALL.into_iter().find(|w| w.name() == name)
    }
}

/// The parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `mode=`.
    pub mode: Mode,
    /// `workload=`: by position in [`Workload::ALL`].
    selected: [bool; Workload::ALL.len()],
    /// `seed=`.
    pub seed: u64,
    /// `pages=`: at most so many work pages.
    pub pages: Option<u64>,
    /// `passes=`: so many rounds of the workloads; 0 for no bound, which boot mode reads as 1.
    pub passes: u64,
    /// `write=`: percentage of page accesses that are writes.
    pub write_percent: u8,
    /// `hot=`: pages of the hot set of `hotscan`.
    pub hot: Option<u64>,
    /// `fill=`: whether every work page is written once before the workloads.
    pub fill: bool,
    /// `free=`: percentage of page accesses that give the page back instead.
    pub free_percent: u8,
    /// `dma=`: percentage of page accesses that the DMA device makes instead.
    pub dma_percent: u8,
    /// `entropy=`: percentage of a page body that does not compress.
    pub entropy_percent: u8,
}

impl Options {
    /// Parses a command line; hands every word that says nothing to it to `unknown`.
    pub fn parse<'a>(line: &'a str, mut unknown: impl FnMut(&'a str)) -> Options {
        let mut options = Options {
            mode: Mode::Boot,
            selected: [true; Workload::ALL.len()],
            seed: 1,
            pages: None,
            passes: 0,
            write_percent: 50,
            hot: None,
            fill: false,
            free_percent: 0,
            dma_percent: 0,
            entropy_percent: 50,
        };
        let mut fill = None;
        for word in line.split_ascii_whitespace() {
            let understood = match word.split_once('=') {
                Some(("fill", value)) => bit(value).map(|v| fill = Some(v)).is_some(),
                Some((key, value)) => options.set(key, value).is_some(),
                None => false,
            };
            if !understood {
                unknown(word);
            }
        }
        options.fill = fill.unwrap_or(options.mode == Mode::Boot);
        options
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "mode" => {
                self.mode = match value {
                    "boot" => Mode::Boot,
                    "stress" => Mode::Stress,
                    _ => return None,
                }
            }
            "workload" => {
                let mut selected = [false; Workload::ALL.len()];
                for name in value.split(',') {
                    selected[Workload::from_name(name)? as usize] = true;
                }
                self.selected = selected;
            }
            "seed" => self.seed = number(value)?,
            "pages" => self.pages = Some(number(value)?),
            "passes" => self.passes = number(value)?,
            "write" => self.write_percent = percentage(value)?,
            "hot" => self.hot = Some(number(value)?),
            "free" => self.free_percent = percentage(value)?,
            "dma" => self.dma_percent = percentage(value)?,
            "entropy" => self.entropy_percent = percentage(value)?,
            _ => return None,
        }
        Some(())
    }

    /// Whether a workload was asked for.
    pub fn selects(&self, workload: Workload) -> bool {
        self.selected[workload as usize]
    }
}

fn number(value: &str) -> Option<u64> {
    match value.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => value.parse().ok(),
    }
}

fn percentage(value: &str) -> Option<u8> {
    value.parse().ok().filter(|v| *v <= 100)
}

fn bit(value: &str) -> Option<bool> {
    match value {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}
