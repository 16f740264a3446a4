//! Augmentation on the device: flip, rotation, translation and zoom, in the plane, the same for all planes of a volume.
//!
//! Input: a batch `N x D x H x W` and one [`Pose`] a volume. Output: the batch seen in these poses, bilinear, air (0)
//! from outside the field. One kernel for the whole batch: depth goes where images have their colours.
//!
//! A pose depends on the seed, the epoch and the scan alone, not on the batch or on what was drawn before.
//!
//! Deliberately absent: anything along depth. Slices are thick, and the depth attention learns positions.

use tch::{Device, Kind, Tensor};

use super::TrainError;
use crate::model::synthetic::Stream;

/// Whose habits are followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Recipe {
    /// The identity is possible, validation is clean.
    #[default]
    Corrected,
    /// The reference implementation's: a flip is always applied, validation is augmented too.
    AsReleased,
}

/// What to draw from.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct AugmentOptions {
    /// Whether to augment at all.
    pub enabled: bool,
    /// Which flips.
    pub recipe: Recipe,
    /// Rotation is uniform within this, both ways.
    pub rotation_deg: f64,
    /// Translation is uniform within this, both ways and axes, in pixels of a 224-pixel side; smaller inputs in
    /// proportion.
    pub translation_px: f64,
    /// Zoom is uniform from its inverse side to this.
    pub zoom: [f64; 2],
}

/// The side that translations are stated for, pixels.
pub const TRANSLATION_SIDE_PX: f64 = 224.0;

impl Default for AugmentOptions {
    fn default() -> Self {
        Self { enabled: true, recipe: Recipe::Corrected, rotation_deg: 5.0, translation_px: 5.0, zoom: [0.9, 1.1] }
    }
}

impl AugmentOptions {
    /// Checks every range.
    ///
    /// # Errors
    /// The first value out of range.
    pub fn validate(&self) -> Result<(), TrainError> {
        let check = |ok: bool, option, expected: &str, got: String| {
            if ok { Ok(()) } else { Err(TrainError::Option { option, expected: expected.to_owned(), got }) }
        };
        check((0.0..=180.0).contains(&self.rotation_deg), "rotation", "0 to 180", self.rotation_deg.to_string())?;
        check(
            (0.0..=112.0).contains(&self.translation_px),
            "translation",
            "0 to 112",
            self.translation_px.to_string(),
        )?;
        let [low, high] = self.zoom;
        check(0.1 <= low && low <= high && high <= 10.0, "zoom", "0.1 to 10, ordered", format!("{low} to {high}"))
    }

    /// The pose of scan `index` in `epoch`.
    pub fn pose(&self, seed: u64, epoch: usize, index: usize) -> Pose {
        if !self.enabled {
            return Pose::IDENTITY;
        }
        let stream = Stream::new(seed, &format!("augment {epoch} {index}"));
        let within = |i: u64, low: f64, high: f64| low + (high - low) * stream.uniform(i);
        let (flip_columns, flip_rows) = match self.recipe {
            // Each with even odds: one in four is not flipped at all.
            Recipe::Corrected => (stream.uniform(0) < 0.5, stream.uniform(1) < 0.5),
            Recipe::AsReleased => {
                let columns = stream.uniform(0) < 0.5;
                (columns, !columns)
            }
        };
        let shift = self.translation_px / TRANSLATION_SIDE_PX;
        Pose {
            flip_columns,
            flip_rows,
            rotation_deg: within(2, -self.rotation_deg, self.rotation_deg),
            shift_rows: within(3, -shift, shift),
            shift_columns: within(4, -shift, shift),
            zoom: within(5, self.zoom[0], self.zoom[1]),
        }
    }
}

/// How one volume is shown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pose {
    /// Left and right change places.
    pub flip_columns: bool,
    /// Front and back change places.
    pub flip_rows: bool,
    /// Counter-clockwise as seen.
    pub rotation_deg: f64,
    /// Share of the side that the image moves down.
    pub shift_rows: f64,
    /// Share of the side that the image moves to the right.
    pub shift_columns: f64,
    /// Above 1 enlarges.
    pub zoom: f64,
}

impl Pose {
    /// As it is.
    pub const IDENTITY: Self = Self {
        flip_columns: false,
        flip_rows: false,
        rotation_deg: 0.0,
        shift_rows: 0.0,
        shift_columns: 0.0,
        zoom: 1.0,
    };

    /// The matrix from output to input coordinates, both in [-1, 1], rows `(x, y)`, for an image of `height x width`.
    fn theta(&self, height: f64, width: f64) -> [f32; 6] {
        let (sin, cos) = self.rotation_deg.to_radians().sin_cos();
        // In pixels: input = R (output - shift) / zoom, then the flips; [-1, 1] stretches the longer side.
        let aspect = height / width;
        let (fx, fy) = (if self.flip_columns { -1.0 } else { 1.0 }, if self.flip_rows { -1.0 } else { 1.0 });
        let (a, b) = (cos / self.zoom, -sin / self.zoom * aspect);
        let (c, d) = (sin / self.zoom / aspect, cos / self.zoom);
        // A share of the side is twice that in [-1, 1].
        let (tx, ty) = (-2.0 * self.shift_columns, -2.0 * self.shift_rows);
        let row = |f: f64, p: f64, q: f64| [f * p, f * q, f * (p * tx + q * ty)].map(|v| v as f32);
        let ([m0, m1, m2], [m3, m4, m5]) = (row(fx, a, b), row(fy, c, d));
        [m0, m1, m2, m3, m4, m5]
    }
}

/// The batch `x`, `N x D x H x W`, f32, seen in `poses`, on the device of `x`.
///
/// # Errors
/// Another number of poses than volumes, or no room on the device.
pub fn apply(x: &Tensor, poses: &[Pose]) -> Result<Tensor, TrainError> {
    let (n, d, h, w) = x.size4()?;
    if usize::try_from(n).ok() != Some(poses.len()) {
        return Err(TrainError::Data(format!("{n} volumes and {} poses", poses.len())));
    }
    if poses.iter().all(|pose| *pose == Pose::IDENTITY) {
        return Ok(x.shallow_clone());
    }
    let theta: Vec<f32> = poses.iter().flat_map(|pose| pose.theta(h as f64, w as f64)).collect();
    let theta = Tensor::f_from_slice(&theta)?.f_view([n, 2, 3])?.f_to_device_(x.device(), Kind::Float, true, false)?;
    const BILINEAR: i64 = 0;
    const ZEROS: i64 = 0;
    let grid = Tensor::f_affine_grid_generator(&theta, [n, d, h, w], false)?;
    Ok(x.f_grid_sampler_2d(&grid, BILINEAR, ZEROS, false)?)
}

/// `values`, half precision `N x D x H x W`, as f32 on `device`.
///
/// # Errors
/// No room on the device.
pub fn upload(values: &Tensor, device: Device) -> Result<Tensor, TrainError> {
    Ok(values.f_to_device_(device, values.kind(), true, false)?.f_to_kind(Kind::Float)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1 x 1 x 4 x 6, all different.
    fn image() -> Tensor {
        Tensor::from_slice(&(0..24).map(|v| v as f32).collect::<Vec<_>>()).view([1, 1, 4, 6])
    }

    fn seen(pose: Pose) -> Vec<f32> {
        Vec::<f32>::try_from(apply(&image(), &[pose]).unwrap().contiguous().view(-1)).unwrap()
    }

    fn assert_near(a: &[f32], b: &Tensor) {
        let b = Vec::<f32>::try_from(b.contiguous().view(-1)).unwrap();
        assert!(a.iter().zip(&b).all(|(x, y)| (x - y).abs() < 1e-3), "{a:?}\n{b:?}");
    }

    #[test]
    fn flips_mirror_exactly() {
        assert_near(&seen(Pose { flip_columns: true, ..Pose::IDENTITY }), &image().flip([3]));
        assert_near(&seen(Pose { flip_rows: true, ..Pose::IDENTITY }), &image().flip([2]));
        let both = Pose { flip_rows: true, flip_columns: true, ..Pose::IDENTITY };
        assert_near(&seen(both), &image().flip([2, 3]));
    }

    #[test]
    fn a_shift_moves_by_whole_pixels_and_lets_air_in() {
        // One of six columns to the right, one of four rows down.
        let pose = Pose { shift_columns: 1.0 / 6.0, shift_rows: 0.25, ..Pose::IDENTITY };
        let moved = image().constant_pad_nd([1, -1, 1, -1]);
        assert_near(&seen(pose), &moved);
    }

    #[test]
    fn a_half_turn_is_both_flips_and_a_quarter_turn_is_counter_clockwise() {
        assert_near(&seen(Pose { rotation_deg: 180.0, ..Pose::IDENTITY }), &image().flip([2, 3]));
        let square = image().narrow(3, 0, 4);
        let pose = Pose { rotation_deg: 90.0, ..Pose::IDENTITY };
        let turned = apply(&square, &[pose]).unwrap();
        let turned = Vec::<f32>::try_from(turned.contiguous().view(-1)).unwrap();
        assert_near(&turned, &square.rot90(1, [2, 3]));
    }

    #[test]
    fn zoom_enlarges() {
        let blob = Tensor::zeros([1, 1, 33, 33], (Kind::Float, Device::Cpu));
        let _ = blob.narrow(2, 12, 9).narrow(3, 12, 9).fill_(1.0);
        let area = |zoom| apply(&blob, &[Pose { zoom, ..Pose::IDENTITY }]).unwrap().sum(Kind::Float).double_value(&[]);
        assert!((area(2.0) / 81.0 - 4.0).abs() < 0.2, "{}", area(2.0));
        assert!((area(0.5) / 81.0 - 0.25).abs() < 0.1, "{}", area(0.5));
    }

    #[test]
    fn poses_are_drawn_from_their_ranges_and_depend_on_seed_epoch_and_scan_alone() {
        let options = AugmentOptions::default();
        let poses: Vec<Pose> = (0..4000).map(|i| options.pose(1, 3, i)).collect();
        let share = |f: fn(&Pose) -> bool| poses.iter().filter(|p| f(p)).count() as f64 / 4000.0;
        assert!((share(|p| p.flip_columns) - 0.5).abs() < 0.05);
        assert!((share(|p| !p.flip_columns && !p.flip_rows) - 0.25).abs() < 0.05);
        assert!(poses.iter().all(|p| p.rotation_deg.abs() <= 5.0 && (0.9..=1.1).contains(&p.zoom)));
        assert!(poses.iter().all(|p| p.shift_rows.abs() <= 5.0 / 224.0));
        assert_eq!(options.pose(1, 3, 7), poses[7]);
        assert_ne!(options.pose(1, 4, 7), poses[7]);
        let released = AugmentOptions { recipe: Recipe::AsReleased, ..AugmentOptions::default() };
        assert!((0..500).map(|i| released.pose(1, 0, i)).all(|p| p.flip_columns != p.flip_rows));
        let off = AugmentOptions { enabled: false, ..AugmentOptions::default() };
        assert_eq!(off.pose(1, 0, 0), Pose::IDENTITY);
    }
}
