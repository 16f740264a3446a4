//! The header of one object: identity, geometry, pixel layout; and whether the object is a slice to be judged.
//!
//! Input: an encoded data set. Output: [`SliceHeader`], or an error only where the object cannot be identified; every
//! other fault is kept inside it (`geometry`, `pixel_fault`), so that the object is acknowledged, stored and refused
//! with a reason. Invariants: parsing stops at Pixel Data, sequences are skipped, memory is bounded by the header's
//! own text (64 KiB a value at most) plus [`MAX_INFLATED_HEADER`] for a deflated data set. Identifying values
//! never appear in `Debug`, errors or refusals.

use crate::dicom::dataset::{DatasetError, Element, Step, Walker, inflate};
use crate::dicom::syntax::{self, Encoding};
use crate::volume::geometry::SliceGeometry;
use crate::volume::refusal::{Reason, Refusal};
use dicom_encoding::text::{SpecificCharacterSet, TextCodec};

/// Rows and columns of the largest slice: 4096 x 4096 x 2 bytes are 32 MiB of HU. CT scanners make 512 to 2048.
pub const MAX_ROWS_COLUMNS: u32 = 4096;
/// Bytes of a deflated data set that are inflated in search of Pixel Data: real CT headers have 4 to 200 KiB.
pub const MAX_INFLATED_HEADER: usize = 16 << 20;
/// Longest UID (PS3.5 section 9.1).
const MAX_UID: usize = 64;

/// Why an object has no readable header or identity, or a file no DICOM object.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The data set's structure is broken before Pixel Data.
    #[error("cannot read the header: {0}")]
    Dataset(#[from] DatasetError),
    /// A UID without which the object has no identity.
    #[error("{attribute} is missing or empty")]
    MissingUid {
        /// The attribute's keyword.
        attribute: &'static str,
    },
    /// A UID with characters or a length PS3.5 section 9.1 does not allow.
    #[error("{attribute} is no UID: expected at most 64 digits and dots")]
    BadUid {
        /// The attribute's keyword.
        attribute: &'static str,
    },
    /// Not a transfer syntax whose data sets this program can read.
    #[error("transfer syntax is unknown")]
    UnknownTransferSyntax,
    /// The deflate stream is broken.
    #[error("cannot inflate the deflated data set: {0}")]
    Inflate(std::io::Error),
    /// Inflating did not reach Pixel Data within the bound.
    #[error("deflated header is larger than {} bytes", MAX_INFLATED_HEADER)]
    InflatedTooLarge,
    /// A file that is neither Part 10 nor a raw data set.
    #[error("no DICOM object: {what}")]
    NotDicom {
        /// What was found.
        what: &'static str,
    },
    /// A file over the size bound.
    #[error("file has {bytes} bytes, more than the bound of {max_bytes}")]
    TooLarge {
        /// Size of the file.
        bytes: u64,
        /// The bound.
        max_bytes: u64,
    },
    /// The file system's error.
    #[error("cannot read the file: {0}")]
    Io(#[from] std::io::Error),
}

/// What an object is to this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectClass {
    /// An object of a CT image SOP class; [`judge`] says whether it can be used.
    CtSlice,
    /// No image (dose report, presentation state, raw data, private): taken, counted and ignored.
    Ignored,
    /// An image of another SOP class (secondary capture, MR …): refused with `not_ct`.
    OtherImage,
}

/// How samples are stored and become HU (PS3.3 C.7.6.3, C.11.1).
#[derive(Clone, Debug, PartialEq)]
pub struct PixelLayout {
    /// BitsAllocated: 8 or 16.
    pub bits_allocated: u16,
    /// BitsStored.
    pub bits_stored: u16,
    /// HighBit.
    pub high_bit: u16,
    /// PixelRepresentation is 1.
    pub signed: bool,
    /// SamplesPerPixel.
    pub samples_per_pixel: u16,
    /// PhotometricInterpretation.
    pub photometric: String,
    /// RescaleSlope.
    pub slope: f64,
    /// RescaleIntercept.
    pub intercept: f64,
    /// PixelPaddingValue, by PixelRepresentation.
    pub padding_value: Option<i32>,
    /// PixelPaddingRangeLimit, by PixelRepresentation.
    pub padding_range_limit: Option<i32>,
}

/// The header of one object.
#[derive(Clone, PartialEq)]
pub struct SliceHeader {
    /// SOPClassUID.
    pub sop_class_uid: String,
    /// SOPInstanceUID.
    pub sop_instance_uid: String,
    /// StudyInstanceUID.
    pub study_instance_uid: String,
    /// SeriesInstanceUID.
    pub series_instance_uid: String,
    /// Modality.
    pub modality: String,
    /// ImageType, one string a value.
    pub image_type: Vec<String>,
    /// The slice's place, or why it has none.
    pub geometry: Result<SliceGeometry, Refusal>,
    /// Rows, 0 if missing or unreadable.
    pub rows: u32,
    /// Columns, 0 if missing or unreadable.
    pub columns: u32,
    /// Sample layout.
    pub pixel: PixelLayout,
    /// Why the samples cannot become HU, as far as the header tells.
    pub pixel_fault: Option<Refusal>,
    /// ConvolutionKernel, values joined by backslashes.
    pub convolution_kernel: Option<String>,
    /// SliceThickness.
    pub slice_thickness_mm: Option<f64>,
    /// NumberOfFrames, 1 if missing.
    pub number_of_frames: u32,
    /// NumberOfSeriesRelatedInstances.
    pub series_count_hint: Option<u64>,
    /// ImagesInAcquisition.
    pub images_in_acquisition_hint: Option<u64>,
    /// SeriesNumber.
    pub series_number: Option<i64>,
    /// SeriesDescription.
    pub series_description: Option<String>,
    /// StudyDate.
    pub study_date: Option<String>,
    /// StudyTime.
    pub study_time: Option<String>,
    /// PatientID.
    pub patient_id: Option<String>,
    /// AccessionNumber.
    pub accession_number: Option<String>,
    /// Manufacturer.
    pub manufacturer: Option<String>,
    /// ManufacturerModelName.
    pub model_name: Option<String>,
    /// PatientPosition.
    pub patient_position: Option<String>,
    /// ContentTime.
    pub content_time: Option<String>,
    /// RescaleType.
    pub rescale_type: Option<String>,
}

impl std::fmt::Debug for SliceHeader {
    /// Identifying values (UIDs, IDs, dates, times, free text) are left out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SliceHeader")
            .field("class", &object_class(self))
            .field("rows", &self.rows)
            .field("columns", &self.columns)
            .field("number_of_frames", &self.number_of_frames)
            .field("pixel_fault", &self.pixel_fault.as_ref().map(|r| r.reason))
            .field("geometry", &self.geometry.as_ref().map(|_| "present").map_err(|r| r.reason))
            .finish_non_exhaustive()
    }
}

/// The elements of interest, borrowed from the data set.
#[derive(Default)]
struct Raw<'a> {
    charset: Option<Element<'a>>,
    image_type: Option<Element<'a>>,
    sop_class: Option<Element<'a>>,
    sop_instance: Option<Element<'a>>,
    study_date: Option<Element<'a>>,
    study_time: Option<Element<'a>>,
    content_time: Option<Element<'a>>,
    accession: Option<Element<'a>>,
    modality: Option<Element<'a>>,
    manufacturer: Option<Element<'a>>,
    series_description: Option<Element<'a>>,
    model_name: Option<Element<'a>>,
    patient_id: Option<Element<'a>>,
    slice_thickness: Option<Element<'a>>,
    kernel: Option<Element<'a>>,
    patient_position: Option<Element<'a>>,
    study: Option<Element<'a>>,
    series: Option<Element<'a>>,
    series_number: Option<Element<'a>>,
    position: Option<Element<'a>>,
    orientation: Option<Element<'a>>,
    images_in_acquisition: Option<Element<'a>>,
    series_related: Option<Element<'a>>,
    samples: Option<Element<'a>>,
    photometric: Option<Element<'a>>,
    frames: Option<Element<'a>>,
    rows: Option<Element<'a>>,
    columns: Option<Element<'a>>,
    pixel_spacing: Option<Element<'a>>,
    bits_allocated: Option<Element<'a>>,
    bits_stored: Option<Element<'a>>,
    high_bit: Option<Element<'a>>,
    representation: Option<Element<'a>>,
    padding: Option<Element<'a>>,
    padding_limit: Option<Element<'a>>,
    intercept: Option<Element<'a>>,
    slope: Option<Element<'a>>,
    rescale_type: Option<Element<'a>>,
    has_pixels: bool,
}

impl<'a> Raw<'a> {
    fn collect(bytes: &'a [u8], encoding: Encoding) -> Result<Self, DatasetError> {
        let mut raw = Raw::default();
        let mut walker = Walker::new(bytes, encoding);
        loop {
            let element = match walker.step()? {
                Step::Element(e) => e,
                Step::PixelData(_) => {
                    raw.has_pixels = true;
                    return Ok(raw);
                }
                Step::End => return Ok(raw),
            };
            let slot = match element.tag {
                0x0008_0005 => &mut raw.charset,
                0x0008_0008 => &mut raw.image_type,
                0x0008_0016 => &mut raw.sop_class,
                0x0008_0018 => &mut raw.sop_instance,
                0x0008_0020 => &mut raw.study_date,
                0x0008_0030 => &mut raw.study_time,
                0x0008_0033 => &mut raw.content_time,
                0x0008_0050 => &mut raw.accession,
                0x0008_0060 => &mut raw.modality,
                0x0008_0070 => &mut raw.manufacturer,
                0x0008_103e => &mut raw.series_description,
                0x0008_1090 => &mut raw.model_name,
                0x0010_0020 => &mut raw.patient_id,
                0x0018_0050 => &mut raw.slice_thickness,
                0x0018_1210 => &mut raw.kernel,
                0x0018_5100 => &mut raw.patient_position,
                0x0020_000d => &mut raw.study,
                0x0020_000e => &mut raw.series,
                0x0020_0011 => &mut raw.series_number,
                0x0020_0032 => &mut raw.position,
                0x0020_0037 => &mut raw.orientation,
                0x0020_1002 => &mut raw.images_in_acquisition,
                0x0020_1209 => &mut raw.series_related,
                0x0028_0002 => &mut raw.samples,
                0x0028_0004 => &mut raw.photometric,
                0x0028_0008 => &mut raw.frames,
                0x0028_0010 => &mut raw.rows,
                0x0028_0011 => &mut raw.columns,
                0x0028_0030 => &mut raw.pixel_spacing,
                0x0028_0100 => &mut raw.bits_allocated,
                0x0028_0101 => &mut raw.bits_stored,
                0x0028_0102 => &mut raw.high_bit,
                0x0028_0103 => &mut raw.representation,
                0x0028_0120 => &mut raw.padding,
                0x0028_0121 => &mut raw.padding_limit,
                0x0028_1052 => &mut raw.intercept,
                0x0028_1053 => &mut raw.slope,
                0x0028_1054 => &mut raw.rescale_type,
                _ => continue,
            };
            // A repeated element breaks the order of PS3.5 7.1; the first one counts.
            if slot.is_none() {
                *slot = Some(element);
            }
        }
    }

    /// Text by SpecificCharacterSet; what it cannot decode becomes U+FFFD.
    fn text(&self, element: Option<Element<'_>>) -> Option<String> {
        let element = element?;
        let bytes = element.trimmed();
        if bytes.is_empty() {
            return None;
        }
        if bytes.is_ascii() && !bytes.contains(&0x1b) {
            return Some(String::from_utf8_lossy(bytes).into_owned());
        }
        // Of several values the first one known counts: an empty first value means ASCII with code extensions.
        let charset = self
            .charset
            .and_then(|c| std::str::from_utf8(c.trimmed()).ok())
            .and_then(|c| c.split('\\').find_map(|code| SpecificCharacterSet::from_code(code.trim())))
            .unwrap_or_default();
        Some(charset.decode(bytes).unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned()))
    }
}

fn ascii(element: Option<Element<'_>>) -> Option<String> {
    let bytes = element?;
    let bytes = bytes.trimmed();
    (!bytes.is_empty()).then(|| String::from_utf8_lossy(bytes).into_owned())
}

fn uid(element: Option<Element<'_>>, attribute: &'static str) -> Result<String, HeaderError> {
    let element = element.ok_or(HeaderError::MissingUid { attribute })?;
    let bytes = element.trimmed();
    if bytes.is_empty() {
        return Err(HeaderError::MissingUid { attribute });
    }
    valid_uid(bytes).map(str::to_owned).ok_or(HeaderError::BadUid { attribute })
}

/// The bytes as a UID, if they are one: at most 64 digits and dots.
pub(crate) fn valid_uid(bytes: &[u8]) -> Option<&str> {
    let ok = !bytes.is_empty() && bytes.len() <= MAX_UID && bytes.iter().all(|b| b.is_ascii_digit() || *b == b'.');
    if ok { std::str::from_utf8(bytes).ok() } else { None }
}

fn whole(element: Option<Element<'_>>, implied: [u8; 2]) -> Option<i64> {
    let number = element?.number(implied)?;
    (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64)
}

fn unsigned<T: TryFrom<i64>>(element: Option<Element<'_>>) -> Option<T> {
    whole(element, *b"US").and_then(|v| T::try_from(v).ok())
}

fn vector<const N: usize>(element: Option<Element<'_>>) -> Option<[f64; N]> {
    let mut out = [0.0; N];
    (element?.numbers(*b"DS", &mut out)? == N).then_some(out)
}

/// Reads the header of an encoded data set.
///
/// Stops at Pixel Data. A deflated data set is inflated as far as needed.
///
/// # Errors
/// The structure is broken before Pixel Data, or SOPClassUID, SOPInstanceUID, StudyInstanceUID or SeriesInstanceUID is
/// missing or no UID (a C-STORE of it is answered 0xC000). Anything else that is wrong is kept in the header.
pub fn parse_header(dataset: &[u8], transfer_syntax_uid: &str) -> Result<SliceHeader, HeaderError> {
    let encoding = syntax::encoding(transfer_syntax_uid).ok_or(HeaderError::UnknownTransferSyntax)?;
    if !encoding.deflated {
        return build(&Raw::collect(dataset, encoding)?);
    }
    // A header is far smaller than the pixels behind it: inflate a little, then more.
    let mut bound = 64 << 10;
    loop {
        let (bytes, complete) = inflate(dataset, bound).map_err(HeaderError::Inflate)?;
        match Raw::collect(&bytes, encoding) {
            Ok(raw) if raw.has_pixels || complete => return build(&raw),
            Err(e) if complete || matches!(e, DatasetError::Malformed { .. }) => return Err(e.into()),
            _ if bound >= MAX_INFLATED_HEADER => return Err(HeaderError::InflatedTooLarge),
            _ => bound *= 16,
        }
    }
}

fn build(raw: &Raw<'_>) -> Result<SliceHeader, HeaderError> {
    let rows: u32 = unsigned(raw.rows).unwrap_or(0);
    let columns: u32 = unsigned(raw.columns).unwrap_or(0);
    let (pixel, pixel_fault) = pixel_layout(raw, rows, columns);
    Ok(SliceHeader {
        sop_class_uid: uid(raw.sop_class, "SOPClassUID")?,
        sop_instance_uid: uid(raw.sop_instance, "SOPInstanceUID")?,
        study_instance_uid: uid(raw.study, "StudyInstanceUID")?,
        series_instance_uid: uid(raw.series, "SeriesInstanceUID")?,
        modality: ascii(raw.modality).unwrap_or_default(),
        image_type: ascii(raw.image_type)
            .map(|t| t.split('\\').map(|v| v.trim().to_owned()).collect())
            .unwrap_or_default(),
        geometry: geometry(raw, rows, columns),
        rows,
        columns,
        pixel,
        pixel_fault,
        convolution_kernel: ascii(raw.kernel),
        slice_thickness_mm: raw.slice_thickness.and_then(|e| e.number(*b"DS")).filter(|t| *t > 0.0),
        number_of_frames: raw
            .frames
            .map_or(1, |e| whole(Some(e), *b"IS").and_then(|n| u32::try_from(n).ok()).unwrap_or(0)),
        series_count_hint: whole(raw.series_related, *b"IS").and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0),
        images_in_acquisition_hint: whole(raw.images_in_acquisition, *b"IS")
            .and_then(|n| u64::try_from(n).ok())
            .filter(|n| *n > 0),
        series_number: whole(raw.series_number, *b"IS"),
        series_description: raw.text(raw.series_description),
        study_date: ascii(raw.study_date),
        study_time: ascii(raw.study_time),
        patient_id: raw.text(raw.patient_id),
        accession_number: raw.text(raw.accession),
        manufacturer: raw.text(raw.manufacturer),
        model_name: raw.text(raw.model_name),
        patient_position: ascii(raw.patient_position),
        content_time: ascii(raw.content_time),
        rescale_type: ascii(raw.rescale_type),
    })
}

fn undecodable(detail: impl Into<String>) -> Refusal {
    Refusal::new(Reason::Undecodable, detail)
}

fn size_fault(rows: u32, columns: u32) -> Option<Refusal> {
    let ok = |n| (1..=MAX_ROWS_COLUMNS).contains(&n);
    (!ok(rows) || !ok(columns)).then(|| {
        undecodable(format!(
            "Rows and Columns must be numbers from 1 to {MAX_ROWS_COLUMNS}, got {rows} and {columns} (0: missing or unreadable)"
        ))
    })
}

fn pixel_layout(raw: &Raw<'_>, rows: u32, columns: u32) -> (PixelLayout, Option<Refusal>) {
    let bits_allocated: u16 = unsigned(raw.bits_allocated).unwrap_or(0);
    let bits_stored: u16 = unsigned(raw.bits_stored).unwrap_or(0);
    let representation = raw.representation.map(|e| whole(Some(e), *b"US"));
    let signed = representation == Some(Some(1));
    let slope = raw.slope.map(|e| e.number(*b"DS"));
    let intercept = raw.intercept.map(|e| e.number(*b"DS"));
    // US or SS by PixelRepresentation; either way the 16 bits count, not the VR it was written with.
    let padding = |element: Option<Element<'_>>| {
        whole(element, if signed { *b"SS" } else { *b"US" })
            .and_then(|v| i32::try_from(v).ok())
            .map(|v| if signed { i32::from(v as u16 as i16) } else { i32::from(v as u16) })
    };
    let layout = PixelLayout {
        bits_allocated,
        bits_stored,
        high_bit: unsigned(raw.high_bit).unwrap_or(bits_stored.saturating_sub(1)),
        signed,
        samples_per_pixel: unsigned(raw.samples).unwrap_or(0),
        photometric: ascii(raw.photometric).unwrap_or_default(),
        slope: slope.flatten().unwrap_or(1.0),
        intercept: intercept.flatten().unwrap_or(0.0),
        padding_value: padding(raw.padding),
        padding_range_limit: padding(raw.padding_limit),
    };
    let fault = size_fault(rows, columns).or_else(|| {
        if layout.samples_per_pixel != 1 {
            return Some(undecodable(format!("SamplesPerPixel must be 1, got {}", layout.samples_per_pixel)));
        }
        if !matches!(layout.photometric.as_str(), "MONOCHROME1" | "MONOCHROME2") {
            return Some(undecodable("PhotometricInterpretation must be MONOCHROME1 or MONOCHROME2"));
        }
        if !matches!(bits_allocated, 8 | 16) {
            return Some(undecodable(format!("BitsAllocated must be 8 or 16, got {bits_allocated}")));
        }
        if !(1..=bits_allocated).contains(&bits_stored)
            || layout.high_bit >= bits_allocated
            || layout.high_bit + 1 < bits_stored
        {
            return Some(undecodable(format!(
                "BitsStored {bits_stored} and HighBit {} do not fit BitsAllocated {bits_allocated}",
                layout.high_bit
            )));
        }
        if !matches!(representation, Some(Some(0 | 1))) {
            return Some(undecodable("PixelRepresentation must be 0 or 1"));
        }
        match (slope, intercept) {
            (Some(Some(s)), Some(Some(_))) if s != 0.0 => None,
            (None, _) | (_, None) => {
                Some(undecodable("RescaleSlope or RescaleIntercept is missing, so the values have no known HU"))
            }
            _ => Some(undecodable("RescaleSlope and RescaleIntercept must each be one finite number, the slope not 0")),
        }
    });
    (layout, fault)
}

fn geometry(raw: &Raw<'_>, rows: u32, columns: u32) -> Result<SliceGeometry, Refusal> {
    if let Some(fault) = size_fault(rows, columns) {
        return Err(fault);
    }
    let missing = |what: &str| Refusal::new(Reason::NotAxial, format!("{what} is missing or not finite numbers"));
    let position_mm: [f64; 3] = vector(raw.position).ok_or_else(|| missing("ImagePositionPatient"))?;
    let cosines: [f64; 6] = vector(raw.orientation).ok_or_else(|| missing("ImageOrientationPatient"))?;
    let pixel_spacing_mm: [f64; 2] = vector(raw.pixel_spacing)
        .filter(|s: &[f64; 2]| s.iter().all(|v| *v > 0.0))
        .ok_or_else(|| Refusal::new(Reason::InconsistentGeometry, "PixelSpacing must be two positive numbers"))?;
    Ok(SliceGeometry {
        rows,
        columns,
        pixel_spacing_mm,
        position_mm,
        row_cosines: [cosines[0], cosines[1], cosines[2]],
        column_cosines: [cosines[3], cosines[4], cosines[5]],
    })
}

/// What the object is.
pub fn object_class(header: &SliceHeader) -> ObjectClass {
    if syntax::is_ct_class(&header.sop_class_uid) {
        ObjectClass::CtSlice
    } else if header.rows > 0 && header.columns > 0 {
        ObjectClass::OtherImage
    } else {
        ObjectClass::Ignored
    }
}

/// Words in ImageType that mark a view that is no axial reconstruction, in upper case.
const LOCALIZER_WORDS: [&str; 4] = ["LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW"];
/// Words in ImageType of a DERIVED image that mark a reformat, projection, rendering or map.
const DERIVED_WORDS: [&str; 17] = [
    "MPR",
    "MIP",
    "MINIP",
    "3D",
    "VRT",
    "SSD",
    "CPR",
    "CURVED",
    "REFORMATTED",
    "PROJECTION",
    "VOLREN",
    "RENDERING",
    "SCREEN",
    "SAVE",
    "SUBTRACTION",
    "FUSED",
    "OVERLAY",
];

impl SliceHeader {
    /// Stands for a series of which no object can be read: its identifiers and nothing else. No such object is judged.
    pub fn of_series(study_instance_uid: String, series_instance_uid: String) -> Self {
        let nothing = || undecodable("no object of the series can be read");
        Self {
            sop_class_uid: String::new(),
            sop_instance_uid: String::new(),
            study_instance_uid,
            series_instance_uid,
            modality: String::new(),
            image_type: Vec::new(),
            geometry: Err(nothing()),
            rows: 0,
            columns: 0,
            pixel: PixelLayout {
                bits_allocated: 0,
                bits_stored: 0,
                high_bit: 0,
                signed: false,
                samples_per_pixel: 0,
                photometric: String::new(),
                slope: 1.0,
                intercept: 0.0,
                padding_value: None,
                padding_range_limit: None,
            },
            pixel_fault: Some(nothing()),
            convolution_kernel: None,
            slice_thickness_mm: None,
            number_of_frames: 1,
            series_count_hint: None,
            images_in_acquisition_hint: None,
            series_number: None,
            series_description: None,
            study_date: None,
            study_time: None,
            patient_id: None,
            accession_number: None,
            manufacturer: None,
            model_name: None,
            patient_position: None,
            content_time: None,
            rescale_type: None,
        }
    }

    /// Whether another object of the same SOPInstanceUID says the same about place, pixels and kind; how it is encoded
    /// and what else it carries may differ.
    pub fn same_object(&self, other: &Self) -> bool {
        self.sop_class_uid == other.sop_class_uid
            && self.study_instance_uid == other.study_instance_uid
            && self.modality == other.modality
            && self.image_type == other.image_type
            && self.geometry == other.geometry
            && (self.rows, self.columns) == (other.rows, other.columns)
            && self.pixel.slope == other.pixel.slope
            && self.pixel.intercept == other.pixel.intercept
            && self.number_of_frames == other.number_of_frames
    }
}

/// Whether one object may be part of a series that is judged.
///
/// In this order: modality CT and a CT SOP class (`not_ct`); no LOCALIZER (or SCOUT, TOPOGRAM, SURVIEW) in ImageType
/// (`localizer`); not derived (below); one frame of a decodable layout (`undecodable`); a position and an orientation
/// (the reason kept in `geometry`).
///
/// `derived`: ImageType value 2 is SECONDARY; or value 1 is DERIVED and a later value holds one of the words MPR, MIP,
/// 3D, CPR, REFORMATTED, PROJECTION … (words split at blanks and underscores); or RescaleType is neither HU nor US
/// (effective atomic number, electron density and other spectral maps). DERIVED\PRIMARY\AXIAL is accepted: scanners
/// write it on axial images of iterative and deep-learning reconstructions.
///
/// # Errors
/// The reason and what was expected.
pub fn judge(header: &SliceHeader) -> Result<(), Refusal> {
    if header.modality != "CT" {
        return Err(Refusal::new(Reason::NotCt, "Modality is not CT"));
    }
    if !syntax::is_ct_class(&header.sop_class_uid) {
        return Err(Refusal::new(Reason::NotCt, "SOPClassUID is no CT image storage class"));
    }
    let has_word = |values: &[String], words: &[&str]| {
        values.iter().flat_map(|v| v.split([' ', '_'])).any(|w| words.iter().any(|x| w.eq_ignore_ascii_case(x)))
    };
    if has_word(&header.image_type, &LOCALIZER_WORDS) {
        return Err(Refusal::new(Reason::Localizer, "ImageType marks a localizer"));
    }
    let value = |n: usize| header.image_type.get(n).map_or("", String::as_str);
    if value(1).eq_ignore_ascii_case("SECONDARY") {
        return Err(Refusal::new(Reason::Derived, "ImageType value 2 is SECONDARY"));
    }
    if value(0).eq_ignore_ascii_case("DERIVED") && has_word(header.image_type.get(1..).unwrap_or(&[]), &DERIVED_WORDS) {
        return Err(Refusal::new(Reason::Derived, "ImageType marks a reformat, projection or rendering"));
    }
    if header.rescale_type.as_deref().is_some_and(|t| !matches!(t, "HU" | "US")) {
        return Err(Refusal::new(Reason::Derived, "RescaleType is not HU"));
    }
    if header.sop_class_uid != syntax::CT_IMAGE || header.number_of_frames != 1 {
        return Err(undecodable("multi-frame CT is not read: expected CT Image Storage with one frame an object"));
    }
    if let Some(fault) = &header.pixel_fault {
        return Err(fault.clone());
    }
    header.geometry.as_ref().map(|_| ()).map_err(Clone::clone)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dicom::testkit::{Builder, DEFLATED, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE};
    use proptest::prelude::*;

    fn header(b: &Builder) -> SliceHeader {
        parse_header(&b.encode(EXPLICIT_LE), EXPLICIT_LE).unwrap()
    }

    #[test]
    fn the_same_header_comes_from_every_encoding() {
        let b = Builder::ct(6, 10);
        let reference = header(&b);
        assert_eq!((reference.rows, reference.columns), (6, 10));
        assert_eq!(reference.geometry.as_ref().unwrap().position_mm, [-150.5, -160.0, 42.25]);
        assert_eq!(reference.slice_thickness_mm, Some(1.25));
        assert_eq!(reference.pixel.intercept, -1024.0);
        assert_eq!(reference.patient_id.as_deref(), Some("PID-1234"));
        assert_eq!(judge(&reference), Ok(()));
        assert_eq!(object_class(&reference), ObjectClass::CtSlice);
        for ts in [IMPLICIT_LE, EXPLICIT_BE, DEFLATED] {
            assert_eq!(parse_header(&b.encode(ts), ts).unwrap(), reference, "{ts}");
        }
    }

    /// Changes one thing on a sound slice and says what it is refused for.
    fn refused(change: impl FnOnce(&mut Builder)) -> Refusal {
        let mut b = Builder::ct(4, 4);
        change(&mut b);
        judge(&header(&b)).expect_err("must be refused")
    }

    #[test]
    fn what_must_not_be_judged_is_refused_with_its_reason() {
        type Change = fn(&mut Builder);
        let table: &[(Change, Reason)] = &[
            (|b| _ = b.text(0x0008_0060, b"CS", "MR"), Reason::NotCt),
            (|b| _ = b.remove(0x0008_0060), Reason::NotCt),
            (|b| _ = b.text(0x0008_0016, b"UI", syntax::SECONDARY_CAPTURE), Reason::NotCt),
            (|b| _ = b.text(0x0008_0008, b"CS", "ORIGINAL\\PRIMARY\\LOCALIZER"), Reason::Localizer),
            (|b| _ = b.text(0x0008_0008, b"CS", "ORIGINAL\\PRIMARY\\LOCALIZER\\CT_SOM5 TOP"), Reason::Localizer),
            (|b| _ = b.text(0x0008_0008, b"CS", "DERIVED\\SECONDARY\\AXIAL"), Reason::Derived),
            (|b| _ = b.text(0x0008_0008, b"CS", "DERIVED\\PRIMARY\\MPR"), Reason::Derived),
            (|b| _ = b.text(0x0008_0008, b"CS", "DERIVED\\PRIMARY\\AXIAL\\CSA MIP"), Reason::Derived),
            (|b| _ = b.text(0x0028_1054, b"LO", "Z_EFF"), Reason::Derived),
            (|b| _ = b.text(0x0008_0016, b"UI", syntax::ENHANCED_CT_IMAGE), Reason::Undecodable),
            (|b| _ = b.text(0x0028_0008, b"IS", "12"), Reason::Undecodable),
            (|b| _ = b.us(0x0028_0002, &[3]), Reason::Undecodable),
            (|b| _ = b.text(0x0028_0004, b"CS", "PALETTE COLOR"), Reason::Undecodable),
            (|b| _ = b.us(0x0028_0100, &[32]), Reason::Undecodable),
            (|b| _ = b.us(0x0028_0101, &[17]), Reason::Undecodable),
            (|b| _ = b.us(0x0028_0102, &[10]), Reason::Undecodable),
            (|b| _ = b.us(0x0028_0103, &[2]), Reason::Undecodable),
            (|b| _ = b.remove(0x0028_0103), Reason::Undecodable),
            (|b| _ = b.us(0x0028_0010, &[0]), Reason::Undecodable),
            (|b| _ = b.us(0x0028_0011, &[65535]), Reason::Undecodable),
            (|b| _ = b.remove(0x0028_0010), Reason::Undecodable),
            (|b| _ = b.text(0x0028_0010, b"LO", "many"), Reason::Undecodable),
            (|b| _ = b.text(0x0028_1053, b"DS", "0"), Reason::Undecodable),
            (|b| _ = b.text(0x0028_1053, b"DS", "NaN"), Reason::Undecodable),
            (|b| _ = b.text(0x0028_1052, b"DS", "-1024\\0"), Reason::Undecodable),
            (|b| _ = b.text(0x0028_1052, b"DS", "-1024 HU"), Reason::Undecodable),
            (|b| _ = b.remove(0x0028_1052), Reason::Undecodable),
            (|b| _ = b.remove(0x0020_0032), Reason::NotAxial),
            (|b| _ = b.text(0x0020_0032, b"DS", "1\\2"), Reason::NotAxial),
            (|b| _ = b.text(0x0020_0032, b"DS", "1\\NaN\\3"), Reason::NotAxial),
            (|b| _ = b.text(0x0020_0032, b"DS", "1\\inf\\3"), Reason::NotAxial),
            (|b| _ = b.text(0x0020_0032, b"DS", "1,5\\2\\3"), Reason::NotAxial),
            (|b| _ = b.text(0x0020_0032, b"PN", "1\\2\\3"), Reason::NotAxial),
            (|b| _ = b.remove(0x0020_0037), Reason::NotAxial),
            (|b| _ = b.text(0x0028_0030, b"DS", "0.7"), Reason::InconsistentGeometry),
            (|b| _ = b.text(0x0028_0030, b"DS", "0.7\\-0.7"), Reason::InconsistentGeometry),
            (|b| _ = b.text(0x0028_0030, b"DS", "0.7\\NaN"), Reason::InconsistentGeometry),
        ];
        for (n, (change, reason)) in table.iter().enumerate() {
            let refusal = refused(*change);
            assert_eq!(refusal.reason, *reason, "row {n}: {refusal}");
        }
    }

    #[test]
    fn axial_images_of_iterative_reconstruction_are_accepted() {
        for image_type in ["DERIVED\\PRIMARY\\AXIAL", "DERIVED\\PRIMARY\\AXIAL\\CT_SOM7 SPI DUAL", "ORIGINAL\\PRIMARY"]
        {
            let mut b = Builder::ct(4, 4);
            b.text(0x0008_0008, b"CS", image_type);
            assert_eq!(judge(&header(&b)), Ok(()), "{image_type}");
        }
    }

    #[test]
    fn a_number_in_another_vr_or_repeated_equally_still_counts() {
        let mut b = Builder::ct(4, 4);
        b.text(0x0028_0010, b"IS", "4 ").bytes(0x0028_0011, b"UL", &4u32.to_le_bytes());
        b.text(0x0028_1052, b"DS", " -1024.0\\-1024 ").bytes(0x0028_0101, b"UN", &12u16.to_le_bytes());
        b.bytes(0x0028_1053, b"FD", &1f64.to_le_bytes());
        let h = header(&b);
        assert_eq!((h.rows, h.columns, h.pixel.bits_stored), (4, 4, 12));
        assert_eq!(judge(&h), Ok(()));
    }

    #[test]
    fn an_object_without_identity_is_an_error_that_names_the_attribute() {
        for (tag, name) in [
            (0x0008_0016, "SOPClassUID"),
            (0x0008_0018, "SOPInstanceUID"),
            (0x0020_000d, "StudyInstanceUID"),
            (0x0020_000e, "SeriesInstanceUID"),
        ] {
            let mut b = Builder::ct(4, 4);
            b.remove(tag);
            let e = parse_header(&b.encode(EXPLICIT_LE), EXPLICIT_LE).unwrap_err();
            assert!(matches!(e, HeaderError::MissingUid { attribute } if attribute == name), "{e}");
            b.text(tag, b"UI", "not/a/uid");
            let e = parse_header(&b.encode(EXPLICIT_LE), EXPLICIT_LE).unwrap_err();
            assert!(matches!(e, HeaderError::BadUid { attribute } if attribute == name), "{e}");
            assert!(!e.to_string().contains("not/a"), "the value stays out of the message");
        }
    }

    #[test]
    fn sequences_of_any_length_form_are_skipped() {
        let inner = [0x08, 0, 0x50, 0x11, b'U', b'I', 2, 0, b'1', 0];
        let mut undefined = vec![0xfe, 0xff, 0, 0xe0, 0xff, 0xff, 0xff, 0xff];
        undefined.extend_from_slice(&inner);
        undefined.extend_from_slice(&[0xfe, 0xff, 0x0d, 0xe0, 0, 0, 0, 0]);
        undefined.extend_from_slice(&[0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0]);
        let dataset = Builder::ct(4, 4).encode(EXPLICIT_LE);
        let at = dataset.windows(4).position(|w| w == [0x08, 0, 0x60, 0]).unwrap();
        let mut with = dataset[..at].to_vec();
        with.extend_from_slice(&[0x08, 0, 0x51, 0, b'S', b'Q', 0, 0, 0xff, 0xff, 0xff, 0xff]);
        with.extend_from_slice(&undefined);
        with.extend_from_slice(&dataset[at..]);
        assert_eq!(parse_header(&with, EXPLICIT_LE).unwrap(), parse_header(&dataset, EXPLICIT_LE).unwrap());
        // Nested without end: an error, no overflow of the stack.
        let mut deep = dataset[..at].to_vec();
        for _ in 0..10_000 {
            deep.extend_from_slice(&[0x08, 0, 0x51, 0, b'S', b'Q', 0, 0, 0xff, 0xff, 0xff, 0xff]);
            deep.extend_from_slice(&[0xfe, 0xff, 0, 0xe0, 0xff, 0xff, 0xff, 0xff]);
        }
        assert!(matches!(parse_header(&deep, EXPLICIT_LE), Err(HeaderError::Dataset(_))));
    }

    #[test]
    fn a_deflate_bomb_is_bounded() {
        use std::io::Write;
        let mut z = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        // One element of 4 GB is claimed, 64 MiB of it are there.
        z.write_all(&[0x08, 0, 0x05, 0, b'U', b'T', 0, 0, 0xf0, 0xff, 0xff, 0xff]).unwrap();
        for _ in 0..64 {
            z.write_all(&vec![0; 1 << 20]).unwrap();
        }
        let bomb = z.finish().unwrap();
        assert!(matches!(parse_header(&bomb, DEFLATED), Err(HeaderError::InflatedTooLarge)));
    }

    #[test]
    fn debug_shows_no_identifying_value() {
        let text = format!("{:?}", header(&Builder::ct(4, 4)));
        for value in ["1.2.3", "PID-1234", "20200102", "Doe", "ACME"] {
            assert!(!text.contains(value), "{text}");
        }
    }

    #[test]
    fn text_is_decoded_by_its_character_set() {
        let mut b = Builder::ct(4, 4);
        b.bytes(0x0008_103e, b"LO", b"Thorax gro\xdf");
        assert_eq!(header(&b).series_description.as_deref(), Some("Thorax groß"));
        b.text(0x0008_0005, b"CS", "ISO_IR 192").text(0x0008_103e, b"LO", "胸部");
        assert_eq!(header(&b).series_description.as_deref(), Some("胸部"));
    }

    proptest! {
        #[test]
        fn mutated_headers_never_panic(
            edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
            ts in prop::sample::select(vec![EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED]),
        ) {
            let mut bytes = Builder::ct(4, 4).encode(ts);
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let _ = parse_header(&bytes, ts).map(|h| (judge(&h), object_class(&h)));
            let _ = parse_header(&bytes[..cut.index(bytes.len())], ts);
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            for ts in [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED] {
                let _ = parse_header(&bytes, ts);
            }
            let _ = crate::dicom::part10::parse_part10(bytes);
        }
    }
}
