//! Sizes, durations, rates and counts as they are written on a command line.
//!
//! Guarantee: parsing has no side effects, never overflows, and an error is the end of a sentence
//! that begins with the value: what is wrong with it, and what to write instead.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::abi;
use crate::addr::PAGE_SIZE_U64;
use crate::peer::server::DEFAULT_SLOTS;

const NOT_A_SIZE: &str =
    "a size is a whole number of bytes with an optional K, M, G or T behind it, such as 256M";
const NOT_A_DURATION: &str =
    "a duration is a number with one of ms, s, m or h behind it, such as 30s";
const NOT_A_RATE: &str = "a rate is a whole number of pages a second, such as 20000/s";

/// Longest duration that is taken: 1000 days, far below what a monotonic clock overflows at.
const MAX_DURATION: Duration = Duration::from_secs(1000 * 24 * 3600);
/// Highest rate that is taken, in pages a second: no host gets near it.
const MAX_RATE: u32 = 100_000_000;

/// What is wrong with a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ValueError {
    /// The text does not say a size.
    #[error("{NOT_A_SIZE}")]
    NotASize,
    /// The size needs more than 64 bits.
    #[error("that is more bytes than 64 bits can count; give less, such as 256M")]
    SizeOverflow,
    /// Nothing.
    #[error("a size of 0 bytes is of no use; give at least 4K")]
    ZeroSize,
    /// Not whole pages.
    #[error("{bytes} bytes are not a multiple of 4096 (a page); {next} would be")]
    NotPages {
        /// What was asked for.
        bytes: u64,
        /// The nearest size above that works (below, at the end of the range).
        next: u64,
    },
    /// The text does not say a duration.
    #[error("{NOT_A_DURATION}")]
    NotADuration,
    /// The text says a time that is over before it begins.
    #[error("a time below 0 there is none; {NOT_A_DURATION}")]
    NegativeDuration,
    /// No time.
    #[error("a duration of 0 leaves no time to run; give at least 1ms")]
    ZeroDuration,
    /// Too long for a clock.
    #[error("the longest duration is {}h", MAX_DURATION.as_secs() / 3600)]
    DurationTooLong,
    /// The text does not say a rate.
    #[error("{NOT_A_RATE}")]
    NotARate,
    /// A rate at which nothing happens.
    #[error(
        "at a rate of 0 nothing would happen; for that use --invalidate none, or leave --storm out"
    )]
    ZeroRate,
    /// Higher than any host could go.
    #[error("the highest rate is {MAX_RATE}/s")]
    RateTooHigh,
    /// Not a seed.
    #[error("a seed is a whole number from 0 to {}", u64::MAX)]
    NotASeed,
    /// Not a number of vCPUs.
    #[error("a guest has 1 to {} vCPUs", abi::MAX_VCPUS)]
    BadVcpus,
    /// Not a number of VMs.
    #[error("there can be 1 to {MAX_VMS} VMs")]
    BadVms,
    /// Not a percentage.
    #[error("a percentage is a whole number from 0 to 100")]
    BadPercent,
    /// Not a time in milliseconds.
    #[error("give 1 to {MAX_LIMIT_MS} milliseconds, such as 1000")]
    BadLimit,
    /// Not a number of pages that a peer may hold.
    #[error("a peer holds 1 to {DEFAULT_SLOTS} pages")]
    BadPages,
}

/// Most VMs at a time; each has threads for its vCPUs and a mapping of all frames.
const MAX_VMS: usize = 64;

/// A number of bytes that is a multiple of the page size and not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Size(u64);

impl Size {
    /// The number of bytes.
    pub(crate) fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let bytes = parse_size(text)?;
        if bytes == 0 {
            return Err(ValueError::ZeroSize);
        }
        if !bytes.is_multiple_of(PAGE_SIZE_U64) {
            let next = bytes
                .checked_next_multiple_of(PAGE_SIZE_U64)
                .unwrap_or(bytes - bytes % PAGE_SIZE_U64);
            return Err(ValueError::NotPages { bytes, next });
        }
        Ok(Self(bytes))
    }
}

/// As one would write it: the largest unit that divides it.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(50, "P"), (40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// A size as one would write it on the command line.
pub(crate) fn size(bytes: u64) -> Size {
    Size(bytes)
}

/// Bytes from text: digits, then a unit of 1024s in either case, with or without `i` and `B`.
fn parse_size(text: &str) -> Result<u64, ValueError> {
    let (number, unit) = split_number(text).ok_or(ValueError::NotASize)?;
    let unit = unit.to_ascii_lowercase();
    let unit = unit.strip_suffix('b').unwrap_or(&unit);
    let prefix = unit.strip_suffix('i').unwrap_or(unit);
    let shift = match prefix {
        "" if unit.is_empty() => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(ValueError::NotASize),
    };
    let number: u64 = number.parse().map_err(|_| ValueError::SizeOverflow)?;
    number.checked_mul(1 << shift).ok_or(ValueError::SizeOverflow)
}

/// Splits off the digits that the text begins with; `None` if there are none.
fn split_number(text: &str) -> Option<(&str, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// Parses `30s`, `500ms`, `2m`, `1h`, and fractions of them such as `1.5s`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, ValueError> {
    let below_zero = text.strip_prefix('-').filter(|rest| !rest.starts_with('-'));
    if below_zero.is_some_and(|rest| parse_duration(rest) != Err(ValueError::NotADuration)) {
        return Err(ValueError::NegativeDuration);
    }
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit_ms = match unit {
        "ms" => 1.0,
        "s" => 1000.0,
        "m" | "min" => 60_000.0,
        "h" => 3_600_000.0,
        _ => return Err(ValueError::NotADuration),
    };
    let number: f64 = number.parse().map_err(|_| ValueError::NotADuration)?;
    let seconds = number * unit_ms / 1000.0;
    if seconds > MAX_DURATION.as_secs_f64() {
        return Err(ValueError::DurationTooLong);
    }
    let duration = Duration::try_from_secs_f64(seconds).map_err(|_| ValueError::NotADuration)?;
    if duration < Duration::from_millis(1) {
        return Err(ValueError::ZeroDuration);
    }
    Ok(duration)
}

/// Parses `20000/s` or `20000`: pages a second.
pub(crate) fn parse_rate(text: &str) -> Result<u32, ValueError> {
    let number = text.strip_suffix("/s").unwrap_or(text);
    match split_number(number) {
        Some((number, "")) => match number.parse() {
            Ok(0) => Err(ValueError::ZeroRate),
            Ok(rate) if rate <= MAX_RATE => Ok(rate),
            _ => Err(ValueError::RateTooHigh),
        },
        _ => Err(ValueError::NotARate),
    }
}

/// Longest time, in milliseconds, of the options that take some.
const MAX_LIMIT_MS: u64 = 60_000;

/// Parses a time in milliseconds.
pub(crate) fn parse_limit(text: &str) -> Result<Duration, ValueError> {
    match text.parse() {
        Ok(ms) if (1..=MAX_LIMIT_MS).contains(&ms) => Ok(Duration::from_millis(ms)),
        _ => Err(ValueError::BadLimit),
    }
}

/// Parses a number of pages that a peer may hold.
pub(crate) fn parse_pages(text: &str) -> Result<usize, ValueError> {
    let most = DEFAULT_SLOTS as usize;
    text.parse().ok().filter(|pages| (1..=most).contains(pages)).ok_or(ValueError::BadPages)
}

/// Parses a number of vCPUs; how many this host allows is another matter.
pub(crate) fn parse_vcpus(text: &str) -> Result<usize, ValueError> {
    match text.parse() {
        Ok(vcpus) if (1..=abi::MAX_VCPUS).contains(&vcpus) => Ok(vcpus),
        _ => Err(ValueError::BadVcpus),
    }
}

/// Parses a number of VMs.
pub(crate) fn parse_vms(text: &str) -> Result<usize, ValueError> {
    match text.parse() {
        Ok(vms) if (1..=MAX_VMS).contains(&vms) => Ok(vms),
        _ => Err(ValueError::BadVms),
    }
}

/// Parses a percentage.
pub(crate) fn parse_percent(text: &str) -> Result<u8, ValueError> {
    text.parse().ok().filter(|percent| *percent <= 100).ok_or(ValueError::BadPercent)
}

/// Parses a seed.
pub(crate) fn parse_seed(text: &str) -> Result<u64, ValueError> {
    text.parse().map_err(|_| ValueError::NotASeed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_error(text: &str) -> ValueError {
        text.parse::<Size>().unwrap_err()
    }

    #[test]
    fn sizes_take_binary_units_in_any_spelling() {
        let cases = [
            ("4096", 4096),
            ("64K", 64 << 10),
            ("64k", 64 << 10),
            ("64Ki", 64 << 10),
            ("256M", 256 << 20),
            ("256MiB", 256 << 20),
            ("256mb", 256 << 20),
            ("1G", 1 << 30),
            ("64Gi", 64 << 30),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("4096B", 4096),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse::<Size>(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in
            ["", "M", "-1M", "+1M", "1.5G", "12Q", "1 G", "0x1000", "1Gib ", "1i", "1KK", "٣K"]
        {
            assert_eq!(size_error(text), ValueError::NotASize, "{text}");
        }
        assert_eq!(size_error("0"), ValueError::ZeroSize);
        assert_eq!(size_error("0G"), ValueError::ZeroSize);
        assert_eq!(size_error("18446744073709551616"), ValueError::SizeOverflow);
        assert_eq!(size_error("16777216T"), ValueError::SizeOverflow);
        assert_eq!(size_error("5000"), ValueError::NotPages { bytes: 5000, next: 8192 });
        assert_eq!(
            size_error("18446744073709551615"),
            ValueError::NotPages { bytes: u64::MAX, next: u64::MAX - 4095 }
        );
    }

    #[test]
    fn sizes_are_written_as_they_are_read() {
        for text in ["4K", "64K", "256M", "1G", "3T", "16P", "516K"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
        assert_eq!(size(5000).to_string(), "5000");
        assert_eq!(size(0).to_string(), "0");
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("1h"), Ok(Duration::from_secs(3600)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        for text in ["", "30", "s", "-s", "--1s", "30 s", "1e3s", "NaNs", "infs", "..s", "1d"] {
            assert_eq!(parse_duration(text), Err(ValueError::NotADuration), "{text}");
        }
        for text in ["-1s", "-0s", "-100000h"] {
            assert_eq!(parse_duration(text), Err(ValueError::NegativeDuration), "{text}");
        }
        assert_eq!(parse_duration("0s"), Err(ValueError::ZeroDuration));
        assert_eq!(parse_duration("0.1ms"), Err(ValueError::ZeroDuration));
        assert_eq!(parse_duration("100000h"), Err(ValueError::DurationTooLong));
        let digits = format!("{}h", "9".repeat(400));
        assert_eq!(parse_duration(&digits), Err(ValueError::DurationTooLong));
    }

    #[test]
    fn rates_are_whole_pages_a_second() {
        assert_eq!(parse_rate("20000/s"), Ok(20_000));
        assert_eq!(parse_rate("1"), Ok(1));
        for text in ["", "/s", "-5/s", "5/m", "1.5/s", "many"] {
            assert_eq!(parse_rate(text), Err(ValueError::NotARate), "{text}");
        }
        assert_eq!(parse_rate("0/s"), Err(ValueError::ZeroRate));
        assert_eq!(parse_rate("99999999999/s"), Err(ValueError::RateTooHigh));
        assert_eq!(parse_rate("100000001/s"), Err(ValueError::RateTooHigh));
    }

    #[test]
    fn vcpus_are_bounded_by_the_contract_with_the_guest() {
        assert_eq!(parse_limit("1000"), Ok(Duration::from_secs(1)));
        assert_eq!(parse_pages("1024"), Ok(1024));
        for text in ["0", "60001", "-1", "", "1s"] {
            assert_eq!(parse_limit(text), Err(ValueError::BadLimit), "{text}");
            assert_eq!(parse_pages(text), Err(ValueError::BadPages), "{text}");
        }
        assert_eq!(parse_vcpus("1"), Ok(1));
        assert_eq!(parse_vcpus("1023"), Ok(1023));
        for text in ["0", "1024", "-1", "", "two", "99999999999999999999"] {
            assert_eq!(parse_vcpus(text), Err(ValueError::BadVcpus), "{text}");
            assert_eq!(parse_vms(text), Err(ValueError::BadVms), "{text}");
        }
    }

    #[test]
    fn percentages_end_at_100() {
        assert_eq!((parse_percent("0"), parse_percent("100")), (Ok(0), Ok(100)));
        for text in ["", "101", "-1", "5%", "half"] {
            assert_eq!(parse_percent(text), Err(ValueError::BadPercent), "{text}");
        }
    }

    #[test]
    fn seeds_are_any_64_bit_number() {
        assert_eq!(parse_seed("18446744073709551615"), Ok(u64::MAX));
        for text in ["", "-5", "x", "18446744073709551616"] {
            assert_eq!(parse_seed(text), Err(ValueError::NotASeed), "{text}");
        }
    }
}
