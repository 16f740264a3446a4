//! Phantoms as CT Image Storage objects: DICOM Part 10, explicit VR little endian (PS3.3 A.3, PS3.10).
//!
//! Every type 1 and 2 attribute of the CT Image IOD is there. UIDs lie under 2.25 and follow from the spec, so that the
//! same spec gives the same objects; patients are called `PHANTOM^…`. All reconstructions of one patient share the study
//! and the frame of reference.

use super::math::hash_all;
use super::scene::{Frame, Scene, Scratch};
use super::{Acquisition, MAX_TILT_DEG, Person, Phantom, PhantomError, PhantomSpec, create_dir, scene_of, text_enum};
use dicom_core::{DataElement, PrimitiveValue, Tag, VR};
use dicom_dictionary_std::{tags, uids};
use dicom_object::{FileMetaTableBuilder, InMemDicomObject};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

text_enum! {
    /// PatientPosition (0018,5100): which end enters the gantry first, and which side is down.
    PatientPosition, "patient position" {
        /// Head first, supine.
        Hfs => "HFS",
        /// Head first, prone.
        Hfp => "HFP",
        /// Feet first, supine.
        Ffs => "FFS",
        /// Feet first, prone.
        Ffp => "FFP",
    }
}

impl PatientPosition {
    /// Face down.
    pub fn prone(self) -> bool {
        matches!(self, PatientPosition::Hfp | PatientPosition::Ffp)
    }
}

/// How a phantom is written as a DICOM series.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DicomOptions {
    /// Position on the table. A prone patient is rendered with the table in front; the images are stored as a scanner
    /// shows them (the table at the bottom): rows run to the front and columns to the patient's right.
    pub patient_position: PatientPosition,
    /// Gantry tilt, within [`MAX_TILT_DEG`]: the planes are tilted, the table moves along z.
    pub tilt_deg: f64,
    /// Signed 16-bit pixels instead of unsigned ones. The rescale is slope 1, intercept -1024 either way.
    pub signed: bool,
    /// BitsStored: 12 (unsigned only) to 16.
    pub bits_stored: u16,
    /// State NumberOfSeriesRelatedInstances (0020,1209).
    pub declare_count: bool,
    /// Slices a second by which ContentTime progresses.
    pub reconstruction_rate_hz: f64,
    /// StudyInstanceUID; `None` for the one that follows from the spec.
    pub study_uid: Option<String>,
    /// SeriesNumber; series of one study need different ones.
    pub series_number: u32,
    /// Number, write and time the slices from the head to the feet.
    pub descending: bool,
    /// Fill what lies outside the reconstruction circle with a PixelPaddingValue: -2000 stored in signed pixels, 0 in
    /// unsigned ones.
    pub circle_padding: bool,
    /// Flip the columns: images as seen from the head. Rare, but allowed.
    pub seen_from_head: bool,
}

impl Default for DicomOptions {
    fn default() -> Self {
        Self {
            patient_position: PatientPosition::Hfs,
            tilt_deg: 0.0,
            signed: false,
            bits_stored: 16,
            declare_count: false,
            reconstruction_rate_hz: 25.0,
            study_uid: None,
            series_number: 2,
            descending: false,
            circle_padding: false,
            seen_from_head: false,
        }
    }
}

impl DicomOptions {
    /// The acquisition the options ask for.
    pub fn acquisition(&self) -> Acquisition {
        Acquisition { tilt_deg: self.tilt_deg, prone: self.patient_position.prone() }
    }

    pub(super) fn checked_acquisition(&self) -> Result<Acquisition, PhantomError> {
        let fail = |option, expected, got: String| Err(PhantomError::Option { option, expected, got });
        if self.tilt_deg.is_nan() || self.tilt_deg.abs() > MAX_TILT_DEG {
            return fail("tilt_deg", "-30 to 30", self.tilt_deg.to_string());
        }
        if !(12..=16).contains(&self.bits_stored) || (self.signed && self.bits_stored != 16) {
            return fail("bits_stored", "12 to 16, and 16 for signed pixels", self.bits_stored.to_string());
        }
        if !(self.reconstruction_rate_hz >= 0.01 && self.reconstruction_rate_hz <= 1000.0) {
            return fail("reconstruction_rate_hz", "0.01 to 1000", self.reconstruction_rate_hz.to_string());
        }
        if let Some(uid) = &self.study_uid {
            let valid = !uid.is_empty() && uid.len() <= 64 && uid.bytes().all(|b| b.is_ascii_digit() || b == b'.');
            if !valid {
                return fail("study_uid", "a DICOM UID", format!("{} characters", uid.len()));
            }
        }
        Ok(self.acquisition())
    }
}

/// A UID under 2.25 (PS3.5 B.2) from a hash of `parts`.
fn uid(parts: &[u64]) -> String {
    let high = hash_all(&[hash_all(parts), 1]);
    let low = hash_all(&[hash_all(parts), 2]);
    format!("2.25.{}", u128::from(high) << 64 | u128::from(low))
}

/// A decimal string of at most 16 characters.
fn ds(v: f64) -> String {
    let mut text = format!("{v:.6}");
    while text.ends_with('0') {
        text.pop();
    }
    if text.ends_with('.') {
        text.pop();
    }
    if text == "-0" { "0".into() } else { text }
}

fn ds_all(values: &[f64]) -> String {
    values.iter().map(|v| ds(*v)).collect::<Vec<_>>().join("\\")
}

/// `HHMMSS.FFFFFF` of seconds after midnight.
fn tm(seconds: f64) -> String {
    let micros = (seconds * 1e6 + 0.5) as u64;
    let (s, us) = (micros / 1_000_000, micros % 1_000_000);
    format!("{:02}{:02}{:02}.{us:06}", s / 3600 % 24, s / 60 % 60, s % 60)
}

/// The study begins at ten; there is no clock in a phantom.
const STUDY_TIME_S: f64 = 36_000.0;
const STUDY_DATE: &str = "20200101";
/// RescaleIntercept.
const INTERCEPT: i32 = -1024;
/// Stored value outside the reconstruction circle, signed pixels.
const PADDING_SIGNED: i32 = -2000;

/// A phantom ready to be written slice by slice. Holds what is shared between slices.
pub struct DicomSeries<'a> {
    phantom: &'a Phantom,
    options: &'a DicomOptions,
    acquisition: Acquisition,
    /// Present when the options ask for another acquisition than the phantom's: slices are rendered anew.
    scene: Option<Scene>,
    person: Person,
    keys: Vec<u64>,
    study_uid: String,
    frame_uid: String,
    series_uid: String,
}

impl<'a> DicomSeries<'a> {
    /// Checks the options and prepares.
    pub fn new(phantom: &'a Phantom, options: &'a DicomOptions) -> Result<Self, PhantomError> {
        let acquisition = options.checked_acquisition()?;
        let spec = &phantom.spec;
        let scene = (acquisition != phantom.acquisition).then(|| scene_of(spec, &acquisition, &phantom.variation));
        let study = [spec.seed, spec.class as u64, spec.stage as u64, spec.severity.to_bits()];
        let with = |purpose: u64| [&study[..], &[purpose]].concat();
        let mut keys = with(3);
        keys.extend([
            spec.slices as u64,
            spec.rows as u64,
            spec.columns as u64,
            spec.spacing_mm.to_bits(),
            spec.thickness_mm.to_bits(),
            spec.pixel_spacing_mm.to_bits(),
            spec.kernel as u64,
            spec.noise_hu.to_bits(),
            options.patient_position as u64,
            options.tilt_deg.to_bits(),
            u64::from(options.signed),
            u64::from(options.bits_stored),
            u64::from(options.series_number),
            u64::from(options.circle_padding),
            u64::from(options.seen_from_head),
            u64::from(options.descending),
        ]);
        if let Some(text) = &options.study_uid {
            keys.extend(text.bytes().map(u64::from));
        }
        Ok(Self {
            phantom,
            options,
            acquisition,
            scene,
            person: Person::of(spec),
            study_uid: options.study_uid.clone().unwrap_or_else(|| uid(&with(1))),
            frame_uid: uid(&with(2)),
            series_uid: uid(&keys),
            keys,
        })
    }

    /// StudyInstanceUID.
    pub fn study_uid(&self) -> &str {
        &self.study_uid
    }

    /// SeriesInstanceUID.
    pub fn series_uid(&self) -> &str {
        &self.series_uid
    }

    /// SOPInstanceUID of slice `index` (feet first).
    pub fn sop_instance_uid(&self, index: usize) -> String {
        uid(&[&self.keys[..], &[4, index as u64]].concat())
    }

    /// Number of slices.
    pub fn len(&self) -> usize {
        self.phantom.spec.slices
    }

    /// Whether there is no slice; never, since a spec has at least one.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Place of slice `index` (feet first) in the order of acquisition, from 0.
    fn turn(&self, index: usize) -> usize {
        if self.options.descending { self.len() - 1 - index } else { index }
    }

    /// Slice `index`, feet first, as a Part 10 file.
    ///
    /// # Panics
    /// If `index` is out of range.
    pub fn slice(&self, index: usize) -> Result<Vec<u8>, PhantomError> {
        assert!(index < self.len(), "phantom slice {index} of {}", self.len());
        match &self.scene {
            None => self.encode(index, self.phantom.slice(index)),
            Some(scene) => self.render(index, scene, &mut scene.scratch()),
        }
    }

    fn render(&self, index: usize, scene: &Scene, scratch: &mut Scratch) -> Result<Vec<u8>, PhantomError> {
        let n = self.phantom.spec.slice_len();
        let mut hu = vec![0i16; n];
        let (mut lesion, mut lung) = (vec![0u8; n], vec![0u8; n]);
        scene.slice(index, scratch, &mut hu, &mut lesion, &mut lung);
        self.encode(index, &hu)
    }

    /// Row and column flips of the stored image.
    fn flips(&self) -> (bool, bool) {
        let prone = self.acquisition.prone;
        (prone, prone != self.options.seen_from_head)
    }

    fn encode(&self, index: usize, hu: &[i16]) -> Result<Vec<u8>, PhantomError> {
        let spec = &self.phantom.spec;
        let o = self.options;
        let frame = Frame::new(spec, &self.acquisition);
        let (flip_rows, flip_columns) = self.flips();
        let sign = |flip: bool| if flip { -1.0 } else { 1.0 };
        let row_cosines = [sign(flip_columns), 0.0, 0.0];
        let column_cosines = frame.down.map(|v| v * sign(flip_rows));
        let mut position = [0, 1, 2].map(|i| frame.origin[i] + index as f64 * frame.step[i]);
        let pitch = spec.pixel_spacing_mm;
        if flip_rows {
            let way = (spec.rows - 1) as f64 * pitch;
            position = [0, 1, 2].map(|i| position[i] + way * frame.down[i]);
        }
        if flip_columns {
            position[0] += (spec.columns - 1) as f64 * pitch;
        }
        let location = frame.origin[2] + index as f64 * frame.step[2];
        let turn = self.turn(index);
        let sop_uid = self.sop_instance_uid(index);
        // The scan itself is faster than the reconstruction: 40 mm a second.
        let acquired = STUDY_TIME_S + 95.0 + turn as f64 * spec.spacing_mm / 40.0;
        let content = STUDY_TIME_S + 100.0 + turn as f64 / o.reconstruction_rate_hz;
        let id = format!("PH{:016X}", spec.seed);
        let field_mm = pitch * spec.rows.max(spec.columns) as f64;

        let mut object = InMemDicomObject::new_empty();
        let mut put = |tag: Tag, vr: VR, value: &str| {
            let value = if value.is_empty() { PrimitiveValue::Empty } else { PrimitiveValue::from(value) };
            object.put(DataElement::new(tag, vr, value));
        };
        put(tags::SPECIFIC_CHARACTER_SET, VR::CS, "ISO_IR 100");
        put(tags::IMAGE_TYPE, VR::CS, "ORIGINAL\\PRIMARY\\AXIAL");
        put(tags::INSTANCE_CREATION_DATE, VR::DA, STUDY_DATE);
        put(tags::INSTANCE_CREATION_TIME, VR::TM, &tm(content));
        put(tags::SOP_CLASS_UID, VR::UI, uids::CT_IMAGE_STORAGE);
        put(tags::SOP_INSTANCE_UID, VR::UI, &sop_uid);
        for tag in [tags::STUDY_DATE, tags::SERIES_DATE, tags::ACQUISITION_DATE, tags::CONTENT_DATE] {
            put(tag, VR::DA, STUDY_DATE);
        }
        put(tags::STUDY_TIME, VR::TM, &tm(STUDY_TIME_S));
        put(tags::SERIES_TIME, VR::TM, &tm(STUDY_TIME_S + 90.0));
        put(tags::ACQUISITION_TIME, VR::TM, &tm(acquired));
        put(tags::CONTENT_TIME, VR::TM, &tm(content));
        put(tags::ACCESSION_NUMBER, VR::SH, &id[..16]);
        put(tags::MODALITY, VR::CS, "CT");
        put(tags::MANUFACTURER, VR::LO, "darnet");
        put(tags::REFERRING_PHYSICIAN_NAME, VR::PN, "");
        put(tags::STUDY_DESCRIPTION, VR::LO, "SYNTHETIC CHEST CT");
        let kernel = spec.kernel.as_str();
        put(
            tags::SERIES_DESCRIPTION,
            VR::LO,
            &format!("PHANTOM CHEST {} {}", ds(spec.spacing_mm), kernel.to_uppercase()),
        );
        put(tags::MANUFACTURER_MODEL_NAME, VR::LO, "phantom");
        put(tags::PATIENT_NAME, VR::PN, &self.person.name);
        put(tags::PATIENT_ID, VR::LO, &id);
        put(tags::PATIENT_BIRTH_DATE, VR::DA, "");
        put(tags::PATIENT_SEX, VR::CS, if self.person.female { "F" } else { "M" });
        put(tags::PATIENT_AGE, VR::AS, &format!("{:03}Y", self.person.age_years));
        put(tags::PATIENT_COMMENTS, VR::LT, "Synthetic image, no person");
        put(tags::BODY_PART_EXAMINED, VR::CS, "CHEST");
        put(tags::SLICE_THICKNESS, VR::DS, &ds(spec.thickness_mm));
        put(tags::KVP, VR::DS, "120");
        put(tags::DATA_COLLECTION_DIAMETER, VR::DS, "500");
        put(tags::SOFTWARE_VERSIONS, VR::LO, env!("CARGO_PKG_VERSION"));
        put(tags::PROTOCOL_NAME, VR::LO, "CHEST");
        put(tags::RECONSTRUCTION_DIAMETER, VR::DS, &ds(field_mm));
        put(tags::GANTRY_DETECTOR_TILT, VR::DS, &ds(self.acquisition.tilt_deg));
        put(tags::TABLE_HEIGHT, VR::DS, "150");
        put(tags::ROTATION_DIRECTION, VR::CS, "CW");
        put(tags::EXPOSURE_TIME, VR::IS, "500");
        put(tags::X_RAY_TUBE_CURRENT, VR::IS, "200");
        put(tags::EXPOSURE, VR::IS, "100");
        put(tags::CONVOLUTION_KERNEL, VR::SH, &kernel.to_uppercase());
        put(tags::PATIENT_POSITION, VR::CS, o.patient_position.as_str());
        put(tags::STUDY_INSTANCE_UID, VR::UI, &self.study_uid);
        put(tags::SERIES_INSTANCE_UID, VR::UI, &self.series_uid);
        put(tags::STUDY_ID, VR::SH, "1");
        put(tags::SERIES_NUMBER, VR::IS, &o.series_number.to_string());
        put(tags::ACQUISITION_NUMBER, VR::IS, "1");
        put(tags::INSTANCE_NUMBER, VR::IS, &(turn + 1).to_string());
        put(tags::IMAGE_POSITION_PATIENT, VR::DS, &ds_all(&position));
        put(tags::IMAGE_ORIENTATION_PATIENT, VR::DS, &ds_all(&[row_cosines, column_cosines].concat()));
        put(tags::FRAME_OF_REFERENCE_UID, VR::UI, &self.frame_uid);
        put(tags::POSITION_REFERENCE_INDICATOR, VR::LO, "");
        put(tags::SLICE_LOCATION, VR::DS, &ds(location));
        if o.declare_count {
            put(tags::NUMBER_OF_SERIES_RELATED_INSTANCES, VR::IS, &spec.slices.to_string());
        }
        put(tags::PHOTOMETRIC_INTERPRETATION, VR::CS, "MONOCHROME2");
        put(tags::PIXEL_SPACING, VR::DS, &ds_all(&[pitch, pitch]));
        put(tags::WINDOW_CENTER, VR::DS, "-600\\40");
        put(tags::WINDOW_WIDTH, VR::DS, "1500\\400");
        put(tags::RESCALE_INTERCEPT, VR::DS, &INTERCEPT.to_string());
        put(tags::RESCALE_SLOPE, VR::DS, "1");
        put(tags::RESCALE_TYPE, VR::LO, "HU");
        let mut number = |tag: Tag, value: u16| {
            object.put(DataElement::new(tag, VR::US, PrimitiveValue::from(value)));
        };
        number(tags::SAMPLES_PER_PIXEL, 1);
        number(tags::ROWS, spec.rows as u16);
        number(tags::COLUMNS, spec.columns as u16);
        number(tags::BITS_ALLOCATED, 16);
        number(tags::BITS_STORED, o.bits_stored);
        number(tags::HIGH_BIT, o.bits_stored - 1);
        number(tags::PIXEL_REPRESENTATION, u16::from(o.signed));
        if o.circle_padding {
            let element = if o.signed {
                DataElement::new(tags::PIXEL_PADDING_VALUE, VR::SS, PrimitiveValue::from(PADDING_SIGNED as i16))
            } else {
                DataElement::new(tags::PIXEL_PADDING_VALUE, VR::US, PrimitiveValue::from(0u16))
            };
            object.put(element);
        }
        let pixels = self.stored(hu, flip_rows, flip_columns);
        object.put(DataElement::new(tags::PIXEL_DATA, VR::OW, PrimitiveValue::U16(pixels.into())));

        let meta = FileMetaTableBuilder::new()
            .media_storage_sop_class_uid(uids::CT_IMAGE_STORAGE)
            .media_storage_sop_instance_uid(sop_uid)
            .transfer_syntax(uids::EXPLICIT_VR_LITTLE_ENDIAN);
        let object = object.with_meta(meta).map_err(|e| PhantomError::Encode(e.to_string()))?;
        let mut bytes = Vec::with_capacity(2 * hu.len() + 4096);
        object.write_all(&mut bytes).map_err(|e| PhantomError::Encode(e.to_string()))?;
        Ok(bytes)
    }

    /// Stored values, as the bits of 16-bit words.
    fn stored(&self, hu: &[i16], flip_rows: bool, flip_columns: bool) -> Vec<u16> {
        let o = self.options;
        let PhantomSpec { rows, columns, .. } = self.phantom.spec;
        let (low, high) = if o.signed { (-32_768, 32_767) } else { (0, (1i32 << o.bits_stored) - 1) };
        let low = if o.circle_padding { if o.signed { PADDING_SIGNED + 1 } else { 1 } } else { low };
        let padding = if o.signed { PADDING_SIGNED } else { 0 };
        let (cy, cx) = ((rows as f64 - 1.0) * 0.5, (columns as f64 - 1.0) * 0.5);
        let radius = 0.5 * rows.min(columns) as f64;
        let mut out = Vec::with_capacity(hu.len());
        for r in 0..rows {
            let source = if flip_rows { rows - 1 - r } else { r };
            for c in 0..columns {
                let from = if flip_columns { columns - 1 - c } else { c };
                let (dy, dx) = (r as f64 - cy, c as f64 - cx);
                let value = if o.circle_padding && dy * dy + dx * dx > radius * radius {
                    padding
                } else {
                    (i32::from(hu[source * columns + from]) - INTERCEPT).clamp(low, high)
                };
                out.push(value as u16);
            }
        }
        out
    }
}

/// Slice `index` (feet first) as a Part 10 file. When the options ask for a tilt or a prone patient that the phantom was
/// not generated with, the slice is rendered anew; for more than a few slices use [`DicomSeries`] or [`write_dicom`].
pub fn dicom_slice(phantom: &Phantom, index: usize, options: &DicomOptions) -> Result<Vec<u8>, PhantomError> {
    DicomSeries::new(phantom, options)?.slice(index)
}

/// Writes a series as `NNNN.dcm`, numbered by InstanceNumber; returns the files in that order.
pub fn write_dicom(phantom: &Phantom, dir: &Path, options: &DicomOptions) -> Result<Vec<PathBuf>, PhantomError> {
    let series = DicomSeries::new(phantom, options)?;
    let dir = create_dir(dir)?;
    (0..series.len())
        .into_par_iter()
        .map_init(
            || series.scene.as_ref().map(Scene::scratch),
            |scratch, turn| {
                let index = series.turn(turn);
                let bytes = match (&series.scene, scratch) {
                    (Some(scene), Some(scratch)) => series.render(index, scene, scratch)?,
                    _ => series.encode(index, phantom.slice(index))?,
                };
                let path = dir.join(format!("{:04}.dcm", turn + 1));
                std::fs::write(&path, bytes).map_err(PhantomError::write("DICOM file"))?;
                Ok(path)
            },
        )
        .collect()
}
