//! Ctrl-A at the console: what is for Gnomon and what for the guest.

/// Ctrl-A, which says that the next key is for Gnomon.
const ESCAPE: u8 = 0x01;

/// What keys come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Typed {
    /// For the guest.
    pub(super) keys: Vec<u8>,
    /// The guest is to be ended.
    pub(super) ends: bool,
}

/// Sorts keys; remembers a Ctrl-A at the end of those before.
#[derive(Debug, Default)]
pub(super) struct Escape {
    is_open: bool,
}

impl Escape {
    /// Ctrl-A x ends the guest, Ctrl-A a (or another Ctrl-A) is a Ctrl-A for it; after Ctrl-A any
    /// other key does nothing.
    pub(super) fn sort(&mut self, keys: &[u8]) -> Typed {
        let mut typed = Typed::default();
        for &key in keys {
            match (std::mem::take(&mut self.is_open), key) {
                (false, ESCAPE) => self.is_open = true,
                (false, key) => typed.keys.push(key),
                (true, b'x' | b'X') => {
                    typed.ends = true;
                    break;
                }
                (true, b'a' | ESCAPE) => typed.keys.push(ESCAPE),
                (true, _) => {}
            }
        }
        typed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut escape = Escape::default();
        let mut all = Typed::default();
        for piece in pieces {
            let typed = escape.sort(piece);
            all.keys.extend(typed.keys);
            all.ends |= typed.ends;
        }
        (all.keys, all.ends)
    }

    #[test]
    fn ctrl_a_x_ends_and_ctrl_a_a_is_a_ctrl_a() {
        assert_eq!(sorted(&[b"ls\r\x03"]), (b"ls\r\x03".to_vec(), false));
        assert_eq!(sorted(&[b"a\x01xb"]), (b"a".to_vec(), true));
        assert_eq!(sorted(&[b"\x01a\x01\x01x"]), (b"\x01\x01x".to_vec(), false));
        assert_eq!(sorted(&[b"\x01?b"]), (b"b".to_vec(), false));
    }

    #[test]
    fn it_does_not_matter_how_keys_are_cut_into_reads() {
        assert_eq!(sorted(&[b"a\x01", b"x"]), (b"a".to_vec(), true));
        assert_eq!(sorted(&[b"\x01", b"", b"a"]), (b"\x01".to_vec(), false));
    }
}
