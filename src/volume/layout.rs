//! The two file layouts as constants: the one place that holds an offset.
//!
//! `docs/formats.md` draws the same tables for people; a test compares them field by field. All integers and floats are
//! little endian; every checksum is CRC-32 (IEEE 802.3, reflected, as in zlib and PNG). Deliberately absent: any code that reads or
//! writes a file.

/// A field of a fixed structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name, as in the document.
    pub name: &'static str,
    /// First byte, from the start of the structure.
    pub offset: usize,
    /// Length in bytes.
    pub size: usize,
}

impl Field {
    const fn new(name: &'static str, offset: usize, size: usize) -> Self {
        Self { name, offset, size }
    }

    /// First byte after the field.
    pub const fn end(&self) -> usize {
        self.offset + self.size
    }

    /// The field's bytes in a structure.
    ///
    /// # Panics
    /// When `structure` ends before the field.
    pub fn of<'a>(&self, structure: &'a [u8]) -> &'a [u8] {
        &structure[self.offset..self.end()]
    }

    /// Writes the field.
    ///
    /// # Panics
    /// When `value` is not as long as the field or `structure` ends before it.
    pub fn put(&self, structure: &mut [u8], value: &[u8]) {
        structure[self.offset..self.end()].copy_from_slice(value);
    }

    /// The field as an unsigned integer of up to eight bytes.
    ///
    /// # Panics
    /// When the field is longer than eight bytes or `structure` ends before it.
    pub fn get_uint(&self, structure: &[u8]) -> u64 {
        let mut bytes = [0u8; 8];
        bytes[..self.size].copy_from_slice(self.of(structure));
        u64::from_le_bytes(bytes)
    }

    /// Writes an unsigned integer of up to eight bytes.
    ///
    /// # Panics
    /// When the value does not fit the field or `structure` ends before it.
    pub fn put_uint(&self, structure: &mut [u8], value: u64) {
        let bytes = value.to_le_bytes();
        assert!(bytes[self.size..].iter().all(|&b| b == 0), "a value must fit its field");
        self.put(structure, &bytes[..self.size]);
    }
}

/// The journal: a header, then records, each starting at a multiple of [`ALIGN`](journal::ALIGN).
pub mod journal {
    use super::Field;

    /// First eight bytes of a journal.
    pub const MAGIC: [u8; 8] = *b"DNETJRNL";
    /// Version written, and the only one read.
    pub const VERSION: u32 = 1;
    /// Bytes of the file header.
    pub const HEADER_LEN: usize = 64;
    /// First four bytes of a record.
    pub const RECORD_MAGIC: [u8; 4] = *b"DNRC";
    /// Bytes of a record head without its strings.
    pub const RECORD_HEAD_LEN: usize = 64;
    /// Records, strings and payloads are padded with zeros to a multiple of this.
    pub const ALIGN: usize = 8;
    /// Longest UID string kept. DICOM allows 64 bytes (PS3.5 section 9.1); some peers send more.
    pub const MAX_UID_LEN: usize = 256;
    /// Longest payload: 1 GiB, sixteen times the default bound on a received object (64 MiB).
    pub const MAX_PAYLOAD_LEN: u64 = 1 << 30;
    /// Space taken from the file system at a time: 16 MiB, about 32 slices of 512 x 512.
    pub const PREALLOCATE_LEN: u64 = 16 << 20;
    /// Value of `kind` for a received data set.
    pub const KIND_DATASET: u16 = 1;
    /// Value of `kind` for a note of the program.
    pub const KIND_NOTE: u16 = 2;

    /// `magic` of the file.
    pub const H_MAGIC: Field = Field::new("magic", 0, 8);
    /// `version` of the file.
    pub const H_VERSION: Field = Field::new("version", 8, 4);
    /// Length of the header.
    pub const H_HEADER_LEN: Field = Field::new("header_len", 12, 4);
    /// When the file was made.
    pub const H_CREATED: Field = Field::new("created_unix_ns", 16, 8);
    /// Random number that seeds every record checksum.
    pub const H_JOURNAL_ID: Field = Field::new("journal_id", 24, 8);
    /// Zeros.
    pub const H_RESERVED: Field = Field::new("reserved", 32, 28);
    /// Checksum of the bytes before it.
    pub const H_CHECKSUM: Field = Field::new("header_crc32", 60, 4);
    /// The file header.
    pub const HEADER: [Field; 7] = [H_MAGIC, H_VERSION, H_HEADER_LEN, H_CREATED, H_JOURNAL_ID, H_RESERVED, H_CHECKSUM];

    /// `magic` of a record.
    pub const R_MAGIC: Field = Field::new("magic", 0, 4);
    /// What the payload is.
    pub const R_KIND: Field = Field::new("kind", 4, 2);
    /// Zeros.
    pub const R_RESERVED0: Field = Field::new("reserved0", 6, 2);
    /// Number of the record, from 0.
    pub const R_SEQUENCE: Field = Field::new("sequence", 8, 8);
    /// When the data set was received.
    pub const R_RECEIVED: Field = Field::new("received_unix_ns", 16, 8);
    /// Bytes of the payload.
    pub const R_PAYLOAD_LEN: Field = Field::new("payload_len", 24, 8);
    /// Bytes of the transfer syntax UID.
    pub const R_TRANSFER_SYNTAX_LEN: Field = Field::new("transfer_syntax_uid_len", 32, 2);
    /// Bytes of the SOP class UID.
    pub const R_SOP_CLASS_LEN: Field = Field::new("sop_class_uid_len", 34, 2);
    /// Bytes of the SOP instance UID.
    pub const R_SOP_INSTANCE_LEN: Field = Field::new("sop_instance_uid_len", 36, 2);
    /// Zeros.
    pub const R_RESERVED1: Field = Field::new("reserved1", 38, 2);
    /// Checksum of the payload.
    pub const R_PAYLOAD_CHECKSUM: Field = Field::new("payload_crc32", 40, 4);
    /// Zeros.
    pub const R_RESERVED2: Field = Field::new("reserved2", 44, 16);
    /// Checksum of the head and the strings.
    pub const R_HEAD_CHECKSUM: Field = Field::new("head_crc32", 60, 4);
    /// A record head.
    pub const RECORD: [Field; 13] = [
        R_MAGIC,
        R_KIND,
        R_RESERVED0,
        R_SEQUENCE,
        R_RECEIVED,
        R_PAYLOAD_LEN,
        R_TRANSFER_SYNTAX_LEN,
        R_SOP_CLASS_LEN,
        R_SOP_INSTANCE_LEN,
        R_RESERVED1,
        R_PAYLOAD_CHECKSUM,
        R_RESERVED2,
        R_HEAD_CHECKSUM,
    ];
}

/// The volume: a header page, a slot table, slots of pixels.
pub mod volume {
    use super::Field;

    /// First eight bytes of a volume.
    pub const MAGIC: [u8; 8] = *b"DNETVOLM";
    /// Version written, and the only one read.
    pub const VERSION: u32 = 1;
    /// The header, the table and each slot start at a multiple of this.
    pub const PAGE: usize = 4096;
    /// Bytes of the header that hold fields; the rest of its page is zero.
    pub const HEADER_LEN: usize = 72;
    /// Bytes of a slot table entry: one cache line, so that two writers never share one.
    pub const ENTRY_LEN: usize = 64;
    /// Most rows or columns.
    pub const MAX_SIDE: u32 = 4096;
    /// Most slots: 16 times the default bound on slices of a series (4096). The table then takes 4 MiB.
    pub const MAX_SLOTS: u32 = 65_536;
    /// Most slots the file grows by at a time.
    pub const MAX_CHUNK_SLOTS: u32 = 64;
    /// Bytes the file grows by at a time unless one slot is larger: 64 slots of 512 x 512 are 32 MiB.
    pub const CHUNK_LEN: u64 = 32 << 20;
    /// Slot never used, or given back when the file was opened.
    pub const STATE_FREE: u32 = 0;
    /// Slot that a writer owns.
    pub const STATE_CLAIMED: u32 = 1;
    /// Slot whose pixels and entry are final.
    pub const STATE_PUBLISHED: u32 = 2;
    /// Slot whose writer gave up.
    pub const STATE_ABANDONED: u32 = 3;

    /// `magic` of the file.
    pub const H_MAGIC: Field = Field::new("magic", 0, 8);
    /// `version` of the file.
    pub const H_VERSION: Field = Field::new("version", 8, 4);
    /// Bytes before the slot table.
    pub const H_PAGE: Field = Field::new("page_len", 12, 4);
    /// Rows of every slice.
    pub const H_ROWS: Field = Field::new("rows", 16, 4);
    /// Columns of every slice.
    pub const H_COLUMNS: Field = Field::new("columns", 20, 4);
    /// Entries of the slot table.
    pub const H_MAX_SLOTS: Field = Field::new("max_slots", 24, 4);
    /// Slots the file grows by at a time.
    pub const H_CHUNK_SLOTS: Field = Field::new("chunk_slots", 28, 4);
    /// Bytes from one slot to the next.
    pub const H_SLOT_STRIDE: Field = Field::new("slot_stride", 32, 8);
    /// First byte of the slot table.
    pub const H_TABLE_OFFSET: Field = Field::new("table_offset", 40, 8);
    /// First byte of slot 0.
    pub const H_DATA_OFFSET: Field = Field::new("data_offset", 48, 8);
    /// Random number that seeds every entry checksum.
    pub const H_VOLUME_ID: Field = Field::new("volume_id", 56, 8);
    /// Zeros.
    pub const H_RESERVED: Field = Field::new("reserved", 64, 4);
    /// Checksum of the bytes before it.
    pub const H_CHECKSUM: Field = Field::new("header_crc32", 68, 4);
    /// The file header.
    pub const HEADER: [Field; 13] = [
        H_MAGIC,
        H_VERSION,
        H_PAGE,
        H_ROWS,
        H_COLUMNS,
        H_MAX_SLOTS,
        H_CHUNK_SLOTS,
        H_SLOT_STRIDE,
        H_TABLE_OFFSET,
        H_DATA_OFFSET,
        H_VOLUME_ID,
        H_RESERVED,
        H_CHECKSUM,
    ];

    /// State of the slot; the only field that is read while another thread may write it.
    pub const E_STATE: Field = Field::new("state", 0, 4);
    /// Checksum of the pixels.
    pub const E_PIXEL_CHECKSUM: Field = Field::new("pixel_crc32", 4, 4);
    /// Number of the slot.
    pub const E_INDEX: Field = Field::new("index", 8, 4);
    /// Zeros.
    pub const E_RESERVED0: Field = Field::new("reserved0", 12, 4);
    /// ImagePositionPatient.
    pub const E_POSITION_X: Field = Field::new("position_x_mm", 16, 8);
    /// ImagePositionPatient.
    pub const E_POSITION_Y: Field = Field::new("position_y_mm", 24, 8);
    /// ImagePositionPatient.
    pub const E_POSITION_Z: Field = Field::new("position_z_mm", 32, 8);
    /// Offset of the data set's record in the journal.
    pub const E_JOURNAL_OFFSET: Field = Field::new("journal_offset", 40, 8);
    /// Zeros.
    pub const E_RESERVED1: Field = Field::new("reserved1", 48, 12);
    /// Checksum of the bytes from `pixel_crc32` up to it.
    pub const E_CHECKSUM: Field = Field::new("entry_crc32", 60, 4);
    /// A slot table entry.
    pub const ENTRY: [Field; 10] = [
        E_STATE,
        E_PIXEL_CHECKSUM,
        E_INDEX,
        E_RESERVED0,
        E_POSITION_X,
        E_POSITION_Y,
        E_POSITION_Z,
        E_JOURNAL_OFFSET,
        E_RESERVED1,
        E_CHECKSUM,
    ];
}

/// `value` rounded up to a multiple of `unit`, a power of two; `None` when it does not fit.
pub(crate) const fn round_up(value: u64, unit: u64) -> Option<u64> {
    match value.checked_add(unit - 1) {
        Some(v) => Some(v & !(unit - 1)),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = include_str!("../../docs/formats.md");

    /// Cells of the table rows in the section under `heading`.
    fn table(heading: &str) -> Vec<Vec<String>> {
        let mut lines = DOCUMENT.lines().skip_while(|l| l.trim() != heading).skip(1);
        let mut rows = Vec::new();
        for line in lines.by_ref().take_while(|l| !l.starts_with('#')) {
            if line.starts_with('|') {
                let cells = line.trim_matches('|').split('|').map(|c| c.trim().trim_matches('`').to_owned()).collect();
                rows.push(cells);
            }
        }
        assert!(rows.len() > 2, "docs/formats.md must have a table under {heading:?}");
        rows.split_off(2)
    }

    fn check(heading: &str, fields: &[Field], len: usize) {
        let documented: Vec<(String, String, String)> =
            table(heading).into_iter().map(|r| (r[0].clone(), r[1].clone(), r[2].clone())).collect();
        let coded: Vec<_> =
            fields.iter().map(|f| (f.offset.to_string(), f.size.to_string(), f.name.to_owned())).collect();
        assert_eq!(documented, coded, "under {heading}");
        let mut end = 0;
        for field in fields {
            assert_eq!(field.offset, end, "a hole or overlap before {} under {heading}", field.name);
            end = field.end();
        }
        assert_eq!(end, len, "length of the structure under {heading}");
    }

    #[test]
    fn the_document_and_the_code_hold_the_same_layouts() {
        check("### Journal header", &journal::HEADER, journal::HEADER_LEN);
        check("### Journal record head", &journal::RECORD, journal::RECORD_HEAD_LEN);
        check("### Volume header", &volume::HEADER, volume::HEADER_LEN);
        check("### Slot table entry", &volume::ENTRY, volume::ENTRY_LEN);
    }

    #[test]
    fn the_document_and_the_code_hold_the_same_constants() {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let coded = [
            ("journal magic", text(&journal::MAGIC)),
            ("journal version", journal::VERSION.to_string()),
            ("record magic", text(&journal::RECORD_MAGIC)),
            ("record alignment", journal::ALIGN.to_string()),
            ("longest UID", journal::MAX_UID_LEN.to_string()),
            ("longest payload", journal::MAX_PAYLOAD_LEN.to_string()),
            ("journal preallocation", journal::PREALLOCATE_LEN.to_string()),
            ("kind of a data set", journal::KIND_DATASET.to_string()),
            ("kind of a note", journal::KIND_NOTE.to_string()),
            ("volume magic", text(&volume::MAGIC)),
            ("volume version", volume::VERSION.to_string()),
            ("page", volume::PAGE.to_string()),
            ("most rows or columns", volume::MAX_SIDE.to_string()),
            ("most slots", volume::MAX_SLOTS.to_string()),
            ("most slots a chunk", volume::MAX_CHUNK_SLOTS.to_string()),
            ("chunk", volume::CHUNK_LEN.to_string()),
            ("state free", volume::STATE_FREE.to_string()),
            ("state claimed", volume::STATE_CLAIMED.to_string()),
            ("state published", volume::STATE_PUBLISHED.to_string()),
            ("state abandoned", volume::STATE_ABANDONED.to_string()),
        ];
        let documented: Vec<(String, String)> =
            table("## Constants").into_iter().map(|r| (r[0].clone(), r[1].clone())).collect();
        let coded: Vec<(String, String)> = coded.into_iter().map(|(n, v)| (n.to_owned(), v)).collect();
        assert_eq!(documented, coded);
    }
}
