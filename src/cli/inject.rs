//! The items of `--inject` as they are written: `FAULT[=VALUE][@WHEN]`.
//!
//! Guarantee: as in [`values`](super::values): no side effects, and an error is the end of a
//! sentence that begins with the item: what is wrong with it, and what to write instead.

use std::num::NonZeroU64;
use std::time::Duration;

use nix::errno::Errno;

use crate::export_rmap::lab::PAUSE;
use crate::host_mm::hooks::{
    EINTR, FRAME_ENOMEM, SHORT_WRITE, SLOW_NOTIFIER, SWAP_FULL, SWAP_READ, SWAP_WRITE,
};
use crate::host_mm::{Injection, When};
use crate::iotlb::hooks::SLOW_DEVICE;
use crate::peer::hooks::{PEER_HANG, PEER_KILL};

/// Every item, as it is written.
macro_rules! items {
    () => {
        "swap-write=ERRNO@WHEN, swap-read=ERRNO@WHEN, swap-full[@N], short-write@WHEN, slow-notifier=MS[@WHEN], slow-device=MS[@WHEN], frame-enomem=P, eintr[=P], pause[=P], peer-hang[@N], peer-kill[@N]"
    };
}

/// What the help says of the option.
pub(crate) const HELP: &str = concat!(
    "Let the host go wrong: ",
    items!(),
    "; WHEN is N (the N-th call), N+ (all from there), N/M (the N-th and each M-th after it) or a probability such as 0.01"
);

/// Errors that swap can be told to fail with.
const ERRNOS: [(&str, Errno); 4] = [
    ("EIO", Errno::EIO),
    ("ENOSPC", Errno::ENOSPC),
    ("ENOMEM", Errno::ENOMEM),
    ("EDQUOT", Errno::EDQUOT),
];
/// Longest that a call of a notifier can be made to take.
const MAX_SLOWNESS_MS: u64 = 10_000;
/// How often calls are interrupted unless it is said.
const DEFAULT_EINTR: f64 = 0.1;
/// How often there is a pause at a point of the protocol unless it is said.
const DEFAULT_PAUSE: f64 = 0.02;

/// What is wrong with an item.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InjectError {
    /// No fault of that name.
    #[error("there is no such fault; choose from {}", items!())]
    Unknown,
    /// Not an errno that swap fails with.
    #[error("{fault} takes the error to fail with, one of {}, such as {fault}=EIO@5", errnos())]
    Errno { fault: &'static str },
    /// Which calls are struck is missing or not understood.
    #[error(
        "after {fault} say with @ which calls are struck: @N the N-th, @N+ all from the N-th, @N/M the N-th and each M-th after it, or a probability above 0 and up to {}, such as @0.01",
        When::MAX_CHANCE
    )]
    When { fault: &'static str },
    /// Not where swap is full from.
    #[error("swap-full takes the number of the first allocation that fails, such as swap-full@100")]
    FullFrom,
    /// Not a probability.
    #[error(
        "{fault} takes a probability above 0 and up to {}, such as {fault}=0.01",
        When::MAX_CHANCE
    )]
    Chance { fault: &'static str },
    /// Not a time.
    #[error(
        "{fault} takes 1 to {MAX_SLOWNESS_MS} milliseconds and which calls take so long, such as {fault}=5@0.01"
    )]
    Slowness { fault: &'static str },
    /// Not the number of an invalidation.
    #[error(
        "{fault} takes the number of the invalidation at which it strikes, such as {fault}@100"
    )]
    Peer { fault: String },
    /// A value where none belongs.
    #[error("{fault} takes no value: leave out \"={value}\"")]
    NoValue { fault: &'static str, value: String },
}

fn errnos() -> String {
    ERRNOS.map(|(name, _)| name).join(", ")
}

/// Parses one item.
pub(crate) fn parse_injection(text: &str) -> Result<Injection, InjectError> {
    let (rest, when) = match text.split_once('@') {
        Some((rest, when)) => (rest, Some(when)),
        None => (text, None),
    };
    let (name, value) = match rest.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (rest, None),
    };
    let (fault, when) = match name {
        "swap-write" => {
            (SWAP_WRITE.failing(errno("swap-write", value)?), calls("swap-write", when)?)
        }
        "swap-read" => (SWAP_READ.failing(errno("swap-read", value)?), calls("swap-read", when)?),
        "swap-full" => {
            no_value("swap-full", value)?;
            (SWAP_FULL.plain(), full_from(when)?)
        }
        "short-write" => {
            no_value("short-write", value)?;
            (SHORT_WRITE.plain(), calls("short-write", when)?)
        }
        "slow-notifier" => {
            let (time, when) = slowness("slow-notifier", value, when)?;
            (SLOW_NOTIFIER.lasting(time), when)
        }
        "slow-device" => {
            let (time, when) = slowness("slow-device", value, when)?;
            (SLOW_DEVICE.lasting(time), when)
        }
        "frame-enomem" => (FRAME_ENOMEM.plain(), only_chance("frame-enomem", value, when)?),
        "eintr" if value.is_none() && when.is_none() => {
            (EINTR.plain(), When::Chance(DEFAULT_EINTR))
        }
        "eintr" => (EINTR.plain(), only_chance("eintr", value, when)?),
        "pause" if value.is_none() && when.is_none() => {
            (PAUSE.plain(), When::Chance(DEFAULT_PAUSE))
        }
        "pause" => (PAUSE.plain(), only_chance("pause", value, when)?),
        "peer-hang" => {
            no_value("peer-hang", value)?;
            (
                PEER_HANG.plain(),
                peer_from(name, when)?.map_or(When::ALWAYS, |first| {
                    // One that hangs does not recover.
                    When::Every { first, step: NonZeroU64::MIN }
                }),
            )
        }
        "peer-kill" => {
            no_value("peer-kill", value)?;
            (PEER_KILL.plain(), When::Once(peer_from(name, when)?.unwrap_or(NonZeroU64::MIN)))
        }
        _ => return Err(InjectError::Unknown),
    };
    Ok(Injection { fault, when })
}

fn no_value(fault: &'static str, value: Option<&str>) -> Result<(), InjectError> {
    match value {
        None => Ok(()),
        Some(value) => Err(InjectError::NoValue { fault, value: value.to_owned() }),
    }
}

fn errno(fault: &'static str, value: Option<&str>) -> Result<Errno, InjectError> {
    let found = ERRNOS.iter().find(|(name, _)| Some(*name) == value);
    found.map(|&(_, errno)| errno).ok_or(InjectError::Errno { fault })
}

/// The calls that an item strikes, as they stand behind its `@`.
fn calls(fault: &'static str, text: Option<&str>) -> Result<When, InjectError> {
    let text = text.ok_or(InjectError::When { fault })?;
    let when = if text.contains('.') {
        chance(text).map(When::Chance)
    } else if let Some(first) = text.strip_suffix('+') {
        number(first).map(|first| When::Every { first, step: NonZeroU64::MIN })
    } else if let Some((first, step)) = text.split_once('/') {
        number(first).zip(number(step)).map(|(first, step)| When::Every { first, step })
    } else {
        number(text).map(When::Once)
    };
    when.ok_or(InjectError::When { fault })
}

/// A swap that is full stays so.
fn full_from(text: Option<&str>) -> Result<When, InjectError> {
    let first = match text {
        None => Some(NonZeroU64::MIN),
        Some(text) => number(text.strip_suffix('+').unwrap_or(text)),
    };
    let first = first.ok_or(InjectError::FullFrom)?;
    Ok(When::Every { first, step: NonZeroU64::MIN })
}

/// The invalidation at which a peer goes wrong; `None` if it is not said.
fn peer_from(fault: &str, text: Option<&str>) -> Result<Option<NonZeroU64>, InjectError> {
    let Some(text) = text else { return Ok(None) };
    let text = if fault == "peer-hang" { text.strip_suffix('+').unwrap_or(text) } else { text };
    number(text).map(Some).ok_or_else(|| InjectError::Peer { fault: fault.to_owned() })
}

fn only_chance(
    fault: &'static str,
    value: Option<&str>,
    when: Option<&str>,
) -> Result<When, InjectError> {
    let value = value.filter(|_| when.is_none());
    value.and_then(chance).map(When::Chance).ok_or(InjectError::Chance { fault })
}

/// How slow, and when: always, if that is left out.
fn slowness(
    fault: &'static str,
    value: Option<&str>,
    when: Option<&str>,
) -> Result<(Duration, When), InjectError> {
    let when = when.map_or(Ok(When::ALWAYS), |when| calls(fault, Some(when)))?;
    let ms = value.and_then(number).map(NonZeroU64::get);
    let ms = ms.filter(|&ms| ms <= MAX_SLOWNESS_MS).ok_or(InjectError::Slowness { fault })?;
    Ok((Duration::from_millis(ms), when))
}

/// Digits only: `parse` takes a sign, too.
fn number(text: &str) -> Option<NonZeroU64> {
    text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
}

fn chance(text: &str) -> Option<f64> {
    text.parse().ok().filter(|&chance| chance > 0.0 && chance <= When::MAX_CHANCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Injection {
        parse_injection(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn every_item_is_written_as_it_is_read() {
        for text in [
            "swap-write=EIO@5",
            "swap-write=ENOSPC@5+",
            "swap-read=ENOMEM@1/7",
            "swap-read=EDQUOT@0.01",
            "swap-full@100+",
            "short-write@3",
            "slow-notifier=20",
            "slow-notifier=20@0.5",
            "slow-device=2",
            "slow-device=1@3/7",
            "frame-enomem=0.01",
            "eintr=0.25",
            "peer-hang@7+",
            "peer-kill@7",
        ] {
            assert_eq!(parsed(text).to_string(), text);
        }
    }

    #[test]
    fn what_is_left_out_has_its_meaning() {
        assert_eq!(parsed("swap-full"), parsed("swap-full@1+"));
        assert_eq!(parsed("swap-full@9"), parsed("swap-full@9+"), "full stays full");
        assert_eq!(parsed("slow-notifier=5"), parsed("slow-notifier=5@1+"));
        assert_eq!(parsed("eintr").when, When::Chance(DEFAULT_EINTR));
        assert_eq!(parsed("pause").when, When::Chance(DEFAULT_PAUSE));
        assert_eq!(parsed("peer-hang@9"), parsed("peer-hang@9+"), "it does not recover");
        assert_eq!(parsed("peer-hang"), parsed("peer-hang@1+"));
        assert_eq!(parsed("peer-kill"), parsed("peer-kill@1"));
    }

    #[test]
    fn each_mistake_names_the_item_and_what_is_allowed() {
        for (text, parts) in [
            ("", &["no such fault", "swap-write=ERRNO@WHEN", "eintr[=P]"][..]),
            ("swap-rite=EIO@1", &["no such fault", "swap-full[@N]"]),
            ("peer-hung", &["no such fault"]),
            ("swap-write@1", &["swap-write takes the error", "EIO, ENOSPC, ENOMEM"]),
            ("swap-write=EBADF@1", &["swap-write takes the error", "such as swap-write=EIO@5"]),
            ("swap-read=eio@1", &["swap-read takes the error"]),
            ("swap-write=EIO", &["after swap-write", "@N the N-th", "@0.01"]),
            ("swap-write=EIO@0", &["after swap-write"]),
            ("swap-write=EIO@-1", &["after swap-write"]),
            ("swap-write=EIO@+1", &["after swap-write"]),
            ("swap-write=EIO@1/0", &["after swap-write"]),
            ("swap-write=EIO@1.0", &["up to 0.9"]),
            ("swap-write=EIO@1@2", &["after swap-write"]),
            ("swap-read=EIO@0.0", &["after swap-read"]),
            ("swap-read=EIO@99999999999999999999", &["after swap-read"]),
            ("swap-full=1", &["swap-full takes no value", "leave out \"=1\""]),
            ("swap-full@x", &["such as swap-full@100"]),
            ("short-write", &["after short-write"]),
            ("short-write=1@2", &["short-write takes no value"]),
            ("slow-notifier", &["1 to 10000 milliseconds", "slow-notifier=5@0.01"]),
            ("slow-notifier=0", &["1 to 10000"]),
            ("slow-notifier=10001", &["1 to 10000"]),
            ("slow-notifier=5@", &["after slow-notifier"]),
            ("slow-device=0", &["slow-device takes 1 to 10000", "slow-device=5@0.01"]),
            ("slow-device=5@x", &["after slow-device"]),
            ("frame-enomem", &["frame-enomem takes a probability", "frame-enomem=0.01"]),
            ("frame-enomem=1", &["up to 0.9"]),
            ("frame-enomem=nan", &["probability"]),
            ("frame-enomem=0.1@5", &["frame-enomem takes a probability"]),
            ("eintr=2", &["eintr takes a probability"]),
            ("pause=1", &["pause takes a probability"]),
            ("pause@5", &["pause takes a probability"]),
            ("peer-hang=1", &["peer-hang takes no value"]),
            ("peer-hang@0", &["such as peer-hang@100"]),
            ("peer-kill@0.5", &["such as peer-kill@100"]),
            ("peer-kill@5+", &["such as peer-kill@100"]),
        ] {
            let said = parse_injection(text).unwrap_err().to_string();
            assert!(!said.contains('\n'), "{said}");
            for part in parts {
                assert!(said.contains(part), "{text}: no {part:?} in: {said}");
            }
        }
    }
}
