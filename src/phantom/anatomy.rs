//! One random patient: shape parameters and the smooth boundaries of the large organs as distance-like fields.
//!
//! Coordinates are the patient's own (before pose): millimetres, LPS, origin on the mid-plane at half lung height. A
//! field is negative inside, positive outside, and close to the distance in millimetres near its zero surface; far from
//! it only the sign is meant. `t` is the height in lungs: 0 at the deepest costophrenic recess, 1 at the apex.

use super::math::{Draw, Pose, V3, add, cross, dot, exp, lerp, norm, pow, scale, smin, smoothstep, sub, table, unit};
use super::noise::Tile3;
use std::sync::OnceLock;

/// A straight, tapering, round tube.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tube {
    pub(super) a: V3,
    pub(super) b: V3,
    pub(super) ra: f64,
    pub(super) rb: f64,
}

impl Tube {
    fn distance(&self, p: V3) -> f64 {
        let axis = sub(self.b, self.a);
        let q = sub(p, self.a);
        let s = (dot(q, axis) / dot(axis, axis).max(1e-9)).clamp(0.0, 1.0);
        norm(sub(q, scale(axis, s))) - lerp(self.ra, self.rb, s)
    }
}

/// Consecutive tubes through `(point, radius)`, each piece bent smoothly.
pub(super) fn polyline(points: &[(V3, f64)]) -> Vec<Tube> {
    const PIECES: usize = 5;
    let n = points.len();
    let at = |i: usize| points[i.min(n - 1)];
    let mut tubes = Vec::with_capacity(n * PIECES);
    for i in 0..n - 1 {
        let (p0, p1, p2, p3) = (at(i.saturating_sub(1)).0, at(i).0, at(i + 1).0, at(i + 2).0);
        let curve = |u: f64| {
            let mut out = [0.0; 3];
            for (a, o) in out.iter_mut().enumerate() {
                let (m1, m2) = ((p2[a] - p0[a]) * 0.5, (p3[a] - p1[a]) * 0.5);
                let (u2, u3) = (u * u, u * u * u);
                *o = (2.0 * u3 - 3.0 * u2 + 1.0) * p1[a]
                    + (u3 - 2.0 * u2 + u) * m1
                    + (3.0 * u2 - 2.0 * u3) * p2[a]
                    + (u3 - u2) * m2;
            }
            out
        };
        for k in 0..PIECES {
            let (u, v) = (k as f64 / PIECES as f64, (k + 1) as f64 / PIECES as f64);
            let (r0, r1) = (at(i).1, at(i + 1).1);
            tubes.push(Tube { a: curve(u), b: curve(v), ra: lerp(r0, r1, u), rb: lerp(r0, r1, v) });
        }
    }
    tubes
}

/// An ellipsoid with its own axes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ellipsoid {
    pub(super) centre: V3,
    pub(super) radii: V3,
    pub(super) axes: [V3; 3],
}

impl Ellipsoid {
    pub(super) fn upright(centre: V3, radii: V3) -> Self {
        Self { centre, radii, axes: [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]] }
    }

    /// First axis along `along`, the others across it.
    pub(super) fn along(centre: V3, along: V3, radii: V3) -> Self {
        let x = unit(along);
        let helper = if x[2].abs() < 0.9 { [0.0, 0.0, 1.0] } else { [1.0, 0.0, 0.0] };
        let y = unit(cross(helper, x));
        Self { centre, radii, axes: [x, y, cross(x, y)] }
    }

    /// 0 at the centre, 1 on the surface.
    pub(super) fn level(&self, p: V3) -> f64 {
        let q = sub(p, self.centre);
        norm([0, 1, 2].map(|i| dot(q, self.axes[i]) / self.radii[i]))
    }

    fn distance(&self, p: V3) -> f64 {
        let q = sub(p, self.centre);
        let u = [0, 1, 2].map(|i| dot(q, self.axes[i]) / self.radii[i]);
        let v = [0, 1, 2].map(|i| u[i] / self.radii[i]);
        let k0 = norm(u);
        let k1 = norm(v);
        if k1 < 1e-9 { -self.radii[0].min(self.radii[1]).min(self.radii[2]) } else { k0 * (k0 - 1.0) / k1 }
    }
}

/// Distance-like value of the rounded rectangle x² + y² - k x² y² = 1 (k = 0: ellipse; k = 1: rectangle).
fn squircle(x: f64, y: f64, a: f64, b: f64, k: f64) -> f64 {
    let (u, v) = (x / a, y / b);
    let (u2, v2) = (u * u, v * v);
    let (cu, cv) = (u2.min(1.1), v2.min(1.1));
    let g = u2 + v2 - k * cu * cv - 1.0;
    let gx = 2.0 * u * (1.0 - k * cv) / a;
    let gy = 2.0 * v * (1.0 - k * cu) / b;
    g / (gx * gx + gy * gy).sqrt().max(0.8 / a.min(b))
}

/// Which lobe a point of the lung belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lobe {
    RightUpper,
    RightMiddle,
    RightLower,
    LeftUpper,
    LeftLower,
}

impl Lobe {
    pub(super) const ALL: [Lobe; 5] =
        [Lobe::RightUpper, Lobe::RightMiddle, Lobe::RightLower, Lobe::LeftUpper, Lobe::LeftLower];
}

/// What is drawn of a tubular structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TubeKind {
    /// Blood vessel or other soft-tissue cord.
    Vessel,
    /// Airway: the radius is the lumen's, the wall lies outside.
    Airway,
    /// Bowel gas.
    Gas,
}

/// Values of all fields at one point; see the constants of [`field`].
pub(super) type Fields = [f32; field::COUNT];

/// Indices into [`Fields`].
pub(super) mod field {
    pub(in super::super) const BODY: usize = 0;
    pub(in super::super) const MUSCLE: usize = 1;
    pub(in super::super) const CAGE: usize = 2;
    /// What bounds the pleural cavity besides [`CAGE`] and [`DOME`]; the cavity is where all three allow it. They are
    /// kept apart since the recess between cage and diaphragm is thinner than the grid is fine.
    pub(in super::super) const INNER: usize = 3;
    /// Positive above the diaphragm.
    pub(in super::super) const DOME: usize = 4;
    pub(in super::super) const HEART: usize = 5;
    pub(in super::super) const LIVER: usize = 6;
    pub(in super::super) const SPLEEN: usize = 7;
    pub(in super::super) const STOMACH: usize = 8;
    /// Signed distance to the major fissure, then the smaller of that and the minor one (right side).
    pub(in super::super) const MAJOR: usize = 9;
    pub(in super::super) const MINOR: usize = 10;
    /// Free pleural fluid.
    pub(in super::super) const EFFUSION: usize = 11;
    /// Ground-glass level: 1 at the centre of a patch, 0 at its nominal edge.
    pub(in super::super) const GGO: usize = 12;
    /// Consolidation level, likewise.
    pub(in super::super) const CONSOLIDATION: usize = 13;
    pub(in super::super) const COUNT: usize = 14;
}

/// A patient.
pub(super) struct Anatomy {
    pub(super) female: bool,
    pub(super) age_years: u32,
    /// Lung height, millimetres.
    pub(super) height: f64,
    /// Inner half width and half depth of the rib cage at its widest.
    pub(super) half_width: f64,
    pub(super) half_depth: f64,
    pub(super) fat: f64,
    pub(super) bulk: f64,
    pub(super) lung_hu: f64,
    pub(super) bone_hu: f64,
    pub(super) pose: Pose,
    pub(super) carina_z: f64,
    size: f64,
    dome_top: [f64; 2],
    dome_drop: f64,
    squareness: f64,
    scoliosis: f64,
    warp_seed: u64,
    /// Made when first needed: most users of an anatomy only want its numbers.
    warp: OnceLock<Tile3>,
    fissure_z: f64,
    fissure_slope: f64,
    minor_z: f64,
    heart: Vec<Ellipsoid>,
    muscles: Vec<Ellipsoid>,
    breasts: Vec<Ellipsoid>,
    spleen: Ellipsoid,
    stomach: Ellipsoid,
    /// Tubes with the fat that wraps them, each with the box outside which it changes nothing.
    envelope: Vec<(Tube, V3, V3)>,
    /// Great vessels, trachea and the like.
    pub(super) tubes: Vec<(Tube, TubeKind)>,
}

const CAGE_WIDTH: [(f64, f64); 12] = [
    (-0.4, 0.93),
    (-0.2, 0.97),
    (0.0, 1.0),
    (0.2, 1.0),
    (0.4, 0.98),
    (0.55, 0.94),
    (0.7, 0.85),
    (0.82, 0.73),
    (0.92, 0.58),
    (1.0, 0.44),
    (1.1, 0.34),
    (1.3, 0.30),
];
const CAGE_DEPTH: [(f64, f64); 11] = [
    (-0.4, 0.90),
    (0.0, 0.97),
    (0.2, 1.0),
    (0.4, 0.98),
    (0.55, 0.93),
    (0.7, 0.81),
    (0.82, 0.67),
    (0.92, 0.53),
    (1.0, 0.42),
    (1.1, 0.36),
    (1.3, 0.36),
];
/// Posterior wall of the cage, in half depths behind the origin: the thoracic kyphosis.
const BACK: [(f64, f64); 7] =
    [(-0.4, 0.84), (0.0, 0.95), (0.3, 1.0), (0.6, 1.0), (0.8, 0.93), (1.0, 0.76), (1.3, 0.48)];
/// Half width of the outline above the wall thickness, in half widths of the cage; the arms are raised.
const BODY_WIDTH: [(f64, f64); 11] = [
    (-0.4, 0.97),
    (0.0, 1.0),
    (0.3, 1.02),
    (0.55, 1.05),
    (0.7, 1.12),
    (0.8, 1.24),
    (0.9, 1.34),
    (1.0, 1.30),
    (1.08, 1.05),
    (1.16, 0.72),
    (1.3, 0.55),
];

impl Anatomy {
    /// The patient of `seed`.
    pub(super) fn new(seed: u64) -> Self {
        Self::varied(seed, 1.0, 0.0)
    }

    /// The patient of `seed` in a population whose body measures deviate `spread` times as far, with `lung_hu` added to
    /// the parenchyma. A spread of 1 gives the bits of [`Anatomy::new`].
    pub(super) fn varied(seed: u64, spread: f64, lung_hu_offset: f64) -> Self {
        let about = |d: &mut Draw, mean: f64, deviation: f64, low: f64, high: f64| {
            if spread == 1.0 {
                return d.about(mean, deviation, low, high);
            }
            // A length stays one.
            let floor = if low > 0.0 { 0.6 * low } else { f64::MIN };
            let (low, high) = ((mean + (low - mean) * spread).max(floor), mean + (high - mean) * spread);
            d.about(mean, deviation * spread, low, high)
        };
        let mut d = Draw::new(seed, 1);
        let female = d.chance(0.47);
        let age_years = d.about(54.0, 15.0, 19.0, 89.0) as u32;
        let size = about(&mut d, if female { 0.95 } else { 1.02 }, 0.05, 0.82, 1.16);
        let height = size * about(&mut d, 252.0, 15.0, 205.0, 300.0);
        let half_width = size * about(&mut d, 136.0, 6.0, 118.0, 154.0);
        let half_depth = size * about(&mut d, 93.0, 6.0, 76.0, 112.0);
        let fat = about(&mut d, if female { 17.0 } else { 14.0 }, 6.0, 5.0, 36.0);
        let bulk = about(&mut d, if female { 0.9 } else { 1.08 }, 0.13, 0.7, 1.4);
        let lung_hu = about(&mut d, -862.0, 16.0, -900.0, -815.0) + lung_hu_offset;
        let bone_hu = (310.0 - 2.2 * f64::from(age_years) + 35.0 * d.bell()).clamp(70.0, 330.0);
        let pose = Pose::new(
            [0.025 * d.bell(), 0.02 * d.bell(), 0.04 * d.bell()],
            [6.0 * d.bell(), 6.0 * d.bell(), 4.0 * d.bell()],
        );
        let carina = d.about(0.645, 0.015, 0.61, 0.68);
        let right_dome = d.about(0.315, 0.03, 0.24, 0.39);
        let left_dome = right_dome - d.range(0.02, 0.07);
        let heart_scale = size * about(&mut d, 1.0, 0.08, 0.85, 1.25);
        let turn = d.range(-0.15, 0.15);
        let scoliosis = 5.0 * d.bell();
        let warp_seed = d.bits();

        let mut this = Self {
            female,
            age_years,
            height,
            half_width,
            half_depth,
            fat,
            bulk,
            lung_hu,
            bone_hu,
            pose,
            carina_z: 0.0,
            size,
            dome_top: [0.0; 2],
            dome_drop: height * d.range(0.27, 0.34),
            squareness: d.range(0.25, 0.5),
            scoliosis,
            warp_seed,
            warp: OnceLock::new(),
            fissure_z: 0.0,
            fissure_slope: d.range(0.75, 0.95),
            minor_z: 0.0,
            heart: Vec::new(),
            muscles: Vec::new(),
            breasts: Vec::new(),
            spleen: Ellipsoid::upright([0.0; 3], [1.0; 3]),
            stomach: Ellipsoid::upright([0.0; 3], [1.0; 3]),
            envelope: Vec::new(),
            tubes: Vec::new(),
        };
        this.carina_z = this.z(carina);
        this.dome_top = [this.z(right_dome), this.z(left_dome)];
        this.fissure_z = this.carina_z - d.range(18.0, 30.0);
        this.minor_z = this.carina_z - d.range(26.0, 40.0);
        this.place_heart(heart_scale, turn);
        this.place_tubes(&mut d, size, heart_scale);
        this.place_muscles(&mut d);
        this.place_abdomen(&mut d, size);
        this
    }

    /// Height of lung fraction `t`.
    pub(super) fn z(&self, t: f64) -> f64 {
        (t - 0.5) * self.height
    }

    /// Lung fraction of a height.
    pub(super) fn t(&self, z: f64) -> f64 {
        z / self.height + 0.5
    }

    pub(super) fn front_y(&self, z: f64) -> f64 {
        self.back_y(z) - 2.0 * self.half_depth * table(&CAGE_DEPTH, self.t(z))
    }

    pub(super) fn back_y(&self, z: f64) -> f64 {
        self.half_depth * table(&BACK, self.t(z))
    }

    /// y at a fraction of the way from the sternum to the posterior gutter.
    pub(super) fn y(&self, fraction: f64, z: f64) -> f64 {
        lerp(self.front_y(z), self.back_y(z), fraction)
    }

    /// Centre of the vertebral bodies at height `z`.
    pub(super) fn spine(&self, z: f64) -> (f64, f64) {
        let t = self.t(z);
        (self.scoliosis * (1.0 - 4.0 * (t - 0.5) * (t - 0.5)), self.back_y(z) - 21.0)
    }

    /// Height of the middle of thoracic vertebra `i` (1 the highest; 0 and below are cervical, above 12 lumbar).
    pub(super) fn vertebra_z(&self, i: f64) -> f64 {
        self.z(1.01 - (i - 1.0) * 0.0935)
    }

    /// The number (continuous) of the vertebra at a height; the inverse of [`Self::vertebra_z`].
    pub(super) fn vertebra_at(&self, z: f64) -> f64 {
        (1.01 - self.t(z)) / 0.0935 + 1.0
    }

    fn place_heart(&mut self, s: f64, turn: f64) {
        let zc = self.carina_z;
        let at = |x: f64, f: f64, dz: f64| [x * s, self.y(f, zc + dz), zc + dz];
        self.heart = vec![
            Ellipsoid::along(at(27.0, 0.40, -74.0 * s), [0.76, -0.46 + turn, -0.42], [60.0, 40.0, 40.0].map(|r| r * s)),
            Ellipsoid::along(at(4.0, 0.30, -72.0 * s), [0.9, -0.2 + turn, -0.3], [50.0, 30.0, 42.0].map(|r| r * s)),
            Ellipsoid::upright(at(-27.0, 0.42, -60.0 * s), [26.0, 32.0, 40.0].map(|r| r * s)),
            Ellipsoid::upright(at(2.0, 0.60, -38.0 * s), [35.0, 21.0, 25.0].map(|r| r * s)),
        ];
    }

    fn place_tubes(&mut self, d: &mut Draw, size: f64, heart: f64) {
        let zc = self.carina_z;
        let top = self.z(1.35);
        let bottom = self.z(-0.5);
        let p = |x: f64, f: f64, z: f64| [x * size, self.y(f, z), z];
        let aorta = d.about(13.5, 1.3, 11.0, 18.0) * size + 0.05 * (f64::from(self.age_years) - 50.0);
        let spine_front = |x: f64, z: f64| {
            let (sx, sy) = self.spine(z);
            [sx + x, sy - 16.0 * size - 8.0, z]
        };
        let arch = zc + 30.0 * size;
        let mut tubes = Vec::new();
        let mut envelope = Vec::new();
        let mut put = |points: &[(V3, f64)], kind: TubeKind, margin: f64| {
            for tube in polyline(points) {
                tubes.push((tube, kind));
                if margin > 0.0 {
                    let wrapped = Tube { ra: tube.ra + margin, rb: tube.rb + margin, ..tube };
                    let reach = wrapped.ra.max(wrapped.rb) + 20.0;
                    let low = [0, 1, 2].map(|i| tube.a[i].min(tube.b[i]) - reach);
                    let high = [0, 1, 2].map(|i| tube.a[i].max(tube.b[i]) + reach);
                    envelope.push((wrapped, low, high));
                }
            }
        };
        use TubeKind::{Airway, Gas, Vessel};
        let tr = d.about(8.6, 0.8, 7.0, 10.5) * size;
        let trachea_x = d.range(-3.0, 2.0);
        // Trachea and main bronchi; the lobar airways are grown with the lungs.
        put(
            &[
                (p(0.0, 0.42, top), tr),
                (p(trachea_x, 0.50, self.z(0.95)), tr),
                (p(trachea_x + 1.0, 0.54, zc + 30.0), tr),
                (p(1.0, 0.585, zc + 2.0), tr * 1.02),
            ],
            Airway,
            6.0,
        );
        put(
            &[
                (p(0.0, 0.585, zc + 3.0), tr * 0.85),
                (p(-17.0, 0.60, zc - 12.0), 6.8),
                (p(-31.0, 0.615, zc - 22.0), 6.4),
            ],
            Airway,
            7.0,
        );
        put(&[(p(-31.0, 0.615, zc - 22.0), 6.0), (p(-35.0, 0.61, zc - 44.0), 5.2)], Airway, 6.0);
        put(
            &[(p(2.0, 0.585, zc + 3.0), tr * 0.85), (p(22.0, 0.61, zc - 16.0), 6.2), (p(42.0, 0.635, zc - 31.0), 5.6)],
            Airway,
            7.0,
        );
        // Oesophagus.
        put(
            &[
                (p(4.0, 0.62, top), 6.0),
                (p(6.0, 0.66, zc + 20.0), 6.5),
                (p(6.0, 0.70, zc - 30.0), 7.0),
                (p(10.0, 0.72, self.z(0.22)), 7.5),
                (p(24.0, 0.62, self.z(0.12)), 8.0),
            ],
            Vessel,
            5.0,
        );
        // Aorta: root, ascending, arch, descending.
        put(
            &[
                (p(6.0, 0.38, zc - 48.0 * heart), aorta * 1.1),
                (p(-14.0, 0.33, zc - 14.0), aorta * 1.15),
                (p(-9.0, 0.38, arch - 8.0), aorta * 1.05),
                (p(6.0, 0.50, arch), aorta),
                (p(18.0, 0.66, arch - 7.0), aorta * 0.95),
                (spine_front(20.0, zc - 2.0), aorta * 0.9),
                (spine_front(16.0, self.z(0.35)), aorta * 0.85),
                (spine_front(6.0, self.z(0.05)), aorta * 0.8),
                (spine_front(2.0, bottom), aorta * 0.75),
            ],
            Vessel,
            5.0,
        );
        // Superior vena cava, inferior vena cava.
        put(
            &[(p(-20.0, 0.33, zc + 52.0), 7.5), (p(-26.0, 0.37, zc + 15.0), 9.0), (p(-27.0, 0.42, zc - 40.0), 9.5)],
            Vessel,
            5.0,
        );
        put(
            &[(p(-22.0, 0.52, zc - 80.0), 11.0), (p(-22.0, 0.60, self.z(0.05)), 12.0), (p(-20.0, 0.68, bottom), 11.0)],
            Vessel,
            4.0,
        );
        // Branches of the arch, brachiocephalic veins.
        put(&[(p(-4.0, 0.42, arch), 6.5), (p(-14.0, 0.42, arch + 30.0), 5.8), (p(-26.0, 0.46, top), 4.5)], Vessel, 5.0);
        put(&[(p(6.0, 0.50, arch), 4.2), (p(13.0, 0.46, arch + 30.0), 3.8), (p(20.0, 0.46, top), 3.6)], Vessel, 5.0);
        put(
            &[(p(16.0, 0.60, arch), 5.0), (p(25.0, 0.55, arch + 32.0), 4.6), (p(48.0, 0.45, self.z(1.0)), 4.4)],
            Vessel,
            5.0,
        );
        put(
            &[(p(-20.0, 0.33, zc + 50.0), 6.5), (p(4.0, 0.28, zc + 58.0), 6.2), (p(28.0, 0.32, zc + 72.0), 6.0)],
            Vessel,
            5.0,
        );
        put(&[(p(-20.0, 0.33, zc + 50.0), 6.5), (p(-30.0, 0.34, zc + 78.0), 6.0)], Vessel, 5.0);
        // Pulmonary trunk and main arteries.
        let pa = d.about(12.5, 1.0, 10.5, 16.0) * size;
        put(
            &[
                (p(20.0, 0.24, zc - 50.0), pa * 1.05),
                (p(20.0, 0.36, zc - 22.0), pa),
                (p(25.0, 0.50, zc - 8.0), pa * 0.95),
            ],
            Vessel,
            4.0,
        );
        put(
            &[
                (p(20.0, 0.44, zc - 15.0), pa * 0.85),
                (p(-6.0, 0.50, zc - 20.0), pa * 0.8),
                (p(-32.0, 0.52, zc - 20.0), pa * 0.72),
                (p(-44.0, 0.56, zc - 30.0), pa * 0.6),
            ],
            Vessel,
            6.0,
        );
        put(
            &[
                (p(25.0, 0.50, zc - 8.0), pa * 0.85),
                (p(41.0, 0.61, zc - 7.0), pa * 0.75),
                (p(47.0, 0.68, zc - 24.0), pa * 0.6),
            ],
            Vessel,
            6.0,
        );
        // Pulmonary veins into the left atrium.
        for (x, dz) in [(-46.0, -30.0), (-44.0, -58.0), (48.0, -34.0), (46.0, -58.0)] {
            put(&[(p(x * 0.55, 0.60, zc - 40.0), 7.0), (p(x, 0.58, zc + dz), 5.6)], Vessel, 5.0);
        }
        // Azygos vein, and a few lymph nodes of ordinary size.
        put(
            &[
                (spine_front(-9.0, bottom), 3.0),
                (spine_front(-10.0, zc - 10.0), 4.2),
                (p(-20.0, 0.6, zc + 8.0), 4.5),
                (p(-25.0, 0.42, zc + 8.0), 4.5),
            ],
            Vessel,
            4.0,
        );
        for _ in 0..6 {
            let c = p(d.range(-18.0, 14.0), d.range(0.38, 0.52), zc + d.range(-22.0, 20.0));
            let r = d.range(2.0, 4.0);
            put(&[(c, r), (add(c, [d.range(-4.0, 4.0), 2.0, d.range(-4.0, 4.0)]), r)], Vessel, 0.0);
        }
        // Gas in the splenic flexure, now and then under the left dome.
        if d.chance(0.7) {
            let z = self.z(d.range(0.0, 0.1));
            let r = d.range(10.0, 17.0);
            put(&[(p(62.0, 0.25, z - 20.0), r), (p(84.0, 0.36, z), r), (p(95.0, 0.5, z - 40.0), r * 0.8)], Gas, 0.0);
        }
        self.tubes = tubes;
        self.envelope = envelope;
    }

    /// Where the tree of a lobe begins: its bronchus (and artery), and its vein.
    pub(super) fn hilum(&self, lobe: Lobe) -> (V3, V3) {
        let zc = self.carina_z;
        let p = |x: f64, f: f64, z: f64| [x * self.size, self.y(f, z), z];
        match lobe {
            Lobe::RightUpper => (p(-31.0, 0.615, zc - 22.0), p(-46.0, 0.58, zc - 30.0)),
            Lobe::RightMiddle => (p(-35.0, 0.61, zc - 44.0), p(-45.0, 0.56, zc - 42.0)),
            Lobe::RightLower => (p(-35.0, 0.61, zc - 44.0), p(-44.0, 0.58, zc - 58.0)),
            Lobe::LeftUpper => (p(42.0, 0.635, zc - 31.0), p(48.0, 0.58, zc - 34.0)),
            Lobe::LeftLower => (p(42.0, 0.635, zc - 31.0), p(46.0, 0.58, zc - 58.0)),
        }
    }

    fn place_muscles(&mut self, d: &mut Draw) {
        let b = self.bulk;
        let a = self.half_width;
        let mut put = |c: V3, r: V3| self.muscles.push(Ellipsoid::upright(c, r));
        let z = |t: f64| (t - 0.5) * self.height;
        let front = |t: f64| self.half_depth * (table(&BACK, t) - 2.0 * table(&CAGE_DEPTH, t));
        let back = |t: f64| self.half_depth * table(&BACK, t);
        for side in [-1.0, 1.0] {
            // Pectorals, latissimus and serratus, the shoulder, trapezius and rhomboids.
            put([side * 0.62 * a, front(0.70) + 4.0, z(0.70)], [0.50 * a, 19.0 * b, 62.0]);
            put([side * 0.90 * a, front(0.86) + 16.0, z(0.86)], [0.42 * a, 20.0 * b, 42.0]);
            put([side * (a + 17.0), back(0.5) - 55.0, z(0.50)], [13.0 * b, 48.0, 115.0]);
            put([side * (0.98 * a), back(0.7) - 18.0, z(0.74)], [30.0 * b, 30.0, 70.0]);
            put([side * 1.22 * a, back(0.92) - 45.0, z(0.97)], [46.0 * b, 36.0, 46.0]);
            put([side * 0.58 * a, back(0.8) + 13.0, z(0.80)], [0.58 * a, 15.0 * b, 75.0]);
            put([side * 22.0, back(1.1) + 12.0, z(1.15)], [28.0, 26.0, 70.0]);
            put([side * 30.0, back(1.1) - 30.0, z(1.2)], [22.0, 22.0, 60.0]);
        }
        if self.female {
            let (w, h) = (d.range(50.0, 68.0), d.range(14.0, 30.0) + 0.4 * self.fat);
            for side in [-1.0, 1.0] {
                self.breasts.push(Ellipsoid::upright([side * 0.62 * a, front(0.44) - 15.0, z(0.44)], [w, h, w * 1.05]));
            }
        }
    }

    fn place_abdomen(&mut self, d: &mut Draw, size: f64) {
        let z = self.dome_top[1];
        let s = size;
        let c = |x: f64, f: f64, dz: f64| [x * s, self.y(f, z + dz), z + dz];
        let spleen = Ellipsoid::along(c(86.0, 0.74, -62.0), [0.35, 0.75, -0.2], [46.0 * s, 30.0 * s, 55.0 * s]);
        let stomach = Ellipsoid::along(
            c(52.0, 0.42, -48.0),
            [0.5, 0.35, 0.8],
            [d.range(44.0, 58.0) * s, 36.0 * s, d.range(34.0, 44.0) * s],
        );
        self.spleen = spleen;
        self.stomach = stomach;
    }

    /// Inner surface of the rib cage and its continuation round the upper abdomen and neck.
    pub(super) fn cage(&self, p: V3) -> f64 {
        let t = self.t(p[2]);
        let a = self.half_width * table(&CAGE_WIDTH, t);
        let b = self.half_depth * table(&CAGE_DEPTH, t);
        squircle(p[0], p[1] - (self.back_y(p[2]) - b), a, b, self.squareness)
    }

    /// Distance along `direction` (horizontal, from the cage's axis) to the cage's surface, and the axis point.
    pub(super) fn cage_radius(&self, z: f64, direction: (f64, f64), offset: f64) -> V3 {
        let yc = 0.5 * (self.front_y(z) + self.back_y(z));
        let (mut low, mut high) = (0.0, 300.0);
        for _ in 0..40 {
            let mid = 0.5 * (low + high);
            if self.cage([mid * direction.0, yc + mid * direction.1, z]) < offset { low = mid } else { high = mid }
        }
        [low * direction.0, yc + low * direction.1, z]
    }

    pub(super) fn body(&self, p: V3) -> f64 {
        let t = self.t(p[2]);
        let (x, z) = (p[0], p[2]);
        let fat = self.fat;
        let back = self.back_y(z) + 36.0 + 0.55 * fat + 8.0 * self.bulk;
        let front = self.front_y(z) - 15.0 - 0.75 * fat;
        let a = self.half_width * table(&BODY_WIDTH, t) + 13.0 + 8.0 * self.bulk + 0.85 * fat;
        let b = 0.5 * (back - front);
        let mut f = squircle(x, p[1] - 0.5 * (front + back), a, b, 0.45);
        for breast in &self.breasts {
            f = smin(f, breast.distance(p), 14.0);
        }
        // The furrow over the spinous processes, the flattening on the table.
        if p[1] > 0.0 {
            f += 7.0 * exp(-(x / 16.0) * (x / 16.0));
        }
        -smin(-f, self.rest_y() - p[1], 24.0)
    }

    /// The plane of the table under a supine patient.
    pub(super) fn rest_y(&self) -> f64 {
        self.half_depth + 36.0 + 0.5 * self.fat
    }

    fn muscle(&self, p: V3, cage: f64) -> f64 {
        let mut f = cage - 12.0;
        for m in &self.muscles {
            if (p[2] - m.centre[2]).abs() < m.radii[2] + 12.0 {
                f = smin(f, m.distance(p), 5.0);
            }
        }
        // Erector spinae and the tissue round the vertebral arches.
        let (sx, sy) = self.spine(p[2]);
        let (x, y) = ((p[0] - sx).abs(), p[1] - sy);
        f = f.min(squircle(x - 31.0, y - 43.0, 26.0 * self.bulk.min(1.1), 17.0, 0.3));
        f = f.min(squircle(x, y - 20.0, 40.0, 24.0, 0.2));
        f
    }

    /// Positive above the diaphragm.
    fn dome(&self, p: V3) -> f64 {
        let mut best = f64::MAX;
        for (i, side) in [-1.0, 1.0].into_iter().enumerate() {
            let dx = (p[0] - side * 0.50 * self.half_width) * side;
            let yc = self.y(0.46, self.z(0.25));
            let dy = p[1] - yc;
            let ax = if dx > 0.0 { 0.53 } else { 0.78 } * self.half_width;
            let by = 1.04 * self.half_depth;
            let r2 = dx * dx / (ax * ax) + dy * dy / (by * by);
            let r = r2.sqrt();
            let drop = self.dome_drop * r2 * r;
            let slope =
                3.0 * self.dome_drop * r * (dx * dx / (ax * ax * ax * ax) + dy * dy / (by * by * by * by)).sqrt();
            let f = (p[2] - (self.dome_top[i] - drop)) / (1.0 + slope * slope).sqrt().min(4.0);
            best = if i == 0 { f } else { smin(best, f, 12.0) };
        }
        best
    }

    fn heart(&self, p: V3) -> f64 {
        let mut f = f64::MAX;
        for e in &self.heart {
            f = smin(f, e.distance(p), 12.0);
        }
        f
    }

    /// Whether a point lies in the heart or within 2 mm of it.
    pub(super) fn in_heart(&self, p: V3) -> bool {
        self.heart(p) < 2.0
    }

    /// Everything between the lungs: the great vessels and airways with the fat that wraps them, heart, spine.
    fn mediastinum(&self, p: V3, heart: f64) -> f64 {
        let mut f = heart - 5.0;
        for (tube, low, high) in &self.envelope {
            if (0..3).all(|i| p[i] > low[i] && p[i] < high[i]) {
                f = smin(f, tube.distance(p), 9.0);
            }
        }
        let (sx, sy) = self.spine(p[2]);
        f = smin(f, squircle(p[0] - sx, p[1] - sy - 20.0, 24.0, 38.0, 0.3), 8.0);
        // The anterior junction: a thin septum that widens behind the sternum.
        let t = self.t(p[2]);
        let front = self.front_y(p[2]);
        let depth = (p[1] - front).max(0.0);
        if p[1] < self.y(0.5, p[2]) {
            let half = 3.0 + 14.0 * exp(-depth / 9.0) + 9.0 * smoothstep(0.45, 0.2, t);
            f = smin(f, (p[0] - 3.0).abs() - half, 6.0);
        }
        f
    }

    /// Signed distances to the major and the minor fissure: positive above each.
    fn fissures(&self, p: V3) -> (f64, f64) {
        let yc = 0.5 * (self.front_y(self.fissure_z) + self.back_y(self.fissure_z));
        let bend = 0.0016 * (p[0].abs() - 70.0) * (p[0].abs() - 70.0);
        let lower = if p[0] > 0.0 { 6.0 } else { 0.0 };
        let major = (p[2] - (self.fissure_z + lower + self.fissure_slope * (p[1] - yc) - bend))
            / (1.0 + self.fissure_slope * self.fissure_slope).sqrt();
        let minor = p[2] - self.minor_z + 0.0012 * (p[0] + 70.0) * (p[0] + 70.0) - 4.0;
        (major, minor)
    }

    /// The lobe of a point of the lung and its distance to the nearest fissure.
    pub(super) fn lobe(&self, p: V3) -> (Lobe, f64) {
        let (major, minor) = self.fissures(p);
        let near = if p[0] < 0.0 && major > 0.0 { major.min(minor.abs()) } else { major.abs() };
        let lobe = match (p[0] < 0.0, major > 0.0, minor > 0.0) {
            (true, false, _) => Lobe::RightLower,
            (true, true, true) => Lobe::RightUpper,
            (true, true, false) => Lobe::RightMiddle,
            (false, false, _) => Lobe::LeftLower,
            (false, true, _) => Lobe::LeftUpper,
        };
        (lobe, near)
    }

    /// How far inside `lobe` a point of the lung lies (negative outside it), by the fissures only.
    pub(super) fn inside_lobe(&self, lobe: Lobe, p: V3) -> f64 {
        let (major, minor) = self.fissures(p);
        let right = -p[0];
        match lobe {
            Lobe::RightUpper => major.min(minor).min(right),
            Lobe::RightMiddle => major.min(-minor).min(right),
            Lobe::RightLower => (-major).min(right),
            Lobe::LeftUpper => major.min(-right),
            Lobe::LeftLower => (-major).min(-right),
        }
    }

    /// What bounds the pleural cavity besides the cage and the diaphragm: mediastinum, apex, floor.
    fn inner(&self, p: V3, mediastinum: f64) -> f64 {
        // Each apex is a small dome of its own.
        let z = p[2];
        let xa = 0.31 * self.half_width;
        let ya = self.y(0.62, self.z(0.95));
        let dx = p[0].abs() - xa;
        let dy = p[1] - ya;
        let apex = (z - (self.z(1.0) - dx * dx / 105.0 - dy * dy / 130.0)) * 0.7;
        let floor = self.z(0.0) - z;
        (-mediastinum).max(if z > self.z(0.55) { apex } else { -50.0 }).max(floor)
    }

    /// The pleural cavity at a point, without the low-frequency warp.
    pub(super) fn lung(&self, p: V3) -> f64 {
        let cage = self.cage(p);
        if cage > 6.0 {
            return cage;
        }
        let dome = self.dome(p);
        if dome < -8.0 {
            return -dome;
        }
        cage.max(-dome).max(self.inner(p, self.mediastinum(p, self.heart(p))))
    }

    fn warp(&self) -> &Tile3 {
        self.warp.get_or_init(|| Tile3::new(self.warp_seed))
    }

    /// A slow displacement that breaks the symmetry of the formulas; at most a few millimetres.
    fn warped(&self, p: V3) -> V3 {
        let s = 1.0 / 22.0;
        let q = p.map(|v| (v * s) as f32);
        let w = |dx: f32| f64::from(self.warp().at(q[0] + dx, q[1], q[2]));
        [p[0] + 1.3 * w(0.0), p[1] + 1.3 * w(21.3), p[2] + 1.3 * w(42.7)]
    }

    /// All fields at a point; `extra` adds what the lesions contribute: `(effusion, ggo, consolidation)` from the point,
    /// the cavity's field and a function that evaluates the cavity elsewhere.
    pub(super) fn fields(&self, p: V3, extra: &dyn Fn(V3, f64) -> [f64; 3]) -> Fields {
        let mut out = [50.0f32; field::COUNT];
        let body = self.body(p);
        out[field::BODY] = body as f32;
        out[field::GGO] = -1.0;
        out[field::CONSOLIDATION] = -1.0;
        if body > 12.0 {
            return out;
        }
        let p = self.warped(p);
        let cage = self.cage(p);
        out[field::CAGE] = cage as f32;
        out[field::MUSCLE] = self.muscle(p, cage) as f32;
        if cage > 25.0 {
            return out;
        }
        let dome = self.dome(p);
        let heart = self.heart(p);
        // Far outside the cage and deep in the abdomen there is no lung, whatever the mediastinum.
        let far = cage > 14.0 || dome < -14.0;
        let inner = if far { 0.0 } else { self.inner(p, self.mediastinum(p, heart)) };
        let lung = cage.max(-dome).max(inner);
        out[field::DOME] = dome as f32;
        // The heart rests on the diaphragm.
        out[field::HEART] = heart.max(-(dome - 3.0)) as f32;
        out[field::INNER] = inner as f32;
        if dome < 12.0 {
            let below = dome + 1.2;
            let wall = cage + 1.2;
            let front = self.front_y(p[2]);
            // The left edge of the liver: an oblique, bulging, slightly lobed surface.
            let depth = p[1] - front;
            let along = 0.8 * depth - 0.6 * p[0] - 45.0;
            let lobes =
                5.0 * f64::from(self.warp().at((p[0] * 0.03) as f32, (p[1] * 0.03) as f32, (p[2] * 0.03 + 9.0) as f32));
            let low = smoothstep(0.15, -0.25, self.t(p[2])) * 30.0;
            let liver = (0.8 * p[0] + 0.6 * depth - 60.0 + low + 0.0022 * along * along + lobes).max(below).max(wall);
            let spleen = self.spleen.distance(p).max(below).max(wall);
            out[field::LIVER] = liver as f32;
            out[field::SPLEEN] = spleen as f32;
            out[field::STOMACH] =
                self.stomach.distance(p).max(below + 1.0).max(wall).max(3.0 - liver).max(2.0 - spleen) as f32;
        }
        let (major, minor) = self.fissures(p);
        out[field::MAJOR] = major as f32;
        out[field::MINOR] = minor as f32;
        if lung < 8.0 {
            let [effusion, ggo, consolidation] = extra(p, lung);
            out[field::EFFUSION] = effusion as f32;
            out[field::GGO] = ggo as f32;
            out[field::CONSOLIDATION] = consolidation as f32;
        }
        out
    }

    /// Outward unit normal of the cage near a point.
    pub(super) fn cage_normal(&self, p: V3) -> V3 {
        let h = 1.0;
        let f = |dx: f64, dy: f64, dz: f64| self.cage([p[0] + dx, p[1] + dy, p[2] + dz]);
        unit([f(h, 0.0, 0.0) - f(-h, 0.0, 0.0), f(0.0, h, 0.0) - f(0.0, -h, 0.0), f(0.0, 0.0, h) - f(0.0, 0.0, -h)])
    }

    /// Radius of a vessel that feeds `leaves` ends (Murray's law with the exponent measured in lungs).
    pub(super) fn vessel_radius(leaves: usize) -> f64 {
        0.36 * pow(leaves as f64, 1.0 / 2.75)
    }
}
