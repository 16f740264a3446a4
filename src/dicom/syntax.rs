//! Transfer syntaxes and SOP classes this program knows, and the order in which it prefers them.
//!
//! Pure tables (PS3.5 section 10 and annex A, PS3.4 annex B.5, PS3.6). Output: how a data set is encoded, which codec
//! its pixels need, and which syntax to accept for a presentation context.

/// Verification SOP Class (C-ECHO).
pub const VERIFICATION: &str = "1.2.840.10008.1.1";
/// CT Image Storage.
pub const CT_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.2";
/// Enhanced CT Image Storage.
pub const ENHANCED_CT_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.2.1";
/// Legacy Converted Enhanced CT Image Storage.
pub const LEGACY_CONVERTED_ENHANCED_CT_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.2.2";
/// Secondary Capture Image Storage.
pub const SECONDARY_CAPTURE: &str = "1.2.840.10008.5.1.4.1.1.7";
/// X-Ray Radiation Dose SR Storage.
pub const XRAY_RADIATION_DOSE_SR: &str = "1.2.840.10008.5.1.4.1.1.88.67";
/// Every standard storage SOP class of PS3.4 table B.5-1 begins with this root.
const STORAGE_ROOT: &str = "1.2.840.10008.5.1.4.1.1.";
/// UIDs of the standard begin with this root; a SOP class without it is private.
const DICOM_ROOT: &str = "1.2.840.10008.";

/// Implicit VR Little Endian.
pub const IMPLICIT_LE: &str = "1.2.840.10008.1.2";
/// Explicit VR Little Endian.
pub const EXPLICIT_LE: &str = "1.2.840.10008.1.2.1";
/// Encapsulated Uncompressed Explicit VR Little Endian.
pub const ENCAPSULATED_UNCOMPRESSED: &str = "1.2.840.10008.1.2.1.98";
/// Deflated Explicit VR Little Endian.
pub const DEFLATED: &str = "1.2.840.10008.1.2.1.99";
/// Explicit VR Big Endian (retired).
pub const EXPLICIT_BE: &str = "1.2.840.10008.1.2.2";
/// JPEG Baseline (Process 1), 8 bit lossy.
pub const JPEG_BASELINE: &str = "1.2.840.10008.1.2.4.50";
/// JPEG Extended (Process 2 and 4), 8 or 12 bit lossy.
pub const JPEG_EXTENDED: &str = "1.2.840.10008.1.2.4.51";
/// JPEG Lossless, Non-Hierarchical (Process 14).
pub const JPEG_LOSSLESS_P14: &str = "1.2.840.10008.1.2.4.57";
/// JPEG Lossless, Non-Hierarchical, First-Order Prediction (Process 14, Selection Value 1).
pub const JPEG_LOSSLESS_SV1: &str = "1.2.840.10008.1.2.4.70";
/// JPEG-LS Lossless.
pub const JPEG_LS_LOSSLESS: &str = "1.2.840.10008.1.2.4.80";
/// JPEG-LS Lossy (Near-Lossless).
pub const JPEG_LS_NEAR: &str = "1.2.840.10008.1.2.4.81";
/// JPEG 2000 (Lossless Only).
pub const JPEG_2000_LOSSLESS: &str = "1.2.840.10008.1.2.4.90";
/// JPEG 2000.
pub const JPEG_2000: &str = "1.2.840.10008.1.2.4.91";
/// RLE Lossless.
pub const RLE_LOSSLESS: &str = "1.2.840.10008.1.2.5";
/// Transfer syntaxes with encapsulated pixel data of the JPEG, MPEG and HEVC families begin with this root.
const JPEG_ROOT: &str = "1.2.840.10008.1.2.4.";

/// How the pixel data of a transfer syntax is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelCoding {
    /// Native samples in the data set's byte order.
    Native,
    /// Native little endian samples in fragments.
    EncapsulatedNative,
    /// RLE Lossless (PS3.5 annex G).
    Rle,
    /// A JPEG stream, lossless or lossy (ISO 10918-1).
    Jpeg,
    /// A JPEG-LS stream (ISO 14495-1).
    JpegLs,
    /// A JPEG 2000 code stream (ISO 15444-1).
    Jpeg2000,
    /// Encapsulated in a way this program does not decode.
    Unsupported,
}

/// How a data set is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoding {
    /// Each element carries its VR.
    pub explicit: bool,
    /// Numbers are big endian.
    pub big_endian: bool,
    /// The whole data set is a raw deflate stream.
    pub deflated: bool,
    /// How the pixels are coded.
    pub pixels: PixelCoding,
}

/// The encoding of a transfer syntax, or `None` for one that is no DICOM transfer syntax known here.
///
/// Any standard encapsulated syntax has an explicit VR little endian data set (PS3.5 A.4), so the header of every
/// one of them can be read even where its pixels cannot.
pub fn encoding(transfer_syntax_uid: &str) -> Option<Encoding> {
    let explicit_le = |pixels| Encoding { explicit: true, big_endian: false, deflated: false, pixels };
    Some(match transfer_syntax_uid {
        IMPLICIT_LE => Encoding { explicit: false, ..explicit_le(PixelCoding::Native) },
        EXPLICIT_LE => explicit_le(PixelCoding::Native),
        EXPLICIT_BE => Encoding { big_endian: true, ..explicit_le(PixelCoding::Native) },
        DEFLATED => Encoding { deflated: true, ..explicit_le(PixelCoding::Native) },
        ENCAPSULATED_UNCOMPRESSED => explicit_le(PixelCoding::EncapsulatedNative),
        RLE_LOSSLESS => explicit_le(PixelCoding::Rle),
        JPEG_BASELINE | JPEG_EXTENDED | JPEG_LOSSLESS_P14 | JPEG_LOSSLESS_SV1 => explicit_le(PixelCoding::Jpeg),
        JPEG_LS_LOSSLESS | JPEG_LS_NEAR => explicit_le(PixelCoding::JpegLs),
        JPEG_2000_LOSSLESS | JPEG_2000 => explicit_le(PixelCoding::Jpeg2000),
        // JPIP with deflate: the data set holds no pixels, only a URL.
        "1.2.840.10008.1.2.4.95" | "1.2.840.10008.1.2.4.205" => {
            Encoding { deflated: true, ..explicit_le(PixelCoding::Unsupported) }
        }
        uid if uid.starts_with(JPEG_ROOT) => explicit_le(PixelCoding::Unsupported),
        _ => return None,
    })
}

/// Transfer syntaxes accepted for CT, fastest to decode first, lossless before lossy.
///
/// The order follows the measured time to decode one 512x512 slice on one core: native below 0.1 ms, RLE 1 ms,
/// JPEG-LS and JPEG lossless 4 to 8 ms, deflated 3 to 8 ms, JPEG 2000 25 to 40 ms.
pub const PREFERRED: &[&str] = &[
    EXPLICIT_LE,
    IMPLICIT_LE,
    ENCAPSULATED_UNCOMPRESSED,
    EXPLICIT_BE,
    RLE_LOSSLESS,
    #[cfg(feature = "charls")]
    JPEG_LS_LOSSLESS,
    JPEG_LOSSLESS_SV1,
    JPEG_LOSSLESS_P14,
    DEFLATED,
    JPEG_2000_LOSSLESS,
    #[cfg(feature = "charls")]
    JPEG_LS_NEAR,
    JPEG_BASELINE,
    JPEG_2000,
];

/// Whether the SOP class is a CT image, single-frame or enhanced.
pub fn is_ct_class(sop_class_uid: &str) -> bool {
    matches!(sop_class_uid, CT_IMAGE | ENHANCED_CT_IMAGE | LEGACY_CONVERTED_ENHANCED_CT_IMAGE)
}

/// Whether the association server takes this abstract syntax.
///
/// Verification, every standard storage SOP class, and private ones if `private` (a scanner that cannot deliver its
/// private objects tries for ever). Storage commitment, query/retrieve, MPPS and printing are refused.
pub fn accepts_abstract_syntax(uid: &str, private: bool) -> bool {
    uid == VERIFICATION || uid.starts_with(STORAGE_ROOT) || (private && !uid.is_empty() && !uid.starts_with(DICOM_ROOT))
}

/// The transfer syntax to accept among those proposed, or `None` to refuse the context.
///
/// CT and Verification take the first of [`PREFERRED`] that was proposed. Other objects are only kept, not decoded:
/// they also take the first proposed syntax whose data set can be read.
pub fn choose_transfer_syntax<'a, S: AsRef<str>>(abstract_syntax: &str, proposed: &'a [S]) -> Option<&'a str> {
    let preferred = PREFERRED.iter().find_map(|p| proposed.iter().map(AsRef::as_ref).find(|t| t == p));
    if preferred.is_some() || is_ct_class(abstract_syntax) || abstract_syntax == VERIFICATION {
        return preferred;
    }
    proposed.iter().map(AsRef::as_ref).find(|t| encoding(t).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn native_syntaxes_win_over_compressed_ones_in_any_order() {
        assert_eq!(
            choose_transfer_syntax(CT_IMAGE, &[JPEG_2000_LOSSLESS, IMPLICIT_LE, RLE_LOSSLESS]),
            Some(IMPLICIT_LE)
        );
        assert_eq!(choose_transfer_syntax(CT_IMAGE, &[JPEG_2000_LOSSLESS, RLE_LOSSLESS]), Some(RLE_LOSSLESS));
    }

    #[test]
    fn a_syntax_the_decoder_cannot_read_is_refused_for_ct_and_taken_for_other_objects() {
        assert_eq!(choose_transfer_syntax(CT_IMAGE, &[JPEG_EXTENDED]), None);
        assert_eq!(choose_transfer_syntax(SECONDARY_CAPTURE, &[JPEG_EXTENDED]), Some(JPEG_EXTENDED));
        assert_eq!(choose_transfer_syntax(SECONDARY_CAPTURE, &["1.2.3"]), None);
        assert_eq!(choose_transfer_syntax(CT_IMAGE, &[] as &[&str]), None);
    }

    #[test]
    fn every_preferred_syntax_has_a_decodable_encoding() {
        for uid in PREFERRED {
            let e = encoding(uid);
            assert!(e.is_some_and(|e| e.pixels != PixelCoding::Unsupported), "{uid}");
        }
    }

    #[test]
    fn storage_commitment_is_not_accepted() {
        assert!(!accepts_abstract_syntax("1.2.840.10008.1.20.1", true));
        assert!(accepts_abstract_syntax(XRAY_RADIATION_DOSE_SR, false));
        assert!(accepts_abstract_syntax("1.3.12.2.1107.5.9.1", true));
        assert!(!accepts_abstract_syntax("1.3.12.2.1107.5.9.1", false));
    }
}
