//! Synthetic chest CT: a random patient in HU, with lesion masks, as arrays, DICOM series, NIfTI or PNG.
//!
//! Role: test data without patients. It feeds the demo, the acceptance check, the tests and the benches, and can
//! pre-train a network. It is drawn from formulas and random numbers; no image of a person went into it.
//!
//! Input: a [`PhantomSpec`]. Output: a [`Phantom`]: HU, lesion labels and lung labels, DHW order, feet to head, rows to
//! posterior, columns to the patient's left.
//!
//! Invariants
//! - The same spec gives the same bits, whatever the number of threads, and on every machine with IEEE 754 arithmetic:
//!   only exactly rounded operations are used (no call into the platform's maths library).
//! - Anatomy, pose and lesions depend on `class`, `seed`, `stage` and `severity` alone: two specs that differ in
//!   spacing or kernel show the same patient (see [`series_variants`]).
//! - Ground-glass and consolidation lie in the lung mask; effusion lies in the pleural space, outside it.
//!
//! Deliberately absent: physics of the beam (no projections, no beam hardening, no metal, no motion, no contrast
//! medium), children, and every disease but the two patterns. The patterns follow their textbook description
//! (COVID-19: bilateral, peripheral, lower-lobe-weighted, multifocal ground-glass, crazy paving, later consolidation;
//! common pneumonia: lobar or patchy consolidation with air bronchograms, effusion). A model's score on them says that
//! the program works, nothing about patients.

mod anatomy;
mod dicom;
mod files;
mod lesions;
mod math;
mod noise;
mod population;
mod raster;
mod scene;
mod skeleton;
mod tree;

pub use dicom::{DicomOptions, DicomSeries, PatientPosition, dicom_slice, write_dicom};
pub use files::{
    Case, CaseProgress, Format, PNG_WINDOW_CENTER_HU, PNG_WINDOW_WIDTH_HU, WriteRequest, affine_ras, write_cases,
    write_nifti, write_nifti_mask, write_png, write_png_mask,
};

pub use population::{Ranges, Subject, Variation};

use crate::volume::geometry::SliceGeometry;
use math::Draw;
use rayon::prelude::*;
use scene::Scene;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Lesion label: none.
pub const LABEL_NONE: u8 = 0;
/// Lesion label: ground-glass.
pub const LABEL_GROUND_GLASS: u8 = 1;
/// Lesion label: consolidation.
pub const LABEL_CONSOLIDATION: u8 = 2;
/// Lesion label: pleural effusion.
pub const LABEL_EFFUSION: u8 = 3;
/// Lung label: right lung. The left is 2, everything else 0.
pub const LUNG_RIGHT: u8 = 1;
/// Lung label: left lung.
pub const LUNG_LEFT: u8 = 2;

/// Most slices, rows and columns of a spec: 4096 slices of 1024 x 1024 are 8 GiB of HU, more than anyone wants.
pub const MAX_SLICES: usize = 4096;
/// Most rows and columns.
pub const MAX_SIDE: usize = 1024;

/// What went wrong while writing a phantom.
#[derive(Debug, thiserror::Error)]
pub enum PhantomError {
    /// A file or folder could not be written.
    #[error("write phantom {what}: {source}")]
    Write {
        /// What was being written, without its path.
        what: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The DICOM object could not be encoded.
    #[error("encode phantom slice: {0}")]
    Encode(String),
    /// An option is out of range.
    #[error("phantom option {option}: expected {expected}, got {got}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What was given.
        got: String,
    },
}

impl PhantomError {
    fn write(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Write { what, source }
    }
}

macro_rules! text_enum {
    ($(#[$doc:meta])* $name:ident, $what:literal { $($(#[$vdoc:meta])* $variant:ident => $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// Every value, in the order of declaration.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The text form, as on the command line and in JSON.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = PhantomError;

            fn from_str(text: &str) -> Result<Self, PhantomError> {
                match text {
                    $($text => Ok($name::$variant),)+
                    other => Err(PhantomError::Option {
                        option: $what,
                        expected: concat!($($text, " "),+),
                        got: other.chars().take(40).collect(),
                    }),
                }
            }
        }
    };
}
use text_enum;

text_enum! {
    /// What the patient has.
    PhantomClass, "class" {
        /// COVID-19 pattern.
        Covid => "covid",
        /// Common pneumonia pattern.
        Cp => "cp",
        /// No lesion.
        Healthy => "healthy",
    }
}

impl PhantomClass {
    /// The key of the network's class: `covid19`, `cp` or `healthy`.
    pub fn class_key(self) -> &'static str {
        match self {
            PhantomClass::Covid => "covid19",
            PhantomClass::Cp => "cp",
            PhantomClass::Healthy => "healthy",
        }
    }
}

text_enum! {
    /// Reconstruction kernel: edge width and noise spectrum.
    Kernel, "kernel" {
        /// Soft tissue.
        Soft => "soft",
        /// In between.
        Medium => "medium",
        /// Lung and bone.
        Sharp => "sharp",
    }
}

text_enum! {
    /// Stage of the COVID-19 pattern.
    Stage, "stage" {
        /// Few patches of ground-glass.
        Early => "early",
        /// Many patches, crazy paving.
        Progressive => "progressive",
        /// Ground-glass with much consolidation.
        Peak => "peak",
        /// Fading ground-glass, bands.
        Absorption => "absorption",
    }
}

/// What to generate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PhantomSpec {
    /// Disease.
    pub class: PhantomClass,
    /// Patient: anatomy, pose, lesions, noise.
    pub seed: u64,
    /// Slices.
    pub slices: usize,
    /// Rows of a slice.
    pub rows: usize,
    /// Columns of a slice.
    pub columns: usize,
    /// Distance between slices.
    pub spacing_mm: f64,
    /// Nominal slice thickness; may exceed the spacing (overlapping reconstruction).
    pub thickness_mm: f64,
    /// Distance between pixels, both axes.
    pub pixel_spacing_mm: f64,
    /// Reconstruction kernel.
    pub kernel: Kernel,
    /// Standard deviation of the noise in the middle of the body, about.
    pub noise_hu: f64,
    /// Stage; used by the COVID-19 class only.
    pub stage: Stage,
    /// Extent of the disease, 0 to 1.
    pub severity: f64,
}

impl PhantomSpec {
    /// A random patient with the acquisition of an ordinary scanner: 512 x 512 pixels of 0.6 to 0.9 mm, slices every
    /// 0.6 to 5 mm over the whole lungs, a random kernel and the noise that goes with it.
    pub fn random(class: PhantomClass, seed: u64) -> Self {
        let an = anatomy::Anatomy::new(seed);
        let mut d = Draw::new(seed, 2);
        let kernel = [Kernel::Soft, Kernel::Medium, Kernel::Medium, Kernel::Sharp][d.below(4)];
        let spacings = [0.6, 0.7, 0.8, 1.0, 1.0, 1.25, 1.25, 1.5, 2.0, 2.5, 3.0, 5.0, 5.0];
        let spacing_mm: f64 = spacings[d.below(spacings.len())];
        let thickness_mm = if d.chance(0.25) && spacing_mm < 3.0 { spacing_mm * 1.25 } else { spacing_mm };
        let extent = an.height + 62.0;
        let outline = 2.0 * (1.12 * an.half_width + 13.0 + 8.0 * an.bulk + 0.85 * an.fat);
        let pixel_spacing_mm = ((outline + d.range(5.0, 35.0)) / 512.0).clamp(0.6, 0.9);
        let stages = [Stage::Early, Stage::Progressive, Stage::Progressive, Stage::Peak, Stage::Absorption];
        let stage = stages[d.below(stages.len())];
        let severity = d.range(0.1, 1.0);
        let mut spec = Self {
            class,
            seed,
            slices: (extent / spacing_mm) as usize + 1,
            rows: 512,
            columns: 512,
            spacing_mm,
            thickness_mm,
            pixel_spacing_mm,
            kernel,
            noise_hu: 0.0,
            stage,
            severity,
        };
        spec.noise_hu = spec.usual_noise() * d.range(0.75, 1.35);
        spec
    }

    /// The same patient on another grid: the extent in millimetres stays, spacings adapt.
    ///
    /// # Panics
    /// If a size is zero or beyond [`MAX_SLICES`] or [`MAX_SIDE`].
    pub fn with_shape(mut self, slices: usize, rows: usize, columns: usize) -> Self {
        check_shape(slices, rows, columns);
        let extent = self.spacing_mm * self.slices as f64;
        let field = self.pixel_spacing_mm * self.rows.max(self.columns) as f64;
        let overlap = self.thickness_mm / self.spacing_mm;
        self.spacing_mm = extent / slices as f64;
        self.thickness_mm = self.spacing_mm * overlap;
        self.pixel_spacing_mm = field / rows.min(columns) as f64;
        self.slices = slices;
        self.rows = rows;
        self.columns = columns;
        self
    }

    /// The same patient reconstructed with another kernel, with the noise usual for it.
    pub fn with_kernel(mut self, kernel: Kernel) -> Self {
        let dose = self.noise_hu / self.usual_noise();
        self.kernel = kernel;
        self.noise_hu = dose * self.usual_noise();
        self
    }

    /// The same patient cut into slices of another thickness over the same extent.
    pub fn with_spacing_mm(mut self, spacing_mm: f64) -> Self {
        let dose = self.noise_hu / self.usual_noise();
        let extent = self.spacing_mm * self.slices as f64;
        self.slices = ((extent / spacing_mm) as usize).clamp(1, MAX_SLICES);
        self.spacing_mm = spacing_mm;
        self.thickness_mm = spacing_mm;
        self.noise_hu = dose * self.usual_noise();
        self
    }

    /// Noise at an ordinary dose: it falls with the square root of the thickness and rises with sharpness.
    fn usual_noise(&self) -> f64 {
        let base = match self.kernel {
            Kernel::Soft => 13.0,
            Kernel::Medium => 21.0,
            Kernel::Sharp => 46.0,
        };
        base / (self.thickness_mm.clamp(0.5, 6.0) / 1.25).sqrt()
    }

    /// Voxels of the volume.
    pub fn voxels(&self) -> usize {
        self.slices * self.rows * self.columns
    }

    /// Voxels of one slice.
    pub fn slice_len(&self) -> usize {
        self.rows * self.columns
    }
}

fn check_shape(slices: usize, rows: usize, columns: usize) {
    assert!(
        (1..=MAX_SLICES).contains(&slices) && (1..=MAX_SIDE).contains(&rows) && (1..=MAX_SIDE).contains(&columns),
        "phantom shape: expected 1 to {MAX_SLICES} slices of 1 to {MAX_SIDE} rows and columns, got {slices} x {rows} x {columns}"
    );
}

/// The usual reconstructions of one scan of this patient: the spec as it is, thick and soft, thin and sharp. They share
/// the seed, hence patient, lesions and study.
pub fn series_variants(spec: &PhantomSpec) -> Vec<PhantomSpec> {
    vec![
        spec.clone(),
        spec.clone().with_kernel(Kernel::Soft).with_spacing_mm(5.0),
        spec.clone().with_kernel(Kernel::Sharp).with_spacing_mm(spec.spacing_mm.min(1.25)),
    ]
}

/// How the patient lies and how the gantry stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Acquisition {
    /// Gantry tilt: rows run down and, for positive angles, to the head. The table still moves along z, so that the
    /// stack is sheared.
    pub tilt_deg: f64,
    /// The patient lies face down: the table is in front, fluid and the denser lung too.
    pub prone: bool,
}

/// Steepest tilt that is generated.
pub const MAX_TILT_DEG: f64 = 30.0;

/// A synthetic chest CT. All arrays are D x H x W: feet to head, rows to posterior, columns to the patient's left.
#[derive(Clone, Debug, PartialEq)]
pub struct Phantom {
    /// What was asked for.
    pub spec: PhantomSpec,
    /// How it was acquired.
    pub acquisition: Acquisition,
    /// What is unusual.
    pub variation: Variation,
    /// CT numbers.
    pub hu: Vec<i16>,
    /// 0 none, 1 ground-glass, 2 consolidation, 3 effusion.
    pub lesion: Vec<u8>,
    /// 1 right lung, 2 left lung, lesions included, effusion not; 0 elsewhere.
    pub lung: Vec<u8>,
}

impl Phantom {
    /// HU of slice `index` (feet first), rows x columns.
    pub fn slice(&self, index: usize) -> &[i16] {
        let n = self.spec.slice_len();
        &self.hu[index * n..(index + 1) * n]
    }

    /// Lesion labels of slice `index`.
    pub fn lesion_slice(&self, index: usize) -> &[u8] {
        let n = self.spec.slice_len();
        &self.lesion[index * n..(index + 1) * n]
    }

    /// Lung labels of slice `index`.
    pub fn lung_slice(&self, index: usize) -> &[u8] {
        let n = self.spec.slice_len();
        &self.lung[index * n..(index + 1) * n]
    }

    /// Geometry of every slice, feet first.
    pub fn geometry(&self) -> Vec<SliceGeometry> {
        let frame = scene::Frame::new(&self.spec, &self.acquisition);
        let pitch = self.spec.pixel_spacing_mm;
        (0..self.spec.slices)
            .map(|index| SliceGeometry {
                rows: self.spec.rows as u32,
                columns: self.spec.columns as u32,
                pixel_spacing_mm: [pitch, pitch],
                position_mm: math::add(frame.origin, math::scale(frame.step, index as f64)),
                row_cosines: [1.0, 0.0, 0.0],
                column_cosines: frame.down,
            })
            .collect()
    }

    /// Patient position (LPS, millimetres) of the centre of pixel (0, 0) of slice `index`.
    pub fn position_mm(&self, index: usize) -> [f64; 3] {
        let frame = scene::Frame::new(&self.spec, &self.acquisition);
        math::add(frame.origin, math::scale(frame.step, index as f64))
    }
}

/// Generates a supine phantom without tilt.
///
/// # Panics
/// If the shape is out of bounds (see [`MAX_SLICES`], [`MAX_SIDE`]) or a spacing is not a positive number.
pub fn generate(spec: &PhantomSpec) -> Phantom {
    generate_acquired(spec, &Acquisition::default())
}

/// Generates a phantom, prone or with a tilted gantry.
///
/// # Panics
/// As [`generate`], and if the tilt is beyond [`MAX_TILT_DEG`].
pub fn generate_acquired(spec: &PhantomSpec, acquisition: &Acquisition) -> Phantom {
    generate_varied(spec, acquisition, &Variation::default())
}

/// As [`generate_acquired`], with an unusual patient. CT numbers are left as they are: see [`Subject::generate`].
fn generate_varied(spec: &PhantomSpec, acquisition: &Acquisition, variation: &Variation) -> Phantom {
    let scene = scene_of(spec, acquisition, variation);
    let n = spec.slice_len();
    let mut phantom = Phantom {
        spec: spec.clone(),
        acquisition: *acquisition,
        variation: *variation,
        hu: vec![0; spec.voxels()],
        lesion: vec![0; spec.voxels()],
        lung: vec![0; spec.voxels()],
    };
    phantom
        .hu
        .par_chunks_mut(n)
        .zip(phantom.lesion.par_chunks_mut(n))
        .zip(phantom.lung.par_chunks_mut(n))
        .enumerate()
        .for_each_init(
            || scene.scratch(),
            |scratch, (k, ((hu, lesion), lung))| scene.slice(k, scratch, hu, lesion, lung),
        );
    phantom
}

fn scene_of(spec: &PhantomSpec, acquisition: &Acquisition, variation: &Variation) -> Scene {
    check_shape(spec.slices, spec.rows, spec.columns);
    let positive = |v: f64| v.is_finite() && v > 0.0;
    assert!(
        positive(spec.spacing_mm) && positive(spec.thickness_mm) && positive(spec.pixel_spacing_mm),
        "phantom spacings must be positive"
    );
    assert!(acquisition.tilt_deg.abs() <= MAX_TILT_DEG, "phantom tilt must be within {MAX_TILT_DEG} degrees");
    Scene::new(spec, acquisition, variation)
}

/// What is known of the synthetic person, for headers.
struct Person {
    female: bool,
    age_years: u32,
    /// PatientName: says that there is no such person.
    name: String,
}

impl Person {
    fn of(spec: &PhantomSpec) -> Self {
        let an = anatomy::Anatomy::new(spec.seed);
        Self {
            female: an.female,
            age_years: an.age_years,
            name: format!("PHANTOM^{}^{:016X}", spec.class.as_str().to_uppercase(), spec.seed),
        }
    }
}

fn create_dir(path: &std::path::Path) -> Result<PathBuf, PhantomError> {
    std::fs::create_dir_all(path).map_err(PhantomError::write("folder"))?;
    Ok(path.to_path_buf())
}

#[cfg(test)]
mod tests;
