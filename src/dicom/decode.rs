//! Pixel Data to HU.
//!
//! Input: an encoded data set and its header. Output: HU, rounded and saturated to i16, in the stored row-major order,
//! written into the caller's slot. Faults are [`Reason::Undecodable`] refusals that say what was expected.
//!
//! The conversion, per sample (PS3.3 C.7.6.3.1, C.7.5.1.1.2, C.11.1):
//!
//! ```text
//! v  = bits HighBit .. HighBit-BitsStored+1 of the allocated word, sign-extended if PixelRepresentation is 1
//! HU = -1024                                      if v is padding
//!      round_half_away_from_zero(slope * v + intercept), saturated to i16, otherwise
//! ```
//!
//! - Bits outside BitsStored (old overlays) are masked away.
//! - Padding is compared on stored values, before the rescale: `v`, or the whole allocated word, equals
//!   PixelPaddingValue (scanners write the 16-bit pattern even where fewer bits are stored); with a
//!   PixelPaddingRangeLimit every `v` from the one to the other. It becomes air.
//! - MONOCHROME1 changes nothing: PhotometricInterpretation is about display, the modality LUT comes before it
//!   (PS3.4 figure N.2-1).
//!
//! Codecs come from `dicom-transfer-syntax-registry` and are contained: the frame's fragments are joined before they
//! see it, the stream's own header is compared with the data set's before anything is allocated from it (one
//! component, same size, same sample width), output has a fixed size, a panic is caught. RLE is decoded here: the
//! registry's decoder grows without bound on hostile runs and panics on fragments. 12-bit lossy JPEG has no decoder.
//! Deliberately absent: colour, multi-frame, palette, modality LUT sequences.

use crate::dicom::dataset::{PixelData, Step, Walker, inflate};
use crate::dicom::header::{MAX_INFLATED_HEADER, MAX_ROWS_COLUMNS, PixelLayout, SliceHeader};
use crate::dicom::syntax::{self, PixelCoding};
use crate::volume::refusal::{Reason, Refusal};
use dicom_encoding::TransferSyntaxIndex;
use dicom_encoding::adapters::{PixelDataObject, RawPixelData};
use dicom_transfer_syntax_registry::TransferSyntaxRegistry;
use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// HU given to padding: air.
pub const PADDING_HU: i16 = -1024;

/// Decodes slices to HU. Keeps its buffers: a few native slices' worth, at most
/// `2 * 4096 * 4096 * 2` bytes of codec output and input, and a table of 65,536 HU.
pub struct PixelDecoder {
    /// Joined fragments of one frame.
    joined: Vec<u8>,
    /// A codec's native output.
    native: Vec<u8>,
    /// HU by allocated word, for the layout it was made for.
    table: Vec<i16>,
    table_of: Option<TableKey>,
}

/// Everything the word-to-HU table depends on.
#[derive(Clone, Copy, PartialEq)]
struct TableKey {
    bits_allocated: u16,
    bits_stored: u16,
    high_bit: u16,
    signed: bool,
    slope: u64,
    intercept: u64,
    padding: Option<i32>,
    padding_limit: Option<i32>,
}

impl Default for PixelDecoder {
    fn default() -> Self {
        Self::new()
    }
}

fn undecodable(detail: impl Into<String>) -> Refusal {
    Refusal::new(Reason::Undecodable, detail)
}

impl PixelDecoder {
    /// A decoder with empty buffers.
    pub fn new() -> Self {
        Self { joined: Vec::new(), native: Vec::new(), table: Vec::new(), table_of: None }
    }

    /// Decodes the one frame of `dataset` into `out`, rows x columns HU in stored order.
    ///
    /// `header` must be [`parse_header`](crate::dicom::header::parse_header) of the same data set.
    ///
    /// # Errors
    /// [`Reason::Undecodable`] with what was expected; `out` may then hold anything.
    ///
    /// # Panics
    /// `out` is not rows x columns long although the header is sound: a fault of the caller.
    pub fn decode_hu(
        &mut self,
        dataset: &[u8],
        transfer_syntax_uid: &str,
        header: &SliceHeader,
        out: &mut [i16],
    ) -> Result<(), Refusal> {
        let encoding =
            syntax::encoding(transfer_syntax_uid).ok_or_else(|| undecodable("the transfer syntax is unknown"))?;
        if let Some(fault) = &header.pixel_fault {
            return Err(fault.clone());
        }
        if header.number_of_frames != 1 {
            return Err(undecodable(format!("expected one frame, got NumberOfFrames {}", header.number_of_frames)));
        }
        let (rows, columns) = (header.rows as usize, header.columns as usize);
        assert_eq!(out.len(), rows * columns, "the output of a slice is rows x columns");
        debug_assert!(header.rows <= MAX_ROWS_COLUMNS && header.columns <= MAX_ROWS_COLUMNS);
        let word = usize::from(header.pixel.bits_allocated / 8);
        let native_len = rows * columns * word;

        let inflated;
        let mut bytes = dataset;
        if encoding.deflated {
            // Pixels, their header, a trailing pad and a little more.
            let (data, _) = inflate(dataset, MAX_INFLATED_HEADER + native_len)
                .map_err(|e| undecodable(format!("the deflated data set is broken: {e}")))?;
            inflated = data;
            bytes = &inflated;
        }
        let pixels = find_pixel_data(bytes, encoding)?;
        let layout = &header.pixel;
        match (encoding.pixels, pixels.declared) {
            (PixelCoding::Native, Some(declared)) => {
                let value = pixels.rest.get(..declared).ok_or_else(|| {
                    undecodable(format!(
                        "Pixel Data is truncated: {declared} bytes declared, {} there",
                        pixels.rest.len()
                    ))
                })?;
                let value = native_value(value, native_len)?;
                // 8-bit samples written as OW in big endian are swapped within 16-bit words (PS3.5 annex D).
                let swap_bytes = encoding.big_endian && (word == 2 || pixels.vr == *b"OW");
                self.convert(value, swap_bytes, layout, out);
                Ok(())
            }
            (PixelCoding::Native, None) => {
                Err(undecodable("Pixel Data is encapsulated although the transfer syntax is a native one"))
            }
            (_, Some(_)) => {
                Err(undecodable("Pixel Data is native although the transfer syntax is an encapsulated one"))
            }
            (PixelCoding::Unsupported, None) => Err(undecodable("the transfer syntax has no decoder here")),
            (coding, None) => {
                let mut joined = std::mem::take(&mut self.joined);
                let mut native = std::mem::take(&mut self.native);
                let result = one_frame(&pixels, &mut joined).and_then(|frame| match coding {
                    PixelCoding::EncapsulatedNative => {
                        let value = native_value(frame, native_len)?;
                        self.convert(value, false, layout, out);
                        Ok(())
                    }
                    PixelCoding::Rle => {
                        decode_rle(frame, rows * columns, word, &mut native)?;
                        self.convert(&native, false, layout, out);
                        Ok(())
                    }
                    _ => {
                        check_stream(frame, coding, header)?;
                        run_codec(frame, transfer_syntax_uid, header, native_len, &mut native)?;
                        self.convert(&native, false, layout, out);
                        Ok(())
                    }
                });
                self.joined = joined;
                self.native = native;
                result
            }
        }
    }

    /// Converts allocated words to HU. `native` holds `out.len()` words; `swap`: they are big endian.
    fn convert(&mut self, native: &[u8], swap: bool, layout: &PixelLayout, out: &mut [i16]) {
        if layout.bits_allocated == 8 {
            self.make_table(layout);
            if swap {
                for (pair, hu) in native.chunks(2).zip(out.chunks_mut(2)) {
                    for (i, hu) in hu.iter_mut().enumerate() {
                        *hu = self.table[usize::from(*pair.get(1 - i).unwrap_or(&pair[0]))];
                    }
                }
            } else {
                for (byte, hu) in native.iter().zip(out) {
                    *hu = self.table[usize::from(*byte)];
                }
            }
            return;
        }
        let (words, _) = native.as_chunks::<2>();
        if let Some(offset) = whole_offset(layout) {
            if swap {
                shift_words(words.iter().map(|w| u16::from_be_bytes(*w)), layout, offset, out);
            } else {
                shift_words(words.iter().map(|w| u16::from_le_bytes(*w)), layout, offset, out);
            }
            return;
        }
        self.make_table(layout);
        for (word, hu) in words.iter().zip(out) {
            let word = if swap { u16::from_be_bytes(*word) } else { u16::from_le_bytes(*word) };
            *hu = self.table[usize::from(word)];
        }
    }

    fn make_table(&mut self, layout: &PixelLayout) {
        let key = TableKey {
            bits_allocated: layout.bits_allocated,
            bits_stored: layout.bits_stored,
            high_bit: layout.high_bit,
            signed: layout.signed,
            slope: layout.slope.to_bits(),
            intercept: layout.intercept.to_bits(),
            padding: layout.padding_value,
            padding_limit: layout.padding_range_limit,
        };
        if self.table_of == Some(key) {
            return;
        }
        let words = 1u32 << layout.bits_allocated;
        self.table.clear();
        self.table.extend((0..words).map(|word| word_to_hu(word as u16, layout)));
        self.table_of = Some(key);
    }
}

/// The stored value in an allocated word.
fn stored_value(word: u16, layout: &PixelLayout) -> i32 {
    let shifted = u32::from(word) >> (layout.high_bit + 1 - layout.bits_stored);
    let unused = 32 - u32::from(layout.bits_stored);
    if layout.signed { ((shifted << unused) as i32) >> unused } else { ((shifted << unused) >> unused) as i32 }
}

fn is_padding(word: u16, value: i32, layout: &PixelLayout) -> bool {
    let Some(padding) = layout.padding_value else { return false };
    match layout.padding_range_limit {
        Some(limit) => (padding.min(limit)..=padding.max(limit)).contains(&value),
        None => value == padding || (layout.bits_allocated == 16 && word == padding as u16),
    }
}

/// The definition of the conversion; the fast paths are checked against it.
fn word_to_hu(word: u16, layout: &PixelLayout) -> i16 {
    let value = stored_value(word, layout);
    if is_padding(word, value, layout) {
        return PADDING_HU;
    }
    // `f64::round` rounds half away from zero; the cast saturates.
    (layout.slope * f64::from(value) + layout.intercept).round() as i16
}

/// The intercept as an integer if the rescale is only a shift (slope 1), as on nearly every CT.
fn whole_offset(layout: &PixelLayout) -> Option<i32> {
    let whole = layout.slope == 1.0 && layout.intercept.fract() == 0.0 && layout.intercept.abs() <= 100_000.0;
    whole.then_some(layout.intercept as i32)
}

/// HU of 16-bit words when the rescale only shifts: branch-free, so that the compiler vectorises it.
fn shift_words(words: impl Iterator<Item = u16>, layout: &PixelLayout, offset: i32, out: &mut [i16]) {
    let up = 32 - u32::from(layout.high_bit) - 1;
    let down = 32 - u32::from(layout.bits_stored);
    let signed = layout.signed;
    // An empty range and an impossible word when there is no padding.
    let (low, high, pattern) = match (layout.padding_value, layout.padding_range_limit) {
        (None, _) => (1, 0, u32::MAX),
        (Some(p), None) => (p, p, u32::from(p as u16)),
        (Some(p), Some(l)) => (p.min(l), p.max(l), u32::MAX),
    };
    for (word, hu) in words.zip(out) {
        let top = u32::from(word) << up;
        let value = if signed { (top as i32) >> down } else { (top >> down) as i32 };
        let padding = (value >= low && value <= high) || u32::from(word) == pattern;
        let shifted = (value + offset).clamp(i32::from(i16::MIN), i32::from(i16::MAX)) as i16;
        *hu = if padding { PADDING_HU } else { shifted };
    }
}

/// Whether a data set ends inside its Pixel Data, as that of a file does that is still being written. Not seen in a
/// deflated data set.
pub fn ends_early(dataset: &[u8], transfer_syntax_uid: &str) -> bool {
    let Some(encoding) = syntax::encoding(transfer_syntax_uid).filter(|e| !e.deflated) else { return false };
    match find_pixel_data(dataset, encoding) {
        Ok(pixels) => match pixels.declared {
            Some(declared) => pixels.rest.len() < declared,
            None => pixels.for_each_fragment(|_| {}).is_err(),
        },
        Err(_) => false,
    }
}

fn find_pixel_data(bytes: &[u8], encoding: syntax::Encoding) -> Result<PixelData<'_>, Refusal> {
    let mut walker = Walker::new(bytes, encoding);
    loop {
        match walker.step().map_err(|e| undecodable(e.to_string()))? {
            Step::Element(_) => {}
            Step::PixelData(pixels) => return Ok(pixels),
            Step::End => return Err(undecodable("the object has no Pixel Data")),
        }
    }
}

/// The samples in a native value: as long as the image, or one pad byte more (PS3.5 8.1.1).
fn native_value(value: &[u8], expected: usize) -> Result<&[u8], Refusal> {
    if value.len() == expected || value.len() == expected + expected % 2 {
        return Ok(&value[..expected]);
    }
    Err(undecodable(format!(
        "Pixel Data is {}: expected {expected} bytes for Rows x Columns, got {}",
        if value.len() < expected { "truncated" } else { "too long" },
        value.len()
    )))
}

/// All fragments of the one frame, joined if there are several.
fn one_frame<'a>(pixels: &PixelData<'a>, joined: &'a mut Vec<u8>) -> Result<&'a [u8], Refusal> {
    let mut count = 0u32;
    let mut only: &'a [u8] = &[];
    joined.clear();
    pixels
        .for_each_fragment(|fragment| {
            count += 1;
            if count == 1 {
                only = fragment;
            } else {
                if count == 2 {
                    joined.extend_from_slice(only);
                }
                joined.extend_from_slice(fragment);
            }
        })
        .map_err(|e| undecodable(format!("encapsulated Pixel Data is broken or truncated: {e}")))?;
    match count {
        0 => Err(undecodable("encapsulated Pixel Data has no fragment")),
        1 => Ok(only),
        _ => Ok(joined),
    }
}

/// RLE Lossless (PS3.5 annex G): one PackBits segment a byte plane, most significant first, to little endian words.
fn decode_rle(frame: &[u8], pixels: usize, word: usize, native: &mut Vec<u8>) -> Result<(), Refusal> {
    const HEADER: usize = 64;
    let broken = |what: &str| undecodable(format!("RLE data is broken: {what}"));
    let header = frame.get(..HEADER).ok_or_else(|| broken("the header is truncated"))?;
    let field = |n: usize| u32::from_le_bytes([header[4 * n], header[4 * n + 1], header[4 * n + 2], header[4 * n + 3]]);
    if field(0) as usize != word {
        return Err(broken(&format!("expected {word} segments, got {}", field(0))));
    }
    native.clear();
    native.resize(pixels * word, 0);
    for segment in 0..word {
        let start = field(segment + 1) as usize;
        let end = if segment + 1 < word { field(segment + 2) as usize } else { frame.len() };
        let mut input = frame
            .get(start..end)
            .filter(|_| start >= HEADER)
            .ok_or_else(|| broken("a segment offset is outside the data"))?;
        let plane = word - 1 - segment;
        let mut at = 0;
        while at < pixels {
            let [control, rest @ ..] = input else { return Err(broken("a segment is truncated")) };
            let control = *control as i8;
            if control >= 0 {
                let run = control as usize + 1;
                let literal = rest.get(..run).ok_or_else(|| broken("a segment is truncated"))?;
                // A run over the end writes what fits.
                for (i, byte) in literal.iter().take(pixels - at).enumerate() {
                    native[(at + i) * word + plane] = *byte;
                }
                at += run;
                input = &rest[run..];
            } else if control != -128 {
                let run = 1 - isize::from(control);
                let [byte, rest @ ..] = rest else { return Err(broken("a segment is truncated")) };
                let end = (at + run as usize).min(pixels);
                while at < end {
                    native[at * word + plane] = *byte;
                    at += 1;
                }
                input = rest;
            } else {
                input = rest;
            }
        }
    }
    Ok(())
}

/// What a compressed stream says about itself.
#[derive(Debug, PartialEq)]
struct StreamInfo {
    rows: u32,
    columns: u32,
    components: u32,
    precision: u32,
}

/// Compares the stream's own header with the data set's, before a codec allocates from it.
fn check_stream(frame: &[u8], coding: PixelCoding, header: &SliceHeader) -> Result<(), Refusal> {
    let info = match coding {
        PixelCoding::Jpeg2000 => jpeg_2000_info(frame),
        _ => jpeg_info(frame, coding)?,
    }
    .ok_or_else(|| undecodable("the compressed stream's header is broken or truncated"))?;
    if (info.rows, info.columns) != (header.rows, header.columns) {
        return Err(undecodable(format!(
            "the compressed image is {}x{}, Rows x Columns say {}x{}",
            info.rows, info.columns, header.rows, header.columns
        )));
    }
    if info.components != 1 {
        return Err(undecodable(format!("expected 1 component in the compressed image, got {}", info.components)));
    }
    let allocated = u32::from(header.pixel.bits_allocated);
    // What width of samples each decoder gives for a precision.
    let fits = match coding {
        PixelCoding::Jpeg2000 => (1..=allocated).contains(&info.precision),
        PixelCoding::JpegLs => (allocated == 16) == (info.precision > 8) && (2..=16).contains(&info.precision),
        _ => (allocated == 16) == (info.precision != 8) && (2..=16).contains(&info.precision),
    };
    if !fits {
        return Err(undecodable(format!(
            "a compressed image of {} bits does not fit BitsAllocated {allocated}",
            info.precision
        )));
    }
    Ok(())
}

/// The frame header of a JPEG (ISO 10918-1 B.2.2) or JPEG-LS (ISO 14495-1 C.2.2) stream.
fn jpeg_info(frame: &[u8], coding: PixelCoding) -> Result<Option<StreamInfo>, Refusal> {
    if frame.get(..2) != Some(&[0xff, 0xd8]) {
        return Ok(None);
    }
    let mut at = 2;
    while let Some([0xff, marker, high, low]) = frame.get(at..at + 4).and_then(|m| m.first_chunk::<4>()).copied() {
        if marker == 0xff {
            at += 1; // fill byte
            continue;
        }
        let frame_header = matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc) || marker == 0xf7;
        if frame_header {
            let Some(body) = frame.get(at + 4..at + 10) else { return Ok(None) };
            let precision = u32::from(body[0]);
            let allowed = match coding {
                PixelCoding::JpegLs => marker == 0xf7,
                // Baseline, extended sequential with 8 bits, lossless.
                _ => matches!(marker, 0xc0 | 0xc1 if precision == 8) || marker == 0xc3,
            };
            if !allowed {
                return Err(undecodable(format!(
                    "a JPEG process (SOF marker {marker:#04x}, {precision} bits) that has no decoder here; send it lossless"
                )));
            }
            return Ok(Some(StreamInfo {
                precision,
                rows: u32::from(u16::from_be_bytes([body[1], body[2]])),
                columns: u32::from(u16::from_be_bytes([body[3], body[4]])),
                components: u32::from(body[5]),
            }));
        }
        if marker == 0xda || marker == 0xd9 || marker == 0xd8 {
            return Ok(None);
        }
        at += 2 + usize::from(u16::from_be_bytes([high, low]));
    }
    Ok(None)
}

/// Tiles of a JPEG 2000 image: 4096 x 4096 in tiles of 128 x 128 are 1024; a decoder keeps about 7 KiB for each.
const MAX_TILES: u64 = 1024;

/// The SIZ segment of a JPEG 2000 code stream (ISO 15444-1 A.5.1).
fn jpeg_2000_info(frame: &[u8]) -> Option<StreamInfo> {
    if frame.get(..4)? != [0xff, 0x4f, 0xff, 0x51] {
        return None;
    }
    // Behind SOC, SIZ, Lsiz, Rsiz: Xsiz Ysiz XOsiz YOsiz XTsiz YTsiz XTOsiz YTOsiz (4 bytes each), Csiz (2), and of
    // the first component Ssiz, XRsiz, YRsiz.
    let siz: &[u8; 37] = frame.get(8..45)?.first_chunk()?;
    let long = |n: usize| u32::from_be_bytes([siz[4 * n], siz[4 * n + 1], siz[4 * n + 2], siz[4 * n + 3]]);
    let (x, y, x0, y0, tile_x, tile_y) = (long(0), long(1), long(2), long(3), long(4), long(5));
    if tile_x == 0 || tile_y == 0 || u64::from(x.div_ceil(tile_x)) * u64::from(y.div_ceil(tile_y)) > MAX_TILES {
        return None;
    }
    if siz[35] != 1 || siz[36] != 1 {
        return None; // a sub-sampled component
    }
    Some(StreamInfo {
        rows: y.checked_sub(y0)?,
        columns: x.checked_sub(x0)?,
        components: u32::from(u16::from_be_bytes([siz[32], siz[33]])),
        precision: u32::from(siz[34] & 0x7f) + 1,
    })
}

/// One frame, as the registry's codecs want to see an object.
struct OneFrame<'a> {
    frame: &'a [u8],
    transfer_syntax_uid: &'a str,
    rows: u16,
    columns: u16,
    layout: &'a PixelLayout,
}

impl PixelDataObject for OneFrame<'_> {
    fn transfer_syntax_uid(&self) -> &str {
        self.transfer_syntax_uid
    }
    fn rows(&self) -> Option<u16> {
        Some(self.rows)
    }
    fn cols(&self) -> Option<u16> {
        Some(self.columns)
    }
    fn samples_per_pixel(&self) -> Option<u16> {
        Some(self.layout.samples_per_pixel)
    }
    fn bits_allocated(&self) -> Option<u16> {
        Some(self.layout.bits_allocated)
    }
    fn bits_stored(&self) -> Option<u16> {
        Some(self.layout.bits_stored)
    }
    fn photometric_interpretation(&self) -> Option<&str> {
        Some(&self.layout.photometric)
    }
    fn number_of_frames(&self) -> Option<u32> {
        Some(1)
    }
    fn number_of_fragments(&self) -> Option<u32> {
        Some(1)
    }
    fn fragment(&self, fragment: usize) -> Option<Cow<'_, [u8]>> {
        (fragment == 0).then_some(Cow::Borrowed(self.frame))
    }
    fn offset_table(&self) -> Option<Cow<'_, [u32]>> {
        Some(Cow::Borrowed(&[]))
    }
    fn raw_pixel_data(&self) -> Option<RawPixelData> {
        Some(RawPixelData { fragments: vec![self.frame.to_vec()].into(), offset_table: Vec::new().into() })
    }
}

fn run_codec(
    frame: &[u8],
    transfer_syntax_uid: &str,
    header: &SliceHeader,
    native_len: usize,
    native: &mut Vec<u8>,
) -> Result<(), Refusal> {
    let reader =
        TransferSyntaxRegistry.get(transfer_syntax_uid).and_then(|ts| ts.pixel_data_reader()).ok_or_else(|| {
            undecodable("this build has no decoder for the transfer syntax (JPEG-LS needs feature charls)")
        })?;
    let (Ok(rows), Ok(columns)) = (u16::try_from(header.rows), u16::try_from(header.columns)) else {
        return Err(undecodable("Rows and Columns do not fit 16 bits"));
    };
    let object = OneFrame { frame, transfer_syntax_uid, rows, columns, layout: &header.pixel };
    native.clear();
    // The buffer is cleared before each use, so a panic in between leaves nothing half done.
    match catch_unwind(AssertUnwindSafe(|| reader.decode_frame(&object, 0, native))) {
        Err(_) => Err(undecodable("the codec failed on the compressed stream")),
        Ok(Err(e)) => Err(undecodable(format!("the codec refused the compressed stream: {e}"))),
        Ok(Ok(())) if native.len() != native_len => {
            Err(undecodable(format!("the compressed image has {} bytes, expected {native_len}", native.len())))
        }
        Ok(Ok(())) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dicom::header::parse_header;
    use crate::dicom::testkit::{Builder, DEFLATED, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE, RLE};
    use proptest::prelude::*;

    fn decode(b: &Builder, ts: &str) -> Result<Vec<i16>, Refusal> {
        decode_bytes(&b.encode(ts), ts)
    }

    fn decode_bytes(bytes: &[u8], ts: &str) -> Result<Vec<i16>, Refusal> {
        let header = parse_header(bytes, ts).map_err(|e| undecodable(e.to_string()))?;
        if header.pixel_fault.is_some() {
            return Err(undecodable("layout"));
        }
        let mut out = vec![0; (header.rows * header.columns) as usize];
        PixelDecoder::new().decode_hu(bytes, ts, &header, &mut out).map(|()| out)
    }

    /// PackBits with literal runs only, and a run of equal bytes where there is one.
    fn rle_frame(planes: &[Vec<u8>]) -> Vec<u8> {
        let mut header = vec![planes.len() as u32];
        let mut body = Vec::new();
        for plane in planes {
            header.push(64 + body.len() as u32);
            for chunk in plane.chunks(100) {
                if chunk.iter().all(|b| *b == chunk[0]) && chunk.len() > 1 {
                    body.extend_from_slice(&[(1i32 - chunk.len() as i32) as i8 as u8, chunk[0]]);
                } else {
                    body.push(chunk.len() as u8 - 1);
                    body.extend_from_slice(chunk);
                }
            }
            body.push(0x80);
        }
        header.resize(16, 0);
        let mut out: Vec<u8> = header.iter().flat_map(|v| v.to_le_bytes()).collect();
        out.extend(body);
        out
    }

    #[test]
    fn every_native_encoding_gives_the_same_hu() {
        let b = Builder::ct(5, 7);
        let expected: Vec<i16> = (0..35).map(|i| ((i / 7) * 7 + (i % 7) * 3) % 2000 - 1024).collect();
        for ts in [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED] {
            assert_eq!(decode(&b, ts).unwrap(), expected, "{ts}");
        }
    }

    #[test]
    fn rle_in_one_or_several_fragments_gives_the_native_hu() {
        let mut b = Builder::ct(30, 20);
        let expected = decode(&b, EXPLICIT_LE).unwrap();
        let words: Vec<u16> = expected.iter().map(|hu| (hu + 1024) as u16).collect();
        let planes =
            [words.iter().map(|w| (w >> 8) as u8).collect(), words.iter().map(|w| *w as u8).collect::<Vec<u8>>()];
        let frame = rle_frame(&planes);
        b.fragments(std::slice::from_ref(&frame));
        assert_eq!(decode(&b, RLE).unwrap(), expected);
        b.fragments(&[frame[..70].to_vec(), frame[70..300].to_vec(), frame[300..].to_vec()]);
        assert_eq!(decode(&b, RLE).unwrap(), expected);
        b.fragments(&[frame[..frame.len() - 40].to_vec()]);
        assert!(decode(&b, RLE).unwrap_err().detail.contains("truncated"));
        b.fragments(&[]);
        assert!(decode(&b, RLE).unwrap_err().detail.contains("no fragment"));
    }

    #[test]
    fn bits_outside_bits_stored_are_masked_and_the_sign_is_extended() {
        let mut b = Builder::ct(1, 4);
        // 12 bits in bits 4 to 15, signed; the low nibble is an overlay.
        b.us(0x0028_0101, &[12]).us(0x0028_0102, &[15]).us(0x0028_0103, &[1]);
        b.text(0x0028_1052, b"DS", "0");
        b.words(0x7fe0_0010, b"OW", &[0x0015, 0xfffa, 0x8000, 0x7ff3]);
        assert_eq!(decode(&b, EXPLICIT_LE).unwrap(), [1, -1, -2048, 2047]);
        b.us(0x0028_0102, &[11]).words(0x7fe0_0010, b"OW", &[0xf001, 0x1fff, 0x0800, 0x57ff]);
        assert_eq!(decode(&b, EXPLICIT_LE).unwrap(), [1, -1, -2048, 2047]);
        b.us(0x0028_0103, &[0]);
        assert_eq!(decode(&b, EXPLICIT_LE).unwrap(), [1, 4095, 2048, 2047]);
    }

    #[test]
    fn padding_becomes_air_by_stored_value_or_by_its_16_bit_pattern() {
        let mut b = Builder::ct(1, 4);
        b.us(0x0028_0101, &[16]).us(0x0028_0102, &[15]).us(0x0028_0103, &[1]);
        b.words(0x0028_0120, b"SS", &[-2000i16 as u16]);
        b.words(0x7fe0_0010, b"OW", &[-2000i16 as u16, 0, 1000, -1999i16 as u16]);
        assert_eq!(decode(&b, EXPLICIT_LE).unwrap(), [-1024, -1024, -24, -3023]);
        b.words(0x0028_0121, b"SS", &[-1500i16 as u16]);
        assert_eq!(decode(&b, EXPLICIT_LE).unwrap(), [-1024, -1024, -24, -1024]);
        // The pattern of -2000 in a 12-bit unsigned image whose padding is written as US.
        let mut b = Builder::ct(1, 2);
        b.us(0x0028_0120, &[63536]).words(0x7fe0_0010, b"OW", &[63536, 2096]);
        assert_eq!(decode(&b, IMPLICIT_LE).unwrap(), [-1024, 1072]);
    }

    #[test]
    fn the_rescale_rounds_half_away_from_zero_and_saturates() {
        let mut b = Builder::ct(1, 6);
        b.us(0x0028_0101, &[16]).us(0x0028_0102, &[15]).us(0x0028_0103, &[1]);
        b.text(0x0028_1053, b"DS", "0.5").text(0x0028_1052, b"DS", "0");
        b.words(0x7fe0_0010, b"OW", &[1, -1i16 as u16, 3, -3i16 as u16, 4, 0x8000]);
        assert_eq!(decode(&b, EXPLICIT_LE).unwrap(), [1, -1, 2, -2, 2, -16384]);
        b.text(0x0028_1053, b"DS", "1000");
        assert_eq!(decode(&b, EXPLICIT_LE).unwrap(), [1000, -1000, 3000, -3000, 4000, i16::MIN]);
        b.text(0x0028_1053, b"DS", "1").text(0x0028_1052, b"DS", "-1024");
        assert_eq!(decode(&b, EXPLICIT_LE).unwrap()[5], i16::MIN);
    }

    #[test]
    fn monochrome1_changes_the_display_and_not_the_hu() {
        let mut b = Builder::ct(4, 4);
        let expected = decode(&b, EXPLICIT_LE).unwrap();
        b.text(0x0028_0004, b"CS", "MONOCHROME1");
        assert_eq!(decode(&b, EXPLICIT_LE).unwrap(), expected);
    }

    #[test]
    fn eight_bit_samples_decode_and_an_odd_count_may_be_padded() {
        let mut b = Builder::ct(3, 3);
        b.us(0x0028_0100, &[8]).us(0x0028_0101, &[8]).us(0x0028_0102, &[7]);
        b.bytes(0x7fe0_0010, b"OB", &[0, 1, 2, 3, 4, 5, 6, 7, 255]);
        let expected = [-1024, -1023, -1022, -1021, -1020, -1019, -1018, -1017, -769];
        assert_eq!(decode(&b, EXPLICIT_LE).unwrap(), expected);
        assert_eq!(decode(&b, EXPLICIT_BE).unwrap(), expected);
        // As OW in big endian the bytes of each pair are swapped.
        b.bytes(0x7fe0_0010, b"OW", &[1, 0, 3, 2, 5, 4, 7, 6, 0, 255]);
        assert_eq!(decode(&b, EXPLICIT_BE).unwrap()[..8], expected[..8]);
    }

    #[test]
    fn pixel_data_of_the_wrong_length_or_form_is_refused() {
        let mut b = Builder::ct(4, 4);
        let whole = b.encode(EXPLICIT_LE);
        assert!(decode_bytes(&whole[..whole.len() - 2], EXPLICIT_LE).unwrap_err().detail.contains("truncated"));
        for (words, text) in [(&[0u16; 15][..], "truncated"), (&[0; 17], "too long"), (&[], "truncated")] {
            b.words(0x7fe0_0010, b"OW", words);
            assert!(decode(&b, EXPLICIT_LE).unwrap_err().detail.contains(text));
        }
        assert!(decode(&b, RLE).unwrap_err().detail.contains("native"));
        b.fragments(&[vec![0; 32]]);
        assert!(decode(&b, EXPLICIT_LE).unwrap_err().detail.contains("encapsulated"));
        b.remove(0x7fe0_0010);
        assert!(decode(&b, EXPLICIT_LE).unwrap_err().detail.contains("no Pixel Data"));
    }

    #[test]
    fn encapsulated_uncompressed_decodes() {
        let mut b = Builder::ct(4, 4);
        let expected = decode(&b, EXPLICIT_LE).unwrap();
        let bytes: Vec<u8> = expected.iter().flat_map(|hu| ((hu + 1024) as u16).to_le_bytes()).collect();
        b.fragments(&[bytes[..10].to_vec(), bytes[10..].to_vec()]);
        assert_eq!(decode(&b, syntax::ENCAPSULATED_UNCOMPRESSED).unwrap(), expected);
    }

    #[test]
    fn a_compressed_stream_that_claims_another_size_is_refused_before_it_is_decoded() {
        let mut b = Builder::ct(4, 4);
        let mut siz = vec![0xff, 0x4f, 0xff, 0x51, 0, 41, 0, 0];
        for v in [60_000u32, 60_000, 0, 0, 60_000, 60_000, 0, 0] {
            siz.extend_from_slice(&v.to_be_bytes());
        }
        siz.extend_from_slice(&[0, 1, 15, 1, 1, 0]);
        b.fragments(std::slice::from_ref(&siz));
        assert!(decode(&b, syntax::JPEG_2000_LOSSLESS).unwrap_err().detail.contains("60000x60000"));
        let sof3 = [0xff, 0xd8, 0xff, 0xc3, 0, 11, 16, 0xff, 0xff, 0xff, 0xff, 1, 1, 0x11, 0, 0];
        b.fragments(&[sof3.to_vec()]);
        assert!(decode(&b, syntax::JPEG_LOSSLESS_SV1).unwrap_err().detail.contains("65535x65535"));
        let sof1_12 = [0xff, 0xd8, 0xff, 0xc1, 0, 11, 12, 0, 4, 0, 4, 1, 1, 0x11, 0, 0];
        b.fragments(&[sof1_12.to_vec()]);
        assert!(decode(&b, syntax::JPEG_EXTENDED).unwrap_err().detail.contains("no decoder"));
    }

    prop_compose! {
        fn layouts()(
            bits_allocated in prop::sample::select(vec![8u16, 16]),
            stored in 1u16..=16,
            high in 0u16..16,
            signed in any::<bool>(),
            slope in prop::sample::select(vec![1.0, 0.5, -2.0, 1.0, 3.7]),
            intercept in prop::sample::select(vec![-1024.0, 0.0, -1000.5, 90_000.0]),
            padding in prop::option::of(-2100i32..2100),
            limit in prop::option::of(-2100i32..2100),
        ) -> PixelLayout {
            let bits_stored = stored.min(bits_allocated);
            PixelLayout {
                bits_allocated,
                bits_stored,
                high_bit: (bits_stored - 1).max(high.min(bits_allocated - 1)),
                signed,
                samples_per_pixel: 1,
                photometric: "MONOCHROME2".into(),
                slope,
                intercept,
                padding_value: padding.map(|p| if signed { p } else { i32::from(p as u16) }),
                padding_range_limit: limit.map(|p| if signed { p } else { i32::from(p as u16) }),
            }
        }
    }

    proptest! {
        /// The vectorised and the table path against the definition, with odd sizes.
        #[test]
        fn the_fast_paths_equal_the_definition(
            layout in layouts(),
            words in proptest::collection::vec(any::<u16>(), 1..67),
            swap in any::<bool>(),
        ) {
            let words: Vec<u16> = words.iter().map(|w| if layout.bits_allocated == 8 { w & 0xff } else { *w }).collect();
            let mut native: Vec<u8> = Vec::new();
            for w in &words {
                match (layout.bits_allocated, swap) {
                    (8, _) => native.push(*w as u8),
                    (_, true) => native.extend_from_slice(&w.to_be_bytes()),
                    _ => native.extend_from_slice(&w.to_le_bytes()),
                }
            }
            let mut out = vec![0; words.len()];
            PixelDecoder::new().convert(&native, swap && layout.bits_allocated == 16, &layout, &mut out);
            let expected: Vec<i16> = words.iter().map(|w| word_to_hu(*w, &layout)).collect();
            prop_assert_eq!(out, expected);
        }

        #[test]
        fn mutated_objects_never_panic(
            edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            ts in prop::sample::select(vec![EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED, RLE,
                syntax::JPEG_LOSSLESS_SV1, syntax::JPEG_2000, syntax::JPEG_LS_LOSSLESS]),
        ) {
            let mut b = Builder::ct(8, 8);
            match ts {
                RLE => _ = b.fragments(&[rle_frame(&[vec![1; 64], (0..64).collect()])]),
                syntax::JPEG_LOSSLESS_SV1 | syntax::JPEG_LS_LOSSLESS => _ = b.fragments(&[vec![
                    0xff, 0xd8, 0xff, 0xc3, 0, 11, 12, 0, 8, 0, 8, 1, 1, 0x11, 0, 0xff, 0xda, 0, 8, 1, 1, 0, 1, 0, 0]]),
                syntax::JPEG_2000 => _ = b.fragments(&[vec![0xff, 0x4f, 0xff, 0x51, 0, 41, 0, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0]]),
                _ => {}
            }
            let mut bytes = b.encode(ts);
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let _ = decode_bytes(&bytes, ts);
        }
    }
}
