//! Constants of the cache record, as code: field by field what `docs/formats.md` draws. A test compares the two.

use crate::volume::layout::Field;

/// First eight bytes of a record.
pub(crate) const MAGIC: [u8; 8] = *b"DNETSCAN";
/// The only version this program reads and writes.
pub(crate) const VERSION: u32 = 1;
/// Bytes of the fixed header; the strings follow.
pub(crate) const HEADER_LEN: usize = 256;
/// Volume and mask start at multiples of this.
pub(crate) const PAGE: usize = 4096;
/// Longest of the three strings, bytes: header and strings then fit one page (256 + 3 * 1024 = 3328).
pub(crate) const MAX_STRING_LEN: usize = 1024;
/// Flag: a lesion mask follows the volume.
pub(crate) const FLAG_MASK: u32 = 1;
/// Source window: the source was in HU.
pub(crate) const WINDOW_HU: u32 = 0;
/// Source window: 8-bit, exported with the window stated.
pub(crate) const WINDOW_KNOWN: u32 = 1;
/// Source window: 8-bit, exported with a window nobody knows.
pub(crate) const WINDOW_UNKNOWN: u32 = 2;
/// Most voxels of a volume: 1 GiB of f16, 166 times the paper's input.
pub(crate) const MAX_VOXELS: usize = 1 << 29;

const fn field(name: &'static str, offset: usize, size: usize) -> Field {
    Field { name, offset, size }
}

pub(crate) const F_MAGIC: Field = field("magic", 0, 8);
pub(crate) const F_VERSION: Field = field("version", 8, 4);
pub(crate) const F_HEADER_LEN: Field = field("header_len", 12, 4);
pub(crate) const F_KEY: Field = field("key", 16, 32);
pub(crate) const F_DEPTH: Field = field("depth", 48, 4);
pub(crate) const F_HEIGHT: Field = field("height", 52, 4);
pub(crate) const F_WIDTH: Field = field("width", 56, 4);
pub(crate) const F_CLASS: Field = field("class", 60, 4);
pub(crate) const F_FLAGS: Field = field("flags", 64, 4);
pub(crate) const F_SOURCE_WINDOW: Field = field("source_window", 68, 4);
pub(crate) const F_WINDOW_CENTER: Field = field("window_center_hu", 72, 4);
pub(crate) const F_WINDOW_WIDTH: Field = field("window_width_hu", 76, 4);
pub(crate) const F_VOLUME_OFFSET: Field = field("volume_offset", 80, 8);
pub(crate) const F_VOLUME_LEN: Field = field("volume_len", 88, 8);
pub(crate) const F_MASK_OFFSET: Field = field("mask_offset", 96, 8);
pub(crate) const F_MASK_LEN: Field = field("mask_len", 104, 8);
pub(crate) const F_VOLUME_CRC: Field = field("volume_crc32", 112, 4);
pub(crate) const F_MASK_CRC: Field = field("mask_crc32", 116, 4);
pub(crate) const F_SLICES: Field = field("slices", 120, 4);
pub(crate) const F_SCAN_LEN: Field = field("scan_len", 124, 4);
pub(crate) const F_PATIENT_LEN: Field = field("patient_len", 128, 4);
pub(crate) const F_SOURCE_LEN: Field = field("source_len", 132, 4);
#[cfg(test)]
pub(crate) const F_RESERVED: Field = field("reserved", 136, 116);
pub(crate) const F_HEADER_CRC: Field = field("header_crc32", 252, 4);

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: [Field; 24] = [
        F_MAGIC,
        F_VERSION,
        F_HEADER_LEN,
        F_KEY,
        F_DEPTH,
        F_HEIGHT,
        F_WIDTH,
        F_CLASS,
        F_FLAGS,
        F_SOURCE_WINDOW,
        F_WINDOW_CENTER,
        F_WINDOW_WIDTH,
        F_VOLUME_OFFSET,
        F_VOLUME_LEN,
        F_MASK_OFFSET,
        F_MASK_LEN,
        F_VOLUME_CRC,
        F_MASK_CRC,
        F_SLICES,
        F_SCAN_LEN,
        F_PATIENT_LEN,
        F_SOURCE_LEN,
        F_RESERVED,
        F_HEADER_CRC,
    ];

    #[test]
    fn the_document_and_the_code_hold_the_same_cache_record() {
        let document = include_str!("../../docs/formats.md");
        let rows: Vec<Vec<&str>> = document
            .lines()
            .skip_while(|l| l.trim() != "### Cache record header")
            .skip(1)
            .take_while(|l| !l.starts_with('#'))
            .filter(|l| l.starts_with('|'))
            .map(|l| l.trim_matches('|').split('|').map(|c| c.trim().trim_matches('`')).collect())
            .collect();
        assert_eq!(rows.len(), 2 + HEADER.len(), "rows of the table");
        let mut end = 0;
        for (row, field) in rows[2..].iter().zip(&HEADER) {
            assert_eq!(row[..3], [&field.offset.to_string(), &field.size.to_string(), field.name]);
            assert_eq!(field.offset, end, "a hole or overlap before {}", field.name);
            end = field.end();
        }
        assert_eq!(end, HEADER_LEN);
        const { assert!(HEADER_LEN + 3 * MAX_STRING_LEN <= PAGE) };
        for constant in [format!("`{}`", String::from_utf8_lossy(&MAGIC)), format!("cache record version | {VERSION}")]
        {
            assert!(document.contains(&constant), "docs/formats.md must say {constant}");
        }
    }
}
