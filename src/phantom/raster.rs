//! Capsules (tapered, optionally flattened) drawn into the buffers of one image plane with partial volume.
//!
//! Buffers combine by minimum or maximum, so the order of drawing does not matter.

use super::math::{V3, dot, sub};

/// Which buffer a capsule goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Vessel,
    /// Lumen of air in a wall.
    Airway,
    Bone,
    Cartilage,
    Gas,
}

/// A tapered capsule, world or anatomy coordinates.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capsule {
    pub(super) a: V3,
    pub(super) b: V3,
    ra: f32,
    rb: f32,
    normal: V3,
    /// Thickness along `normal` over width; 1 is round.
    flat: f32,
    kind: Kind,
}

impl Capsule {
    pub(super) fn new(a: V3, b: V3, ra: f64, rb: f64, kind: Kind) -> Self {
        Self { a, b, ra: ra as f32, rb: rb as f32, normal: [0.0, 1.0, 0.0], flat: 1.0, kind }
    }

    pub(super) fn flattened(mut self, normal: V3, flat: f64) -> Self {
        self.normal = normal;
        self.flat = flat.min(1.0) as f32;
        self
    }

    /// The same capsule moved: `point` maps positions, `turn` directions.
    pub(super) fn mapped(mut self, point: impl Fn(V3) -> V3, turn: impl Fn(V3) -> V3) -> Self {
        self.a = point(self.a);
        self.b = point(self.b);
        self.normal = turn(self.normal);
        self
    }

    /// Thickness of the wall of an airway.
    fn wall(&self, r: f32) -> f32 {
        match self.kind {
            Kind::Airway => 0.35 + 0.13 * r,
            Kind::Gas => 2.2,
            _ => 0.0,
        }
    }
}

/// An image plane: `origin` is the centre of pixel (0, 0), columns run along x, rows along `down`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plane {
    pub(super) origin: V3,
    pub(super) down: V3,
    pub(super) normal: V3,
    pub(super) pitch: f64,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Plane {
    /// In-plane x, in-plane y and height over the plane.
    fn frame(&self, p: V3) -> [f32; 3] {
        let q = sub(p, self.origin);
        [q[0] as f32, dot(q, self.down) as f32, dot(q, self.normal) as f32]
    }
}

/// What is drawn in one plane, one value a pixel.
pub(super) struct Buffers {
    /// Signed distance to bone.
    pub(super) bone: Vec<f32>,
    /// Coverages.
    pub(super) cartilage: Vec<f32>,
    pub(super) vessel: Vec<f32>,
    pub(super) wall: Vec<f32>,
    pub(super) lumen: Vec<f32>,
}

impl Buffers {
    /// Far from any bone.
    pub(super) const NO_BONE: f32 = 1.0e3;

    pub(super) fn new(pixels: usize) -> Self {
        let zero = || vec![0.0; pixels];
        Self { bone: vec![Self::NO_BONE; pixels], cartilage: zero(), vessel: zero(), wall: zero(), lumen: zero() }
    }

    pub(super) fn clear(&mut self) {
        self.bone.fill(Self::NO_BONE);
        for b in [&mut self.cartilage, &mut self.vessel, &mut self.wall, &mut self.lumen] {
            b.fill(0.0);
        }
    }
}

/// Draws `capsule`; edges are `edge` millimetres wide (the width of the point spread).
pub(super) fn draw(capsule: &Capsule, plane: &Plane, edge: f32, out: &mut Buffers) {
    let a = plane.frame(capsule.a);
    let b = plane.frame(capsule.b);
    let r_max = capsule.ra.max(capsule.rb);
    let reach = r_max + capsule.wall(r_max) + edge;
    if a[2].min(b[2]) > reach || a[2].max(b[2]) < -reach {
        return;
    }
    let axis = [b[0] - a[0], b[1] - a[1], b[2] - a[2]];
    // The part of the axis that can reach the plane.
    let (mut s0, mut s1) = (0.0f32, 1.0f32);
    if axis[2].abs() > 1e-6 {
        let (u, v) = ((-reach - a[2]) / axis[2], (reach - a[2]) / axis[2]);
        s0 = s0.max(u.min(v));
        s1 = s1.min(u.max(v));
    }
    let pitch = plane.pitch as f32;
    let span = |k: usize, n: usize| {
        let (p, q) = (a[k] + s0 * axis[k], a[k] + s1 * axis[k]);
        let low = ((p.min(q) - reach) / pitch + 1.0).max(0.0) as usize;
        let high = ((p.max(q) + reach) / pitch + 1.0).max(0.0) as usize;
        (low.min(n), high.min(n))
    };
    let (c0, c1) = span(0, plane.columns);
    let (r0, r1) = span(1, plane.rows);
    let inv_length2 = 1.0 / (axis[0] * axis[0] + axis[1] * axis[1] + axis[2] * axis[2]).max(1e-9);
    let normal = {
        let n = capsule.normal;
        [n[0] as f32, dot(n, plane.down) as f32, dot(n, plane.normal) as f32]
    };
    let flat = capsule.flat;
    let inv_flat2 = 1.0 / (flat * flat);
    let inv_edge = 1.0 / edge;
    // A vessel thinner than the point spread keeps its cross-section, not its contrast.
    let contrast = |r: f32| (4.0 * r * r * inv_edge * inv_edge).min(1.0);
    for r in r0..r1 {
        let y = r as f32 * pitch - a[1];
        for c in c0..c1 {
            let x = c as f32 * pitch - a[0];
            let s = ((x * axis[0] + y * axis[1] - a[2] * axis[2]) * inv_length2).clamp(0.0, 1.0);
            let d = [x - s * axis[0], y - s * axis[1], -a[2] - s * axis[2]];
            let radius = capsule.ra + (capsule.rb - capsule.ra) * s;
            let d2 = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
            let limit = radius + reach - r_max;
            if d2 > limit * limit {
                continue;
            }
            let surface = if flat < 0.999 {
                let n = d[0] * normal[0] + d[1] * normal[1] + d[2] * normal[2];
                let across = (d2 - n * n).max(0.0);
                let length = (n * n * inv_flat2 + across).sqrt();
                let slope = (n * n * inv_flat2 * inv_flat2 + across).sqrt().max(1e-3);
                (length - radius) * length.max(0.3 * radius) / slope
            } else {
                d2.sqrt() - radius
            };
            let i = r * plane.columns + c;
            let cover = |distance: f32| (0.5 - distance * inv_edge).clamp(0.0, 1.0);
            match capsule.kind {
                Kind::Bone => out.bone[i] = out.bone[i].min(surface),
                Kind::Cartilage => out.cartilage[i] = out.cartilage[i].max(cover(surface)),
                Kind::Vessel => out.vessel[i] = out.vessel[i].max(cover(surface) * contrast(radius)),
                Kind::Airway | Kind::Gas => {
                    let wall = capsule.wall(radius);
                    out.lumen[i] = out.lumen[i].max(cover(surface) * contrast(radius));
                    out.wall[i] = out.wall[i].max(cover(surface - wall) * contrast(radius + wall) * 0.95);
                }
            }
        }
    }
}
