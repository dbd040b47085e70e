//! A short text without memory of its own.

use std::fmt::{self, Write};

/// Bytes that fit.
const ROOM: usize = 160;

/// At most 160 bytes of text, in place; what does not fit is cut off.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Words {
    bytes: [u8; ROOM],
    length: u8,
}

impl Words {
    /// Without a word.
    pub const NONE: Self = Self { bytes: [0; ROOM], length: 0 };

    /// What `text` says, as far as it fits.
    pub fn of(text: impl fmt::Display) -> Self {
        let mut words = Self::NONE;
        // The rest is cut off.
        let _ = write!(words, "{text}");
        words
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        let bytes = &self.bytes[..usize::from(self.length)];
        std::str::from_utf8(bytes).expect("it is only ever cut between characters")
    }
}

impl Default for Words {
    fn default() -> Self {
        Self::NONE
    }
}

impl Write for Words {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let begin = usize::from(self.length);
        let mut length = text.len().min(ROOM - begin);
        while !text.is_char_boundary(length) {
            length -= 1;
        }
        self.bytes[begin..begin + length].copy_from_slice(&text.as_bytes()[..length]);
        self.length = u8::try_from(begin + length).expect("ROOM fits into it");
        if length < text.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_cut_off_between_characters() {
        assert_eq!(Words::of("kill -9").as_str(), "kill -9");
        assert_eq!(Words::of(format_args!("{}{}", "x".repeat(159), "ä")).as_str(), "x".repeat(159));
        assert_eq!(Words::of("ä".repeat(90)).as_str(), "ä".repeat(80));
        let again = Words::of(format_args!("{}{}", "ä".repeat(100), "b"));
        assert_eq!(again.as_str(), "ä".repeat(80), "nothing after a cut");
        assert_eq!(Words::NONE.as_str(), "");
    }
}
