//! A small data set builder for tests and benches: encodes the same elements in any transfer syntax.
#![allow(dead_code, missing_docs)]

use std::collections::BTreeMap;
use std::io::Write;

pub const CT: &str = "1.2.840.10008.5.1.4.1.1.2";
pub const EXPLICIT_LE: &str = "1.2.840.10008.1.2.1";
pub const IMPLICIT_LE: &str = "1.2.840.10008.1.2";
pub const EXPLICIT_BE: &str = "1.2.840.10008.1.2.2";
pub const DEFLATED: &str = "1.2.840.10008.1.2.1.99";
pub const RLE: &str = "1.2.840.10008.1.2.5";

#[derive(Clone)]
enum Value {
    Bytes(Vec<u8>),
    Words(Vec<u16>),
    /// Encapsulated, the Basic Offset Table left empty.
    Fragments(Vec<Vec<u8>>),
}

#[derive(Clone)]
pub struct Builder {
    elements: BTreeMap<u32, ([u8; 2], Value)>,
}

impl Builder {
    /// A sound CT slice whose stored value at (r, c) is `(r * 7 + c * 3) % 2000`, rescaled by 1 and -1024.
    pub fn ct(rows: u16, columns: u16) -> Self {
        let mut b = Self { elements: BTreeMap::new() };
        b.text(0x0008_0005, b"CS", "ISO_IR 100");
        b.text(0x0008_0008, b"CS", "ORIGINAL\\PRIMARY\\AXIAL");
        b.text(0x0008_0016, b"UI", CT);
        b.text(0x0008_0018, b"UI", "1.2.3.4");
        b.text(0x0008_0020, b"DA", "20200102");
        b.text(0x0008_0060, b"CS", "CT");
        b.text(0x0008_0070, b"LO", "ACME");
        b.text(0x0010_0010, b"PN", "Doe^Jane");
        b.text(0x0010_0020, b"LO", "PID-1234");
        b.text(0x0018_0050, b"DS", "1.25");
        b.text(0x0018_1210, b"SH", "B30f");
        b.text(0x0020_000d, b"UI", "1.2.3");
        b.text(0x0020_000e, b"UI", "1.2.3.1");
        b.text(0x0020_0011, b"IS", "2");
        b.text(0x0020_0032, b"DS", "-150.5\\-160\\42.25");
        b.text(0x0020_0037, b"DS", "1\\0\\0\\0\\1\\0");
        b.us(0x0028_0002, &[1]);
        b.text(0x0028_0004, b"CS", "MONOCHROME2");
        b.us(0x0028_0010, &[rows]);
        b.us(0x0028_0011, &[columns]);
        b.text(0x0028_0030, b"DS", "0.7\\0.7");
        b.us(0x0028_0100, &[16]);
        b.us(0x0028_0101, &[12]);
        b.us(0x0028_0102, &[11]);
        b.us(0x0028_0103, &[0]);
        b.text(0x0028_1052, b"DS", "-1024");
        b.text(0x0028_1053, b"DS", "1");
        let pixels: Vec<u16> = (0..u32::from(rows) * u32::from(columns))
            .map(|i| {
                let (r, c) = (i / u32::from(columns), i % u32::from(columns));
                ((r * 7 + c * 3) % 2000) as u16
            })
            .collect();
        b.words(0x7fe0_0010, b"OW", &pixels);
        b
    }

    pub fn text(&mut self, tag: u32, vr: &[u8; 2], text: &str) -> &mut Self {
        self.bytes(tag, vr, text.as_bytes())
    }
    pub fn bytes(&mut self, tag: u32, vr: &[u8; 2], bytes: &[u8]) -> &mut Self {
        self.elements.insert(tag, (*vr, Value::Bytes(bytes.to_vec())));
        self
    }
    pub fn us(&mut self, tag: u32, values: &[u16]) -> &mut Self {
        self.words(tag, b"US", values)
    }
    pub fn words(&mut self, tag: u32, vr: &[u8; 2], values: &[u16]) -> &mut Self {
        self.elements.insert(tag, (*vr, Value::Words(values.to_vec())));
        self
    }
    pub fn fragments(&mut self, fragments: &[Vec<u8>]) -> &mut Self {
        self.elements.insert(0x7fe0_0010, (*b"OB", Value::Fragments(fragments.to_vec())));
        self
    }
    pub fn remove(&mut self, tag: u32) -> &mut Self {
        self.elements.remove(&tag);
        self
    }

    pub fn encode(&self, transfer_syntax_uid: &str) -> Vec<u8> {
        let implicit = transfer_syntax_uid == IMPLICIT_LE;
        let big = transfer_syntax_uid == EXPLICIT_BE;
        let u16b = |v: u16| if big { v.to_be_bytes() } else { v.to_le_bytes() };
        let u32b = |v: u32| if big { v.to_be_bytes() } else { v.to_le_bytes() };
        let mut out = Vec::new();
        for (tag, (vr, value)) in &self.elements {
            let mut body: Vec<u8> = match value {
                Value::Bytes(b) => b.clone(),
                Value::Words(w) => w.iter().flat_map(|w| u16b(*w)).collect(),
                Value::Fragments(fragments) => {
                    let mut body = vec![0xfe, 0xff, 0, 0xe0, 0, 0, 0, 0];
                    for f in fragments {
                        body.extend_from_slice(&[0xfe, 0xff, 0, 0xe0]);
                        body.extend_from_slice(&(f.len() as u32).to_le_bytes());
                        body.extend_from_slice(f);
                    }
                    body.extend_from_slice(&[0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0]);
                    body
                }
            };
            if body.len() % 2 == 1 {
                body.push(if matches!(vr, b"UI" | b"OB" | b"OW") { 0 } else { b' ' });
            }
            let length = if matches!(value, Value::Fragments(_)) { u32::MAX } else { body.len() as u32 };
            out.extend_from_slice(&u16b((tag >> 16) as u16));
            out.extend_from_slice(&u16b(*tag as u16));
            if implicit {
                out.extend_from_slice(&u32b(length));
            } else {
                out.extend_from_slice(vr);
                if matches!(vr, b"OB" | b"OW" | b"SQ" | b"UN" | b"UT" | b"OF") {
                    out.extend_from_slice(&[0, 0]);
                    out.extend_from_slice(&u32b(length));
                } else {
                    out.extend_from_slice(&u16b(length as u16));
                }
            }
            out.extend_from_slice(&body);
        }
        if transfer_syntax_uid == DEFLATED {
            let mut z = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
            z.write_all(&out).unwrap();
            return z.finish().unwrap();
        }
        out
    }
}
