//! Part 10 files (PS3.10 section 7), read and written without re-encoding the data set.
//!
//! Input: a file or its bytes; also a raw data set without preamble and meta information, whose transfer syntax is then
//! guessed (implicit or explicit VR little endian, explicit VR big endian). Output: [`Part10`], the bytes with the
//! offset of the data set and the identity of its object. Invariants: nothing is read beyond the size bound, nothing
//! is re-encoded. Deliberately absent: DICOMDIR, writing of anything but the meta information's mandatory elements.

use crate::dicom::dataset::{DatasetError, Element, Step, Walker};
use crate::dicom::header::{HeaderError, parse_header, valid_uid};
use crate::dicom::syntax;
use crate::dicom::upper::{IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// Bytes of preamble and prefix.
const PREAMBLE: usize = 132;

/// One object as a file holds it.
#[derive(Clone)]
pub struct Part10 {
    /// Transfer syntax of the data set, from the meta information or guessed.
    pub transfer_syntax_uid: String,
    /// SOP class of the object.
    pub sop_class_uid: String,
    /// SOP instance of the object.
    pub sop_instance_uid: String,
    /// The whole file.
    pub bytes: Vec<u8>,
    /// Where the data set begins in `bytes`.
    pub dataset_offset: usize,
}

impl std::fmt::Debug for Part10 {
    /// UIDs are left out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Part10")
            .field("transfer_syntax_uid", &self.transfer_syntax_uid)
            .field("bytes", &self.bytes.len())
            .field("dataset_offset", &self.dataset_offset)
            .finish_non_exhaustive()
    }
}

impl Part10 {
    /// The encoded data set.
    pub fn dataset(&self) -> &[u8] {
        &self.bytes[self.dataset_offset..]
    }
}

/// What the meta information or the first elements say.
#[derive(Default)]
struct Identity {
    transfer_syntax: Option<String>,
    sop_class: Option<String>,
    sop_instance: Option<String>,
}

fn uid_of(element: &Element<'_>) -> Option<String> {
    valid_uid(element.trimmed()).map(str::to_owned)
}

/// Reads a Part 10 file, or a raw data set.
///
/// # Errors
/// The file cannot be read, is larger than `max_bytes`, is no DICOM object, ends before Pixel Data, or has no SOP
/// class or instance. Pixel Data that is cut off is for the decoder to refuse.
pub fn read_part10(path: &Path, max_bytes: u64) -> Result<Part10, HeaderError> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    if meta.is_dir() {
        return Err(HeaderError::NotDicom { what: "a directory" });
    }
    if meta.len() > max_bytes {
        return Err(HeaderError::TooLarge { bytes: meta.len(), max_bytes });
    }
    // The length is only a hint (a pipe has none); the bound holds either way.
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0) + 1);
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        return Err(HeaderError::TooLarge { bytes: bytes.len() as u64, max_bytes });
    }
    parse_part10(bytes)
}

/// [`read_part10`] of bytes in memory.
///
/// # Errors
/// As [`read_part10`].
pub fn parse_part10(bytes: Vec<u8>) -> Result<Part10, HeaderError> {
    let (mut identity, dataset_offset) = read_meta(&bytes)?;
    let dataset = &bytes[dataset_offset..];
    if dataset.is_empty() {
        return Err(HeaderError::NotDicom { what: "no data set behind the file meta information" });
    }
    let transfer_syntax_uid = match identity.transfer_syntax.take() {
        Some(uid) => uid,
        None => guess_transfer_syntax(dataset)?.to_owned(),
    };
    let encoding = syntax::encoding(&transfer_syntax_uid).ok_or(HeaderError::UnknownTransferSyntax)?;
    if encoding.deflated {
        if identity.sop_class.is_none() || identity.sop_instance.is_none() {
            let header = parse_header(dataset, &transfer_syntax_uid)?;
            identity.sop_class = Some(header.sop_class_uid);
            identity.sop_instance = Some(header.sop_instance_uid);
        }
    } else {
        let mut walker = Walker::new(dataset, encoding);
        let mut found = Identity::default();
        loop {
            match walker.step()? {
                Step::Element(e) if e.tag == 0x0008_0016 => found.sop_class = uid_of(&e),
                Step::Element(e) if e.tag == 0x0008_0018 => found.sop_instance = uid_of(&e),
                Step::Element(_) => {}
                Step::PixelData(_) | Step::End => break,
            }
        }
        // The data set is what counts; the meta information only repeats it.
        identity.sop_class = found.sop_class.or(identity.sop_class);
        identity.sop_instance = found.sop_instance.or(identity.sop_instance);
    }
    Ok(Part10 {
        transfer_syntax_uid,
        sop_class_uid: identity.sop_class.ok_or(HeaderError::MissingUid { attribute: "SOPClassUID" })?,
        sop_instance_uid: identity.sop_instance.ok_or(HeaderError::MissingUid { attribute: "SOPInstanceUID" })?,
        bytes,
        dataset_offset,
    })
}

/// The meta information's UIDs, and where the data set begins.
fn read_meta(bytes: &[u8]) -> Result<(Identity, usize), HeaderError> {
    let mut identity = Identity::default();
    let start = if bytes.get(128..PREAMBLE) == Some(b"DICM") {
        PREAMBLE
    } else if bytes.get(..4) == Some(&[2, 0, 0, 0]) {
        0 // meta information without a preamble
    } else {
        return Ok((identity, 0));
    };
    let Some(meta_encoding) = syntax::encoding(syntax::EXPLICIT_LE) else {
        return Err(HeaderError::UnknownTransferSyntax);
    };
    // The group length is not trusted: the group ends where another one begins.
    let mut at = start;
    while bytes.get(at..at + 2) == Some(&[2, 0]) {
        let mut walker = Walker::new(&bytes[at..], meta_encoding);
        let step = walker.step().map_err(|e| match e {
            DatasetError::Truncated { offset } => DatasetError::Truncated { offset: offset + at },
            DatasetError::Malformed { offset, what } => DatasetError::Malformed { offset: offset + at, what },
        })?;
        let Step::Element(element) = step else { break };
        at += walker.position();
        match element.tag {
            0x0002_0002 => identity.sop_class = uid_of(&element),
            0x0002_0003 => identity.sop_instance = uid_of(&element),
            0x0002_0010 => identity.transfer_syntax = uid_of(&element),
            _ => {}
        }
    }
    Ok((identity, at))
}

/// The transfer syntax of a data set that does not say: it must begin with an element of group 0008.
fn guess_transfer_syntax(dataset: &[u8]) -> Result<&'static str, HeaderError> {
    let Some([a, b, _, _, vr @ ..]) = dataset.first_chunk::<6>() else {
        return Err(HeaderError::NotDicom { what: "fewer than 6 bytes" });
    };
    let explicit = vr.iter().all(u8::is_ascii_uppercase);
    match ([*a, *b], explicit) {
        ([8, 0], true) => Ok(syntax::EXPLICIT_LE),
        ([8, 0], false) => Ok(syntax::IMPLICIT_LE),
        ([0, 8], true) => Ok(syntax::EXPLICIT_BE),
        _ => Err(HeaderError::NotDicom { what: "no DICM prefix, and no data set that begins with group 0008" }),
    }
}

/// Preamble and meta information for a data set (PS3.10 table 7.1-1).
///
/// # Errors
/// A UID is longer than the 64 characters the standard allows.
pub fn part10_head(
    transfer_syntax_uid: &str,
    sop_class_uid: &str,
    sop_instance_uid: &str,
) -> Result<Vec<u8>, HeaderError> {
    let mut group = Vec::with_capacity(256);
    group.extend_from_slice(&[2, 0, 1, 0, b'O', b'B', 0, 0, 2, 0, 0, 0, 0, 1]);
    let mut put = |element: u8, vr: &[u8; 2], attribute: &'static str, value: &str, pad: u8| {
        if value.is_empty() || value.len() > 64 {
            return Err(HeaderError::BadUid { attribute });
        }
        let length = value.len() + value.len() % 2;
        group.extend_from_slice(&[2, 0, element, 0, vr[0], vr[1], length as u8, 0]);
        group.extend_from_slice(value.as_bytes());
        if value.len() % 2 == 1 {
            group.push(pad);
        }
        Ok(())
    };
    put(0x02, b"UI", "MediaStorageSOPClassUID", sop_class_uid, 0)?;
    put(0x03, b"UI", "MediaStorageSOPInstanceUID", sop_instance_uid, 0)?;
    put(0x10, b"UI", "TransferSyntaxUID", transfer_syntax_uid, 0)?;
    put(0x12, b"UI", "ImplementationClassUID", IMPLEMENTATION_CLASS_UID, 0)?;
    put(0x13, b"SH", "ImplementationVersionName", IMPLEMENTATION_VERSION_NAME, b' ')?;
    let mut head = vec![0; 128];
    head.extend_from_slice(b"DICM");
    head.extend_from_slice(&[2, 0, 0, 0, b'U', b'L', 4, 0]);
    head.extend_from_slice(&(group.len() as u32).to_le_bytes());
    head.extend_from_slice(&group);
    Ok(head)
}

/// Writes a data set as a Part 10 file, as it is.
///
/// # Errors
/// A UID is too long, or the writer's error.
pub fn write_part10(
    out: &mut dyn Write,
    transfer_syntax_uid: &str,
    sop_class_uid: &str,
    sop_instance_uid: &str,
    dataset: &[u8],
) -> Result<(), HeaderError> {
    out.write_all(&part10_head(transfer_syntax_uid, sop_class_uid, sop_instance_uid)?)?;
    out.write_all(dataset)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dicom::syntax::{CT_IMAGE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE};
    use crate::dicom::testkit::Builder;

    #[test]
    fn a_written_file_reads_back_byte_for_byte() {
        for ts in [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE] {
            let dataset = Builder::ct(8, 8).encode(ts);
            let mut file = Vec::new();
            write_part10(&mut file, ts, CT_IMAGE, "1.2.3.4", &dataset).unwrap();
            let back = parse_part10(file).unwrap();
            assert_eq!(back.dataset(), dataset);
            assert_eq!(back.transfer_syntax_uid, ts);
            assert_eq!(back.sop_instance_uid, "1.2.3.4");
        }
    }

    #[test]
    fn a_raw_data_set_is_read_with_a_guessed_syntax() {
        for ts in [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE] {
            let back = parse_part10(Builder::ct(8, 8).encode(ts)).unwrap();
            assert_eq!((back.transfer_syntax_uid.as_str(), back.dataset_offset), (ts, 0));
            assert_eq!(back.sop_class_uid, CT_IMAGE);
        }
    }

    #[test]
    fn files_that_are_no_dicom_get_a_clear_error() {
        for (bytes, text) in [
            (b"".to_vec(), "no DICOM object"),
            (b"\x89PNG\r\n\x1a\n....".to_vec(), "no DICOM object"),
            (vec![0; 400], "no DICOM object"),
            (part10_head(EXPLICIT_LE, CT_IMAGE, "1.2").unwrap(), "no data set"),
            (part10_head(EXPLICIT_LE, CT_IMAGE, "1.2").unwrap()[..200].to_vec(), "ends inside"),
        ] {
            let error = parse_part10(bytes).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_file_cut_in_its_header_is_truncated_and_one_cut_in_its_pixels_is_read() {
        let dataset = Builder::ct(8, 8).encode(EXPLICIT_LE);
        let mut file = part10_head(EXPLICIT_LE, CT_IMAGE, "1.2.3.4").unwrap();
        file.extend_from_slice(&dataset);
        let cut = file.len() - 5;
        assert!(parse_part10(file[..cut].to_vec()).is_ok());
        let error = parse_part10(file[..file.len() - dataset.len() + 40].to_vec()).unwrap_err();
        assert!(matches!(error, HeaderError::Dataset(DatasetError::Truncated { .. })), "{error}");
    }

    #[test]
    fn a_file_over_the_bound_or_missing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.dcm");
        std::fs::write(&path, Builder::ct(8, 8).encode(EXPLICIT_LE)).unwrap();
        assert!(matches!(read_part10(&path, 10), Err(HeaderError::TooLarge { max_bytes: 10, .. })));
        assert!(matches!(read_part10(&dir.path().join("none"), 10), Err(HeaderError::Io(_))));
        assert!(matches!(read_part10(dir.path(), 10), Err(HeaderError::NotDicom { .. } | HeaderError::Io(_))));
    }
}
