//! Populations to train and to test on: patients, disease and scanners drawn from stated ranges.
//!
//! Input: a class, a seed and which [`Ranges`]. Output: a [`Subject`], which [`Subject::generate`] renders. The test
//! ranges contain the training ranges and go beyond them in every respect, so that a score on them says something about
//! patients and scanners that training has not seen:
//!
//! | drawn | train | test |
//! |---|---|---|
//! | spread of body measures, times the usual | 1.25 | 1.7 |
//! | aeration of the lung, HU | -25 to 25 | -30 to 80 |
//! | severity | 0.1 to 1 | 0.04 to 1 |
//! | lesions that are left of the pattern | 50 to 100 % | 20 to 100 % |
//! | size of lesions | 0.75 to 1.3 | 0.55 to 1.6 |
//! | density of ground-glass | 0.75 to 1.25 | 0.5 to 1.5 |
//! | raggedness added | -0.05 to 0.15 | -0.1 to 0.35 |
//! | COVID-19 on one side only | 8 % | 25 % |
//! | COVID-19 with effusion or a solid lobe, pneumonia of ground-glass alone | 12 % | 30 % |
//! | findings that are no pneumonia (dependent density, bands, nodules) | 0 to 2 | 0 to 4 |
//! | slice spacing, mm | 1 to 5 | 0.75 to 7.5 |
//! | thickness, times the spacing | 1 or 1.25 | 0.6 to 1.5 |
//! | noise, times the usual of kernel and thickness | 0.5 to 1.8 | 0.3 to 3.5 |
//! | field beyond the body, mm | 5 to 60 | -20 to 120 |
//! | extent beyond the lungs, mm | 40 to 90 | 20 to 140 |
//! | tilted gantry | 10 %, 2 to 8 degrees | 25 %, 2 to 20 degrees |
//! | prone | 6 % | 20 % |
//! | CT number, HU | -12 to 12, 0.985 to 1.015 | -35 to 35, 0.95 to 1.05 |
//!
//! All kernels and stages are in both. Atypical and mild cases of the classes look alike: no classifier gets all right.
//!
//! Deliberately absent: other diseases, children, contrast medium, motion.

use serde::{Deserialize, Serialize};

use super::anatomy::Anatomy;
use super::math::{Draw, hash_all};
use super::{
    Acquisition, Kernel, MAX_SIDE, MAX_SLICES, Phantom, PhantomClass, PhantomError, PhantomSpec, Stage, text_enum,
};

text_enum! {
    /// Which ranges a population is drawn from.
    Ranges, "ranges" {
        /// What a model is trained on.
        Train => "train",
        /// Wider in every respect.
        Test => "test",
    }
}

/// How a patient and a scan depart from the usual. The default departs in nothing: it gives the same bits as
/// [`super::generate`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variation {
    /// Factor on the deviations of body measures.
    pub anatomy_spread: f64,
    /// Added to the parenchyma, HU: below 0 more air, above 0 less.
    pub lung_hu: f64,
    /// Share of the lesions that are left, at least one.
    pub lesion_share: f64,
    /// Factor on the size of lesions.
    pub lesion_size: f64,
    /// Factor on the density of ground-glass.
    pub lesion_density: f64,
    /// Added to the share of texture in the edges of patches.
    pub ragged: f64,
    /// The lesions of one lung only, where both have some.
    pub one_sided: bool,
    /// Features of the other disease.
    pub atypical: bool,
    /// Findings that are no pneumonia.
    pub findings: u32,
    /// Added to every CT number, HU.
    pub ct_offset_hu: f64,
    /// Factor on CT numbers, about air.
    pub ct_gain: f64,
}

impl Default for Variation {
    fn default() -> Self {
        Self {
            anatomy_spread: 1.0,
            lung_hu: 0.0,
            lesion_share: 1.0,
            lesion_size: 1.0,
            lesion_density: 1.0,
            ragged: 0.0,
            one_sided: false,
            atypical: false,
            findings: 0,
            ct_offset_hu: 0.0,
            ct_gain: 1.0,
        }
    }
}

/// One patient of a population and how he is scanned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    /// Disease, seed, grid, kernel, noise.
    pub spec: PhantomSpec,
    /// Pose and gantry.
    pub acquisition: Acquisition,
    /// What is unusual.
    pub variation: Variation,
}

impl Subject {
    /// The subject of `seed`; slices have `side` rows and columns. A coarser matrix than a scanner's 512 costs less and
    /// changes little of what a small network input shows.
    ///
    /// # Errors
    /// A side below 64 or beyond [`MAX_SIDE`].
    pub fn random(class: PhantomClass, seed: u64, ranges: Ranges, side: usize) -> Result<Self, PhantomError> {
        if !(64..=MAX_SIDE).contains(&side) {
            return Err(PhantomError::Option { option: "side", expected: "64 to 1024", got: side.to_string() });
        }
        let wide = ranges == Ranges::Test;
        let mut d = Draw::new(seed, 70);
        // Both ranges take the same number of draws, in one order.
        let between = |d: &mut Draw, train: (f64, f64), test: (f64, f64)| {
            let (low, high) = if wide { test } else { train };
            d.range(low, high)
        };
        let chance = |d: &mut Draw, train: f64, test: f64| d.chance(if wide { test } else { train });
        let anatomy_spread = if wide { 1.7 } else { 1.25 };
        let lung_hu = between(&mut d, (-25.0, 25.0), (-30.0, 80.0));
        let an = Anatomy::varied(seed, anatomy_spread, lung_hu);

        let kernel = Kernel::ALL[d.below(Kernel::ALL.len())];
        let spacings: [f64; 8] =
            if wide { [0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 6.0, 7.5] } else { [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0] };
        let spacing_mm = spacings[d.below(spacings.len())];
        let overlaps: [f64; 4] = if wide { [0.6, 1.0, 1.25, 1.5] } else { [1.0, 1.0, 1.0, 1.25] };
        let thickness_mm = spacing_mm * overlaps[d.below(overlaps.len())];
        let extent = an.height + between(&mut d, (40.0, 90.0), (20.0, 140.0));
        let outline = 2.0 * (1.12 * an.half_width + 13.0 + 8.0 * an.bulk + 0.85 * an.fat);
        let field = (outline + between(&mut d, (5.0, 60.0), (-20.0, 120.0))).clamp(260.0, 520.0);
        let stage = Stage::ALL[d.below(Stage::ALL.len())];
        let severity = between(&mut d, (0.1, 1.0), (0.04, 1.0));
        let mut spec = PhantomSpec {
            class,
            seed,
            slices: ((extent / spacing_mm) as usize + 1).clamp(1, MAX_SLICES),
            rows: side,
            columns: side,
            spacing_mm,
            thickness_mm,
            pixel_spacing_mm: field / side as f64,
            kernel,
            noise_hu: 0.0,
            stage,
            severity,
        };
        // A coarser pixel is the mean of more of a detector's samples.
        let coarse = (0.75 / spec.pixel_spacing_mm).clamp(0.35, 1.0);
        spec.noise_hu = spec.usual_noise() * coarse * between(&mut d, (0.5, 1.8), (0.3, 3.5));

        let tilted = chance(&mut d, 0.10, 0.25);
        let angle = between(&mut d, (2.0, 8.0), (2.0, 20.0)) * if d.chance(0.5) { 1.0 } else { -1.0 };
        let prone = chance(&mut d, 0.06, 0.20);
        let acquisition = Acquisition { tilt_deg: if tilted { angle } else { 0.0 }, prone };

        let lesion_share = between(&mut d, (0.5, 1.0), (0.2, 1.0));
        let lesion_size = between(&mut d, (0.75, 1.3), (0.55, 1.6));
        let lesion_density = between(&mut d, (0.75, 1.25), (0.5, 1.5));
        let ragged = between(&mut d, (-0.05, 0.15), (-0.1, 0.35));
        let one_sided = chance(&mut d, 0.08, 0.25) && class == PhantomClass::Covid;
        let atypical = chance(&mut d, 0.12, 0.30) && class != PhantomClass::Healthy;
        let findings = d.below(if wide { 5 } else { 3 }) as u32;
        let ct_offset_hu = between(&mut d, (-12.0, 12.0), (-35.0, 35.0));
        let ct_gain = between(&mut d, (0.985, 1.015), (0.95, 1.05));
        let variation = Variation {
            anatomy_spread,
            lung_hu,
            lesion_share,
            lesion_size,
            lesion_density,
            ragged,
            one_sided,
            atypical,
            findings,
            ct_offset_hu,
            ct_gain,
        };
        Ok(Self { spec, acquisition, variation })
    }

    /// Subject `index` of the population with this seed. The populations of the two ranges share no subject.
    ///
    /// # Errors
    /// As [`Subject::random`].
    pub fn numbered(
        class: PhantomClass,
        index: usize,
        population_seed: u64,
        ranges: Ranges,
        side: usize,
    ) -> Result<Self, PhantomError> {
        Self::random(class, hash_all(&[population_seed, ranges as u64, index as u64]), ranges, side)
    }

    /// Renders the subject; the same bits on every machine.
    ///
    /// # Panics
    /// As [`super::generate_acquired`].
    pub fn generate(&self) -> Phantom {
        let mut phantom = super::generate_varied(&self.spec, &self.acquisition, &self.variation);
        let v = &self.variation;
        if v.ct_gain != 1.0 || v.ct_offset_hu != 0.0 {
            let (gain, offset) = (v.ct_gain as f32, v.ct_offset_hu as f32);
            for hu in &mut phantom.hu {
                let moved = (f32::from(*hu) + 1000.0) * gain - 1000.0 + offset;
                // Rounding to nearest by truncation of a positive number.
                *hu = ((moved + 2048.5).clamp(1024.0, 5119.0) as i32 - 2048) as i16;
            }
        }
        phantom
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phantom::{LABEL_NONE, generate_acquired};

    fn small(subject: &Subject) -> Subject {
        Subject { spec: subject.spec.clone().with_shape(28, 72, 72), ..subject.clone() }
    }

    #[test]
    fn nothing_unusual_gives_the_bits_of_before() {
        for class in PhantomClass::ALL {
            let spec = PhantomSpec::random(*class, 5).with_shape(16, 64, 64);
            let acquisition = Acquisition { tilt_deg: 4.0, prone: true };
            let subject = Subject { spec: spec.clone(), acquisition, variation: Variation::default() };
            assert_eq!(subject.generate(), generate_acquired(&spec, &acquisition));
        }
    }

    #[test]
    fn subjects_are_what_their_seed_says_and_lie_in_their_ranges() {
        for ranges in [Ranges::Train, Ranges::Test] {
            let subjects: Vec<Subject> =
                (0..400).map(|s| Subject::random(PhantomClass::ALL[s % 3], s as u64, ranges, 128).unwrap()).collect();
            assert_eq!(subjects[7], Subject::random(PhantomClass::ALL[1], 7, ranges, 128).unwrap());
            let span = |f: &dyn Fn(&Subject) -> f64| {
                subjects.iter().map(f).fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)))
            };
            let wide = ranges == Ranges::Test;
            let (low, high) = span(&|s| s.spec.spacing_mm);
            assert_eq!((low, high), if wide { (0.75, 7.5) } else { (1.0, 5.0) });
            let (low, high) = span(&|s| s.variation.ct_offset_hu);
            assert_eq!(low < -12.0 && high > 12.0, wide);
            let (_, high) = span(&|s| s.acquisition.tilt_deg.abs());
            assert!(if wide { high > 8.0 && high <= 20.0 } else { high > 2.0 && high <= 8.0 }, "{high}");
            assert!(subjects.iter().all(|s| (20..720).contains(&s.spec.slices) && s.spec.noise_hu > 0.3));
        }
        assert!(Subject::random(PhantomClass::Cp, 1, Ranges::Train, 32).is_err());
    }

    #[test]
    fn the_sick_have_lesions_in_both_ranges_and_the_bodies_hold_together() {
        for ranges in [Ranges::Train, Ranges::Test] {
            for seed in 0..4 {
                for class in PhantomClass::ALL {
                    let phantom = small(&Subject::random(*class, 100 + seed, ranges, 128).unwrap()).generate();
                    let lung = phantom.lung.iter().filter(|l| **l > 0).count() as f64;
                    let voxel = phantom.spec.spacing_mm * phantom.spec.pixel_spacing_mm.powi(2);
                    let litres = lung * voxel / 1e6;
                    assert!((0.8..9.0).contains(&litres), "{class} {seed} {ranges}: {litres} l");
                    let lesion = phantom.lesion.iter().filter(|l| **l != LABEL_NONE).count();
                    assert!(*class == PhantomClass::Healthy || lesion > 0, "{class} {seed} {ranges}");
                }
            }
        }
    }
}
