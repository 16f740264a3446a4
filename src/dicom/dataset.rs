//! A walker over the top-level elements of an encoded data set (PS3.5 section 7).
//!
//! Input: the bytes of a data set and its encoding. Output: tag, VR and a borrowed value of each element, up to and
//! including Pixel Data. Invariants: never panics, never allocates, reads each byte at most once, skips sequences by
//! length where they have one, and ends with an error that tells the offset of the fault. Deliberately absent: nested
//! data sets, a data dictionary (the caller knows the tags it asks for).

use crate::dicom::syntax::Encoding;
use std::io::Read;

/// (7FE0,0010).
pub const PIXEL_DATA: u32 = 0x7fe0_0010;
const ITEM: u32 = 0xfffe_e000;
const ITEM_END: u32 = 0xfffe_e00d;
const SEQUENCE_END: u32 = 0xfffe_e0dd;
const UNDEFINED: u32 = 0xffff_ffff;
/// Nesting of sequences of undefined length that is followed. Standard IODs nest about 8 deep; a recursion of 32
/// needs a few KiB of stack.
const MAX_DEPTH: u32 = 32;

/// Why a data set could not be walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DatasetError {
    /// An element, item or header runs over the end.
    #[error("data set ends inside an element that begins at byte {offset}")]
    Truncated {
        /// Where the element begins.
        offset: usize,
    },
    /// Bytes that are no element.
    #[error("data set is malformed at byte {offset}: {what}")]
    Malformed {
        /// Where the fault is.
        offset: usize,
        /// What was found.
        what: &'static str,
    },
}

/// One element. `value` of a sequence of undefined length is empty (its content was skipped).
#[derive(Clone, Copy)]
pub struct Element<'a> {
    /// Group and element number, `group << 16 | element`.
    pub tag: u32,
    /// The VR as encoded, or `[0, 0]` in implicit VR.
    pub vr: [u8; 2],
    /// The value field.
    pub value: &'a [u8],
    /// Numbers in the value are big endian.
    pub big_endian: bool,
}

/// Pixel Data as it lies in the data set. Whether the value is complete is for the decoder to judge.
#[derive(Clone, Copy)]
pub struct PixelData<'a> {
    /// The VR as encoded, or `[0, 0]` in implicit VR.
    pub vr: [u8; 2],
    /// The declared length; `None` for undefined length (encapsulated).
    pub declared: Option<usize>,
    /// Everything from the first byte of the value to the end of the data set.
    pub rest: &'a [u8],
}

/// What the walker met.
#[derive(Clone, Copy)]
pub enum Step<'a> {
    /// An element other than Pixel Data.
    Element(Element<'a>),
    /// Pixel Data; the walk ends here.
    PixelData(PixelData<'a>),
    /// The end of the data set.
    End,
}

/// Walks top-level elements.
pub struct Walker<'a> {
    bytes: &'a [u8],
    pos: usize,
    explicit: bool,
    big_endian: bool,
}

struct Head {
    tag: u32,
    vr: [u8; 2],
    length: u32,
    value_at: usize,
}

impl<'a> Walker<'a> {
    /// A walker over `bytes`, which must be inflated already if the transfer syntax is deflated.
    pub fn new(bytes: &'a [u8], encoding: Encoding) -> Self {
        Self { bytes, pos: 0, explicit: encoding.explicit, big_endian: encoding.big_endian }
    }

    /// Offset of the next element.
    pub fn position(&self) -> usize {
        self.pos
    }

    /// The next element.
    ///
    /// # Errors
    /// The data set is truncated or malformed; the walk cannot go on.
    pub fn step(&mut self) -> Result<Step<'a>, DatasetError> {
        if self.pos == self.bytes.len() {
            return Ok(Step::End);
        }
        let head = read_head(self.bytes, self.pos, self.explicit, self.big_endian)?;
        let start = self.pos;
        if head.tag == PIXEL_DATA {
            self.pos = self.bytes.len();
            let declared = (head.length != UNDEFINED).then_some(head.length as usize);
            return Ok(Step::PixelData(PixelData { vr: head.vr, declared, rest: &self.bytes[head.value_at..] }));
        }
        let value: &[u8] = if head.length == UNDEFINED {
            // An undefined-length UN is a sequence in implicit VR little endian (PS3.5 6.2.2 note 7).
            let unknown = head.vr == *b"UN";
            self.pos =
                skip_sequence(self.bytes, head.value_at, self.explicit && !unknown, self.big_endian && !unknown, 0)?;
            &[]
        } else {
            let end = head.value_at + head.length as usize;
            let value = self.bytes.get(head.value_at..end).ok_or(DatasetError::Truncated { offset: start })?;
            self.pos = end;
            value
        };
        // A known VR written as UN keeps its little endian encoding whatever the data set's (PS3.5 6.2.2).
        let big_endian = self.big_endian && head.vr != *b"UN";
        Ok(Step::Element(Element { tag: head.tag, vr: head.vr, value, big_endian }))
    }
}

fn u16_at(bytes: &[u8], at: usize, big_endian: bool) -> Option<u16> {
    let raw = bytes.get(at..at + 2)?;
    let raw = [raw[0], raw[1]];
    Some(if big_endian { u16::from_be_bytes(raw) } else { u16::from_le_bytes(raw) })
}

fn u32_at(bytes: &[u8], at: usize, big_endian: bool) -> Option<u32> {
    let raw = bytes.get(at..at + 4)?;
    let raw = [raw[0], raw[1], raw[2], raw[3]];
    Some(if big_endian { u32::from_be_bytes(raw) } else { u32::from_le_bytes(raw) })
}

fn read_head(bytes: &[u8], at: usize, explicit: bool, big_endian: bool) -> Result<Head, DatasetError> {
    let truncated = DatasetError::Truncated { offset: at };
    let group = u16_at(bytes, at, big_endian).ok_or(truncated)?;
    let element = u16_at(bytes, at + 2, big_endian).ok_or(truncated)?;
    let tag = u32::from(group) << 16 | u32::from(element);
    if !explicit || group == 0xfffe {
        let length = u32_at(bytes, at + 4, big_endian).ok_or(truncated)?;
        return Ok(Head { tag, vr: [0, 0], length, value_at: at + 8 });
    }
    let vr = bytes.get(at + 4..at + 6).ok_or(truncated)?;
    let vr = [vr[0], vr[1]];
    if !vr.iter().all(u8::is_ascii_uppercase) {
        return Err(DatasetError::Malformed { offset: at, what: "no value representation where one is expected" });
    }
    if short_length(vr) {
        let length = u16_at(bytes, at + 6, big_endian).ok_or(truncated)?;
        Ok(Head { tag, vr, length: u32::from(length), value_at: at + 8 })
    } else {
        let length = u32_at(bytes, at + 8, big_endian).ok_or(truncated)?;
        Ok(Head { tag, vr, length, value_at: at + 12 })
    }
}

/// VRs with a 16-bit length (PS3.5 table 7.1-2); all others, also future ones, have 32 bits.
fn short_length(vr: [u8; 2]) -> bool {
    matches!(
        &vr,
        b"AE"
            | b"AS"
            | b"AT"
            | b"CS"
            | b"DA"
            | b"DS"
            | b"DT"
            | b"FL"
            | b"FD"
            | b"IS"
            | b"LO"
            | b"LT"
            | b"PN"
            | b"SH"
            | b"SL"
            | b"SS"
            | b"ST"
            | b"TM"
            | b"UI"
            | b"UL"
            | b"US"
    )
}

/// The offset behind the sequence delimiter of a sequence of undefined length whose first item is at `at`.
fn skip_sequence(
    bytes: &[u8],
    mut at: usize,
    explicit: bool,
    big_endian: bool,
    depth: u32,
) -> Result<usize, DatasetError> {
    if depth >= MAX_DEPTH {
        return Err(DatasetError::Malformed { offset: at, what: "sequences nest too deep" });
    }
    loop {
        let item = read_head(bytes, at, explicit, big_endian)?;
        match item.tag {
            SEQUENCE_END => return Ok(item.value_at),
            ITEM if item.length != UNDEFINED => at = advance(bytes, at, &item)?,
            ITEM => {
                at = item.value_at;
                loop {
                    let inner = read_head(bytes, at, explicit, big_endian)?;
                    if inner.tag == ITEM_END {
                        at = inner.value_at;
                        break;
                    }
                    at = if inner.length == UNDEFINED {
                        let unknown = inner.vr == *b"UN";
                        skip_sequence(bytes, inner.value_at, explicit && !unknown, big_endian && !unknown, depth + 1)?
                    } else {
                        advance(bytes, at, &inner)?
                    };
                }
            }
            _ => return Err(DatasetError::Malformed { offset: at, what: "no item where one is expected" }),
        }
    }
}

fn advance(bytes: &[u8], at: usize, head: &Head) -> Result<usize, DatasetError> {
    let end = head.value_at + head.length as usize;
    if end > bytes.len() {
        return Err(DatasetError::Truncated { offset: at });
    }
    Ok(end)
}

impl<'a> PixelData<'a> {
    /// Calls `fragment` with each fragment of encapsulated pixel data, the Basic Offset Table left out (PS3.5 A.4).
    ///
    /// # Errors
    /// The value is no list of items ended by a sequence delimiter.
    pub fn for_each_fragment(&self, mut fragment: impl FnMut(&'a [u8])) -> Result<(), DatasetError> {
        let mut at = 0;
        let mut first = true;
        loop {
            // Fragments exist in little endian syntaxes only.
            let item = read_head(self.rest, at, false, false)?;
            match item.tag {
                SEQUENCE_END => return Ok(()),
                ITEM if item.length != UNDEFINED => {
                    let end = advance(self.rest, at, &item)?;
                    if !first {
                        fragment(&self.rest[item.value_at..end]);
                    }
                    first = false;
                    at = end;
                }
                _ => {
                    return Err(DatasetError::Malformed {
                        offset: at,
                        what: "no pixel data fragment where one is expected",
                    });
                }
            }
        }
    }
}

impl<'a> Element<'a> {
    /// The value without padding, byte for byte.
    pub fn trimmed(&self) -> &'a [u8] {
        let mut v = self.value;
        while let [rest @ .., b' ' | 0] = v {
            v = rest;
        }
        while let [b' ', rest @ ..] = v {
            v = rest;
        }
        v
    }

    /// Numbers in the value, at most `out.len()`; returns how many values there are (which may be more).
    ///
    /// The VR as encoded decides; `implied` is the VR of the dictionary for implicit VR and UN. Text VRs are parsed as
    /// decimal strings. `None`: not a number, a length that is no multiple of the VR's, or not finite.
    pub fn numbers(&self, implied: [u8; 2], out: &mut [f64]) -> Option<usize> {
        let vr = if self.vr == [0, 0] || self.vr == *b"UN" { implied } else { self.vr };
        let width = match &vr {
            b"US" | b"SS" => 2,
            b"UL" | b"SL" | b"FL" => 4,
            b"FD" => 8,
            b"DS" | b"IS" | b"LO" | b"SH" | b"CS" | b"ST" | b"LT" | b"UT" => 0,
            _ => return None,
        };
        if width == 0 {
            let text = std::str::from_utf8(self.trimmed()).ok()?;
            if text.is_empty() {
                return Some(0);
            }
            let mut count = 0;
            for part in text.split('\\') {
                let number: f64 = part.trim_matches([' ', '\0']).parse().ok()?;
                if !number.is_finite() {
                    return None;
                }
                if let Some(slot) = out.get_mut(count) {
                    *slot = number;
                }
                count += 1;
            }
            return Some(count);
        }
        if !self.value.len().is_multiple_of(width) {
            return None;
        }
        for (chunk, slot) in self.value.chunks_exact(width).zip(out.iter_mut()) {
            let mut le = [0u8; 8];
            le[..width].copy_from_slice(chunk);
            if self.big_endian {
                le[..width].reverse();
            }
            let bits = u64::from_le_bytes(le);
            *slot = match &vr {
                b"US" | b"UL" => bits as f64,
                b"SS" => f64::from(bits as u16 as i16),
                b"SL" => f64::from(bits as u32 as i32),
                b"FL" => f64::from(f32::from_bits(bits as u32)),
                _ => f64::from_bits(bits),
            };
            if !slot.is_finite() {
                return None;
            }
        }
        Some(self.value.len() / width)
    }

    /// The one number of the value. Several values count as one if they are equal.
    pub fn number(&self, implied: [u8; 2]) -> Option<f64> {
        let mut values = [0.0; 8];
        let count = self.numbers(implied, &mut values)?;
        let all = values.get(..count)?;
        let first = *all.first()?;
        all.iter().all(|v| *v == first).then_some(first)
    }
}

/// Inflates a deflated data set (PS3.5 A.5), to at most `max_bytes`.
///
/// Returns the bytes and whether the stream ended within the bound. Allocates no more than about twice what comes out.
///
/// # Errors
/// The stream is no raw deflate stream, or is cut off.
pub fn inflate(bytes: &[u8], max_bytes: usize) -> std::io::Result<(Vec<u8>, bool)> {
    let mut out = Vec::new();
    let limit = max_bytes as u64 + 1;
    flate2::read::DeflateDecoder::new(bytes).take(limit).read_to_end(&mut out)?;
    let complete = out.len() <= max_bytes;
    out.truncate(max_bytes);
    Ok((out, complete))
}
