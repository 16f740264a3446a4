//! From a spec to slices: the smooth organs on a coarse grid, the thin ones as capsules, shaded pixel by pixel.
//!
//! The boundaries of the large organs are evaluated once on a grid of a few millimetres over the whole scan and
//! interpolated per pixel; since they are close to distances, a straight interpolation keeps edges sharp to a fraction
//! of a pixel. Slices thicker than [`SUB_MM`] are the mean of several planes, which gives the partial volume along z.
//! Every slice depends on the spec and its own index only.

use super::anatomy::{Anatomy, Fields, Lobe, TubeKind, field};
use super::lesions::Lesions;
use super::math::{Draw, V3, add, cross, hash_all, norm, scale, sin_cos, smoothstep, sub, unit};
use super::noise::{SeptaTile, SliceNoise, Tile3};
use super::raster::{Buffers, Capsule, Kind, Plane, draw};
use super::skeleton::{self, SPINE_REACH, SpinePart};
use super::tree::{self, Branch};
use super::{Acquisition, Kernel, PhantomClass, PhantomSpec, Variation};
use rayon::prelude::*;

/// Pitch of the coarse grid.
const GRID_MM: f64 = 4.0;
/// A plane stands for at most this much of the slice thickness, up to [`MAX_PLANES`] planes a slice.
const SUB_MM: f64 = 1.5;
const MAX_PLANES: usize = 4;
/// Ends of the arterial (and airway) and of the venous trees, both lungs together.
const ARTERY_ENDS: usize = 5200;
const VEIN_ENDS: usize = 4200;
/// y of the middle of the field of view.
const CENTRE_Y_MM: f64 = 8.0;
/// z of the middle of the scan: it covers more below the recesses than above the apices.
pub(super) const CENTRE_Z_MM: f64 = -6.0;

/// Where slices and pixels lie in the world (LPS millimetres).
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    /// Centre of pixel (0, 0) of slice 0.
    pub(super) origin: V3,
    /// Direction of increasing row; columns increase along x.
    pub(super) down: V3,
    pub(super) normal: V3,
    /// From one slice to the next: the table moves along z whatever the tilt.
    pub(super) step: V3,
}

impl Frame {
    pub(super) fn new(spec: &PhantomSpec, acquisition: &Acquisition) -> Self {
        let (s, c) = sin_cos(acquisition.tilt_deg.to_radians());
        let down = [0.0, c, s];
        let half_r = (spec.rows as f64 - 1.0) * 0.5 * spec.pixel_spacing_mm;
        let half_c = (spec.columns as f64 - 1.0) * 0.5 * spec.pixel_spacing_mm;
        let half_z = (spec.slices as f64 - 1.0) * 0.5 * spec.spacing_mm;
        let middle = [-half_c, CENTRE_Y_MM, CENTRE_Z_MM - half_z];
        Self { origin: sub(middle, scale(down, half_r)), down, normal: [0.0, -s, c], step: [0.0, 0.0, spec.spacing_mm] }
    }
}

/// The coarse grid, laid out z, y, field, x.
struct Grid {
    origin: V3,
    n: [usize; 3],
    data: Vec<f32>,
}

impl Grid {
    fn new(low: V3, high: V3, eval: impl Fn(V3) -> Fields + Sync) -> Self {
        let n = [0, 1, 2].map(|i| ((high[i] - low[i]) / GRID_MM) as usize + 3);
        let origin = low.map(|v| v - 0.5 * GRID_MM);
        let row = field::COUNT * n[0];
        let mut data = vec![0.0f32; n[2] * n[1] * row];
        data.par_chunks_mut(row).enumerate().for_each(|(i, out)| {
            let (iy, iz) = (i % n[1], i / n[1]);
            for ix in 0..n[0] {
                let p = add(origin, [ix as f64 * GRID_MM, iy as f64 * GRID_MM, iz as f64 * GRID_MM]);
                for (f, v) in eval(p).into_iter().enumerate() {
                    out[f * n[0] + ix] = v;
                }
            }
        });
        Self { origin, n, data }
    }

    /// Interpolates the line of grid nodes along x at `(y, z)` into `out` (field, x).
    fn line(&self, y: f64, z: f64, out: &mut [f32]) {
        let at = |v: f64, axis: usize| {
            let u = ((v - self.origin[axis]) / GRID_MM).clamp(0.0, self.n[axis] as f64 - 1.001);
            (u as usize, (u - (u as usize) as f64) as f32)
        };
        let ((iy, fy), (iz, fz)) = (at(y, 1), at(z, 2));
        let row = field::COUNT * self.n[0];
        let part = |dy: usize, dz: usize| {
            let start = ((iz + dz) * self.n[1] + iy + dy) * row;
            &self.data[start..start + row]
        };
        let (a, b, c, d) = (part(0, 0), part(1, 0), part(0, 1), part(1, 1));
        let (wa, wb, wc, wd) = ((1.0 - fy) * (1.0 - fz), fy * (1.0 - fz), (1.0 - fy) * fz, fy * fz);
        for (i, o) in out.iter_mut().enumerate() {
            *o = wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i];
        }
    }
}

/// Everything needed to render any slice of a spec.
pub(super) struct Scene {
    spec: PhantomSpec,
    acquisition: Acquisition,
    pub(super) frame: Frame,
    anatomy: Anatomy,
    grid: Grid,
    capsules: Vec<Capsule>,
    lesions: Lesions,
    /// Whether there is anything of `lesions` to draw.
    sick: bool,
    texture: Tile3,
    septa: Option<SeptaTile>,
    noise: SliceNoise,
    edge: f32,
    /// Coarse cell and fraction of each column.
    columns: Vec<(u32, f32)>,
}

/// Working memory of one thread.
pub(super) struct Scratch {
    buffers: Buffers,
    line: Vec<f32>,
    hu: Vec<f32>,
    lung: Vec<f32>,
    glass: Vec<f32>,
    solid: Vec<f32>,
    fluid: Vec<f32>,
    noise: Vec<f32>,
    streak: Vec<f32>,
}

impl Scene {
    pub(super) fn new(spec: &PhantomSpec, acquisition: &Acquisition, variation: &Variation) -> Self {
        let anatomy = Anatomy::varied(spec.seed, variation.anatomy_spread, variation.lung_hu);
        let frame = Frame::new(spec, acquisition);
        let Trees { capsules, points, airways } = plant(spec.seed, &anatomy);
        let mut lesions = Lesions::new(spec, &anatomy, &points, &airways, acquisition.prone);
        lesions.vary(spec, &anatomy, &points, acquisition.prone, variation);
        let sick = spec.class != PhantomClass::Healthy || lesions.any();

        // The box round all pixels.
        let corner = |c: f64, r: f64, k: f64| {
            add(
                add(frame.origin, scale(frame.step, k)),
                add([c * spec.pixel_spacing_mm, 0.0, 0.0], scale(frame.down, r * spec.pixel_spacing_mm)),
            )
        };
        let (lc, lr, lk) = (spec.columns as f64 - 1.0, spec.rows as f64 - 1.0, spec.slices as f64 - 1.0);
        let (mut low, mut high) = (corner(0.0, 0.0, 0.0), corner(0.0, 0.0, 0.0));
        for (c, r, k) in [(0.0, lr, 0.0), (lc, 0.0, lk), (lc, lr, lk), (0.0, 0.0, lk), (lc, lr, 0.0)] {
            let p = corner(c, r, k);
            for i in 0..3 {
                low[i] = low[i].min(p[i]);
                high[i] = high[i].max(p[i]);
            }
        }
        low[2] -= spec.thickness_mm;
        high[2] += spec.thickness_mm;
        let grid = Grid::new(low, high, |p| {
            anatomy.fields(anatomy.pose.undo(p), &|q, lung| {
                if sick { lesions.at(&anatomy, q, lung) } else { [50.0, -1.0, -1.0] }
            })
        });
        let columns = (0..spec.columns)
            .map(|c| {
                let u = (frame.origin[0] + c as f64 * spec.pixel_spacing_mm - grid.origin[0]) / GRID_MM;
                let i = (u as usize).min(grid.n[0] - 2);
                (i as u32, (u - i as f64) as f32)
            })
            .collect();
        let (edge, low_mm, high_mm) = match spec.kernel {
            Kernel::Soft => (1.35, 0.75, 2.6),
            Kernel::Medium => (1.0, 0.5, 1.8),
            Kernel::Sharp => (0.7, 0.28, 0.9),
        };
        let noise_seed = hash_all(&[
            spec.seed,
            spec.kernel as u64,
            spec.spacing_mm.to_bits(),
            spec.thickness_mm.to_bits(),
            spec.pixel_spacing_mm.to_bits(),
        ]);
        let mut d = Draw::new(spec.seed, 60);
        let texture = Tile3::new(d.bits());
        let septa = (lesions.septa_hu > 0.0).then(|| SeptaTile::new(d.bits()));
        Self {
            spec: spec.clone(),
            acquisition: *acquisition,
            frame,
            grid,
            capsules,
            lesions,
            sick,
            texture,
            septa,
            noise: SliceNoise::new(noise_seed, spec.pixel_spacing_mm, low_mm, high_mm),
            edge: (edge as f32).max(spec.pixel_spacing_mm as f32),
            columns,
            anatomy,
        }
    }

    pub(super) fn scratch(&self) -> Scratch {
        let n = self.spec.rows * self.spec.columns;
        let zero = || vec![0.0f32; n];
        Scratch {
            buffers: Buffers::new(n),
            line: vec![0.0; field::COUNT * self.grid.n[0]],
            hu: zero(),
            lung: zero(),
            glass: zero(),
            solid: zero(),
            fluid: zero(),
            noise: vec![0.0; self.spec.columns],
            streak: vec![0.0; self.spec.columns],
        }
    }

    /// Renders slice `k` (feet first) into `hu`, `lesion` and `lung`, each rows x columns.
    pub(super) fn slice(&self, k: usize, s: &mut Scratch, hu: &mut [i16], lesion: &mut [u8], lung: &mut [u8]) {
        for b in [&mut s.hu, &mut s.lung, &mut s.glass, &mut s.solid, &mut s.fluid] {
            b.fill(0.0);
        }
        let thickness = self.spec.thickness_mm;
        let planes = ((thickness / SUB_MM) as usize + 1).min(MAX_PLANES);
        let weight = 1.0 / planes as f32;
        for i in 0..planes {
            let offset = ((i as f64 + 0.5) / planes as f64 - 0.5) * thickness;
            let origin = add(add(self.frame.origin, scale(self.frame.step, k as f64)), [0.0, 0.0, offset]);
            let plane = Plane {
                origin,
                down: self.frame.down,
                normal: self.frame.normal,
                pitch: self.spec.pixel_spacing_mm,
                rows: self.spec.rows,
                columns: self.spec.columns,
            };
            s.buffers.clear();
            for capsule in &self.capsules {
                draw(capsule, &plane, self.edge, &mut s.buffers);
            }
            self.draw_spine(&plane, &mut s.buffers);
            for row in 0..self.spec.rows {
                let p = add(origin, scale(self.frame.down, row as f64 * self.spec.pixel_spacing_mm));
                self.grid.line(p[1], p[2], &mut s.line);
                self.shade(row, p, weight, s);
            }
        }
        self.finish(k, s, hu, lesion, lung);
    }

    fn draw_spine(&self, plane: &Plane, out: &mut Buffers) {
        let pose = &self.anatomy.pose;
        // Where the spine passes through the (perhaps tilted) plane.
        let mut z = plane.origin[2] + 0.5 * plane.rows as f64 * plane.pitch * plane.down[2];
        let mut centre = [0.0; 3];
        for _ in 0..4 {
            let za = pose.undo([0.0, 0.0, z])[2];
            let (sx, sy) = self.anatomy.spine(za);
            centre = pose.apply([sx, sy, za]);
            z = plane.origin[2] + (centre[1] - plane.origin[1]) * plane.down[2] / plane.down[1];
        }
        let u = (centre[0] - plane.origin[0]) / plane.pitch;
        let v = (centre[1] - plane.origin[1]) / plane.down[1] / plane.pitch;
        let (rx, front, back) = SPINE_REACH;
        let clip = |x: f64, n: usize| x.clamp(0.0, n as f64) as usize;
        let (c0, c1) = (clip(u - rx / plane.pitch, plane.columns), clip(u + rx / plane.pitch, plane.columns));
        let (r0, r1) = (clip(v - front / plane.pitch, plane.rows), clip(v + back * 1.15 / plane.pitch, plane.rows));
        let inv_edge = 1.0 / self.edge;
        for r in r0..r1 {
            let p = add(plane.origin, scale(plane.down, r as f64 * plane.pitch));
            for c in c0..c1 {
                let q = pose.undo([p[0] + c as f64 * plane.pitch, p[1], p[2]]);
                let (d, part) = skeleton::spine(&self.anatomy, q);
                let i = r * plane.columns + c;
                match part {
                    SpinePart::Bone => out.bone[i] = out.bone[i].min(d as f32),
                    SpinePart::Disc => {
                        out.cartilage[i] = out.cartilage[i].max((0.5 - d as f32 * inv_edge).clamp(0.0, 1.0));
                    }
                    SpinePart::Canal => {}
                }
            }
        }
    }

    /// Adds one row of one plane, times `weight`, to the sums in `s`; `p` is the world position of its first pixel.
    fn shade(&self, row: usize, p: V3, weight: f32, s: &mut Scratch) {
        let nx = self.grid.n[0];
        let n = self.spec.columns;
        let at = row * n;
        let inv_edge = 1.0 / self.edge;
        let cover = |d: f32| (0.5 - d * inv_edge).clamp(0.0, 1.0);
        let mix = |a: f32, b: f32, w: f32| a + (b - a) * w;
        let line = &s.line;
        let pitch = self.spec.pixel_spacing_mm as f32;
        let (x0, y, z) = (p[0] as f32, p[1] as f32, p[2] as f32);
        let gravity = if self.acquisition.prone { -1.0f32 } else { 1.0 };
        let lung_base = self.anatomy.lung_hu as f32 + 0.30 * gravity * y;
        let trabecular = self.anatomy.bone_hu as f32;
        let table_near = self.table_near(y);
        let sick = self.sick;
        let bone = &s.buffers.bone[at..at + n];
        let cartilage = &s.buffers.cartilage[at..at + n];
        let vessel = &s.buffers.vessel[at..at + n];
        let wall = &s.buffers.wall[at..at + n];
        let lumen = &s.buffers.lumen[at..at + n];
        for c in 0..n {
            let (cell, f) = self.columns[c];
            let cell = cell as usize;
            let get = |k: usize| {
                let a = line[k * nx + cell];
                a + (line[k * nx + cell + 1] - a) * f
            };
            let body = get(field::BODY);
            let x = x0 + c as f32 * pitch;
            let mut hu = -1000.0;
            if body > 2.0 {
                if table_near {
                    hu = self.table(x, y);
                }
                s.hu[at + c] += weight * hu;
                continue;
            }
            let cage = get(field::CAGE);
            let lung = cage.max(-get(field::DOME)).max(get(field::INNER));
            let mut lung_part = 0.0;
            let (mut glass, mut solid, mut fluid) = (0.0, 0.0, 0.0);
            // Soft tissues, from the skin inwards; deep in the lung none of them shows.
            if lung > -1.5 {
                let coarse = self.texture.at(x * 0.16, y * 0.16, z * 0.12);
                let fine = self.texture.at(x * 0.5, y * 0.5, z * 0.35);
                let fat = -104.0 + 5.0 * coarse + 4.0 * fine;
                let mut tissue = fat;
                if body > -2.5 {
                    tissue = mix(tissue, 20.0, ((body + 2.2) * 0.9).clamp(0.0, 1.0));
                } else if cage > -2.0 {
                    // Muscle with streaks of fat between its bundles.
                    let streak = (1.1 * coarse + 0.9 * fine - 1.7).clamp(0.0, 0.8);
                    let muscle = cover(get(field::MUSCLE) + 0.9 * fine);
                    tissue = mix(tissue, 54.0 + 5.0 * fine - 110.0 * streak, muscle);
                }
                if cage < 2.0 {
                    let inside = cover(cage);
                    let dome = get(field::DOME);
                    let mut deep = fat + 4.0;
                    if dome < 4.0 {
                        // The diaphragm and what lies below it.
                        deep = mix(deep, 46.0, cover(dome.abs() - 1.6));
                        deep = mix(deep, 46.0, cover(-cage - 2.0) * cover(dome));
                        let liver = cover(get(field::LIVER));
                        deep = mix(deep, 58.0 + 3.0 * fine, liver);
                        deep = mix(deep, 49.0 + 2.5 * fine, cover(get(field::SPLEEN)));
                        let stomach = get(field::STOMACH);
                        if stomach < 2.0 {
                            let level = self.stomach_level();
                            let gas = cover((level - y) * -gravity);
                            deep = mix(deep, 42.0, cover(stomach));
                            let content = mix(22.0 + 16.0 * coarse, -985.0, gas);
                            deep = mix(deep, content, cover(stomach + 4.0));
                        }
                    }
                    let heart = get(field::HEART);
                    if heart < 2.0 {
                        deep = mix(deep, 43.0 + 3.0 * coarse, cover(heart));
                    }
                    tissue = mix(tissue, deep, inside);
                }
                hu = mix(hu, tissue, cover(body));
            }
            if lung < 1.5 {
                lung_part = cover(lung);
                let coarse = self.texture.at(x * 0.23, y * 0.23, z * 0.23);
                let fine = self.texture.at(x * 0.9, y * 0.9, z * 0.9);
                let mut air = lung_base + 9.0 * coarse + 12.0 * fine;
                let major = get(field::MAJOR);
                let mut fissure = (1.0 - major.abs() * 1.25).max(0.0);
                if major > 0.0 && x < -20.0 {
                    fissure = fissure.max(1.0 - get(field::MINOR).abs() * 1.25);
                }
                air += 75.0 * fissure;
                if sick {
                    let g = get(field::GGO);
                    let k = get(field::CONSOLIDATION);
                    if g > -0.6 {
                        let level = g + self.lesions.ragged * (0.75 * coarse + 0.3 * fine);
                        let t = ((level + 0.08) * 2.1).clamp(0.0, 1.0);
                        glass = t * t * (3.0 - 2.0 * t);
                        let mut add = self.lesions.ground_glass_hu + 14.0 * fine + 26.0 * coarse;
                        if let Some(septa) = &self.septa {
                            let m = SeptaTile::PER_MM;
                            let wx = x + 1.1 * coarse;
                            let wy = y + 1.1 * fine;
                            add += self.lesions.septa_hu * septa.at(wx * m, wy * m, z * m);
                        }
                        air += glass * add;
                    }
                    if k > -0.7 {
                        let level = k + self.lesions.ragged * (0.6 * coarse + 0.25 * fine);
                        let t = ((level + 0.05) * 3.4).clamp(0.0, 1.0);
                        solid = t * t * (3.0 - 2.0 * t);
                        air = mix(air, 36.0 + 9.0 * coarse, solid);
                    }
                    fluid = cover(get(field::EFFUSION)) * lung_part;
                    if fluid > 0.0 {
                        air = mix(air, 9.0 + 2.0 * coarse, fluid);
                    }
                }
                hu = mix(hu, air, lung_part);
            }
            let v = vessel[c];
            if v > 0.0 {
                hu = mix(hu, 42.0, v * (1.0 - fluid));
            }
            let w = wall[c];
            if w > 0.0 {
                hu = mix(hu, 30.0, w * (1.0 - fluid));
                hu = mix(hu, -992.0, lumen[c] * (1.0 - fluid));
            }
            if cartilage[c] > 0.0 {
                hu = mix(hu, 92.0, cartilage[c]);
            }
            let b = bone[c];
            if b < 2.0 {
                let cortex = ((b + 2.3) * 0.9).clamp(0.0, 1.0);
                let marrow = trabecular + 0.12 * trabecular * self.texture.at(x * 0.8, y * 0.8, z * 0.8);
                hu = mix(hu, mix(marrow, 560.0 + 0.6 * trabecular, cortex), cover(b));
            }
            let i = at + c;
            s.hu[i] += weight * hu;
            if lung_part > 0.0 {
                s.lung[i] += weight * lung_part * (1.0 - fluid);
                s.glass[i] += weight * lung_part * glass;
                s.solid[i] += weight * lung_part * solid;
                s.fluid[i] += weight * fluid;
            }
        }
    }

    fn stomach_level(&self) -> f32 {
        -0.25 * self.anatomy.half_depth as f32
    }

    /// Distance from the origin to the table top along gravity.
    fn table_top(&self) -> f32 {
        let a = &self.anatomy;
        let rest = if self.acquisition.prone {
            1.05 * a.half_depth + 30.0 + 1.2 * a.fat + if a.female { 18.0 } else { 0.0 }
        } else {
            a.rest_y() + 14.0
        };
        rest as f32
    }

    fn table_near(&self, y: f32) -> bool {
        let y = if self.acquisition.prone { -y } else { y };
        (self.table_top() - 70.0..self.table_top() + 50.0).contains(&y)
    }

    /// The table and its mattress: a curved carbon shell round foam.
    fn table(&self, x: f32, y: f32) -> f32 {
        let y = if self.acquisition.prone { -y } else { y };
        let top = self.table_top() - 0.0011 * x * x;
        let bottom = self.table_top() + 36.0 - 0.0019 * x * x;
        let inv_edge = 1.0 / self.edge;
        let cover = |d: f32| (0.5 - d * inv_edge).clamp(0.0, 1.0);
        let mut hu = -1000.0;
        let mattress = cover((y - top + 5.0).abs() - 4.0) * cover(x.abs() - 170.0);
        hu += 65.0 * mattress;
        let inside = cover(top - y).min(cover(y - bottom));
        hu += 60.0 * inside;
        let shell = cover((y - top).abs() - 0.9).max(cover((y - bottom).abs() - 0.9)) * cover(top - bottom);
        hu + 780.0 * shell
    }

    /// Noise, rounding and labels.
    fn finish(&self, k: usize, s: &mut Scratch, hu: &mut [i16], lesion: &mut [u8], lung: &mut [u8]) {
        let n = self.spec.columns;
        let sigma = self.spec.noise_hu as f32;
        let middle = self.frame.origin[2]
            + k as f64 * self.frame.step[2]
            + 0.5 * self.spec.rows as f64 * self.spec.pixel_spacing_mm * self.frame.down[2];
        let shoulders = smoothstep(0.74, 0.95, self.anatomy.t(middle)) as f32;
        let pitch = self.spec.pixel_spacing_mm as f32;
        for row in 0..self.spec.rows {
            self.noise.row(k, row, &mut s.noise, &mut s.streak);
            let y = (row as f32 - 0.5 * self.spec.rows as f32) * pitch;
            for c in 0..n {
                let i = row * n + c;
                let x = (c as f32 - 0.5 * n as f32) * pitch;
                // More photons are lost on the way through the middle, and across the shoulders.
                let centre = (1.0 - (x * x + 1.6 * y * y) * (1.0 / 32_000.0)).max(0.0);
                // Less of it shows in the air round the body.
                let air = if s.hu[i] < -940.0 { 0.5 } else { 1.0 };
                let gain = air * sigma * (0.72 + 0.5 * centre) * (1.0 + 0.7 * shoulders);
                let v = s.hu[i] + gain * (s.noise[c] + air * shoulders * (0.1 + 0.8 * centre) * s.streak[c]);
                // Rounding to nearest by truncation of a positive number.
                hu[i] = ((v + 2048.5).clamp(1024.0, 5119.0) as i32 - 2048) as i16;
                let inside = s.lung[i] > 0.5;
                let right = x < 0.0;
                lung[i] = if inside { if right { 1 } else { 2 } } else { 0 };
                lesion[i] = if s.fluid[i] > 0.5 {
                    3
                } else if inside && s.solid[i] > 0.5 {
                    2
                } else if inside && s.glass[i] > 0.3 {
                    1
                } else {
                    0
                };
            }
        }
    }
}

struct Trees {
    /// World coordinates.
    capsules: Vec<Capsule>,
    /// Random points of the lungs, anatomy coordinates.
    points: Vec<V3>,
    airways: Vec<(Lobe, Vec<Branch>)>,
}

/// Random points of the lungs, each with its lobe, not nearer to a border than `clear` millimetres.
fn scatter(seed: u64, purpose: u64, an: &Anatomy, count: usize, clear: f64) -> Vec<(Lobe, V3)> {
    const BATCH: usize = 4096;
    /// About a third of the box is lung; far more batches than that needs.
    const MAX_BATCHES: usize = 32;
    let mut d = Draw::new(seed, purpose);
    let mut out = Vec::with_capacity(count);
    for _ in 0..MAX_BATCHES {
        let candidates: Vec<V3> = (0..BATCH)
            .map(|_| {
                [
                    d.range(-an.half_width, an.half_width),
                    d.range(-1.05 * an.half_depth, 1.05 * an.half_depth),
                    d.range(an.z(0.0), an.z(1.0)),
                ]
            })
            .collect();
        let kept: Vec<Option<(Lobe, V3)>> = candidates
            .par_iter()
            .map(|p| {
                let (lobe, fissure) = an.lobe(*p);
                (fissure > 1.5 && an.lung(*p) < -clear).then_some((lobe, *p))
            })
            .collect();
        out.extend(kept.into_iter().flatten());
        if out.len() >= count {
            out.truncate(count);
            break;
        }
    }
    out
}

fn plant(seed: u64, an: &Anatomy) -> Trees {
    let (arterial, venous) =
        rayon::join(|| scatter(seed, 20, an, ARTERY_ENDS, 3.0), || scatter(seed, 21, an, VEIN_ENDS, 4.0));
    let grown: Vec<(Lobe, Vec<Branch>, Vec<Branch>)> = Lobe::ALL
        .into_par_iter()
        .map(|lobe| {
            let (bronchus, vein) = an.hilum(lobe);
            let of = |all: &[(Lobe, V3)]| all.iter().filter(|(l, _)| *l == lobe).map(|(_, p)| *p).collect::<Vec<V3>>();
            let mut d = Draw::new(seed, 22 + lobe as u64);
            let side = if matches!(lobe, Lobe::LeftUpper | Lobe::LeftLower) { 1.0 } else { -1.0 };
            let way = match lobe {
                Lobe::RightUpper | Lobe::LeftUpper => [side, 0.0, 0.5],
                Lobe::RightMiddle => [side, -0.8, -0.4],
                Lobe::RightLower | Lobe::LeftLower => [side * 0.4, 0.2, -1.0],
            };
            let (mut airways, mut veins) = (Vec::new(), Vec::new());
            tree::grow(bronchus, way, &mut of(&arterial), &mut d, &mut airways);
            tree::grow(vein, way, &mut of(&venous), &mut d, &mut veins);
            // Growth knows no walls: what strays through the heart, the chest wall or the diaphragm is not drawn. The
            // first branches run through the mediastinum and stay; the last ones end in the lung by construction.
            let strays = |b: &Branch| {
                let middle = scale(add(b.a, b.b), 0.5);
                b.leaves > 2 && (an.in_heart(middle) || (b.leaves < 120 && an.lung(middle) > 3.0))
            };
            airways.retain(|b| !strays(b));
            veins.retain(|b| !strays(b));
            (lobe, airways, veins)
        })
        .collect();

    let mut capsules = Vec::with_capacity(24_000);
    for (tube, kind) in &an.tubes {
        let kind = match kind {
            TubeKind::Vessel => Kind::Vessel,
            TubeKind::Airway => Kind::Airway,
            TubeKind::Gas => Kind::Gas,
        };
        capsules.push(Capsule::new(tube.a, tube.b, tube.ra, tube.rb, kind));
    }
    capsules.extend(skeleton::bones(an));
    let radius = Anatomy::vessel_radius;
    for (lobe, airways, veins) in &grown {
        // The artery runs beside its bronchus, on one side for a whole lobe.
        let beside = unit(match lobe {
            Lobe::RightUpper | Lobe::LeftUpper => [0.5, -0.6, 0.4],
            _ => [0.8 * if matches!(lobe, Lobe::LeftLower) { 1.0 } else { -1.0 }, -0.4, 0.2],
        });
        for b in airways {
            let (r0, r1) = (radius(b.leaves_before), radius(b.leaves));
            let lumen = |r: f64| (0.80 * r).min(4.6);
            if lumen(r1) > 0.5 {
                capsules.push(Capsule::new(b.a, b.b, lumen(r0), lumen(r1), Kind::Airway));
            }
            let direction = unit(sub(b.b, b.a));
            let across = unit(cross(direction, cross(beside, direction)));
            let shift = |r: f64| if lumen(r) > 0.5 { 1.05 * r + 1.3 * lumen(r) + 0.4 } else { 0.0 };
            capsules.push(Capsule::new(
                add(b.a, scale(across, shift(r0))),
                add(b.b, scale(across, shift(r1))),
                r0,
                r1,
                Kind::Vessel,
            ));
        }
        for b in veins {
            let (r0, r1) = (0.95 * radius(b.leaves_before), 0.95 * radius(b.leaves));
            capsules.push(Capsule::new(b.a, b.b, r0, r1, Kind::Vessel));
        }
    }
    let pose = an.pose;
    let capsules = capsules.into_iter().filter(|c| norm(sub(c.a, c.b)) > 1e-6);
    Trees {
        capsules: capsules.map(|c| c.mapped(|p| pose.apply(p), |v| pose.turn(v))).collect(),
        points: arterial.iter().map(|(_, p)| *p).collect(),
        airways: grown.into_iter().map(|(l, a, _)| (l, a)).collect(),
    }
}
