//! Bones: ribs, sternum, shoulder girdle as chains of flattened capsules; the spine as a formula.

use super::anatomy::Anatomy;
use super::math::{V3, add, cross, lerp, norm, scale, sin_cos, smoothstep, sub, unit};
use super::raster::{Capsule, Kind};

/// Bone of round or flattened section between two points; `flat` is the thickness along `normal` over the width.
fn bone(a: V3, b: V3, width: f64, flat: f64, normal: V3, kind: Kind) -> Capsule {
    Capsule::new(a, b, width, width, kind).flattened(normal, flat)
}

/// All bones but the spine, in anatomy coordinates.
pub(super) fn bones(anatomy: &Anatomy) -> Vec<Capsule> {
    let mut out = Vec::with_capacity(1600);
    for i in 1..=12 {
        for side in [-1.0, 1.0] {
            rib(anatomy, i, side, &mut out);
        }
    }
    sternum(anatomy, &mut out);
    for side in [-1.0, 1.0] {
        shoulder(anatomy, side, &mut out);
    }
    out
}

/// Fall of each rib from its head to its front end, in 250ths of the lung height; where its bone ends (degrees from
/// the spine, round the side); whether cartilage joins it to the sternum.
const RIBS: [(f64, f64, bool); 12] = [
    (26.0, 150.0, true),
    (46.0, 152.0, true),
    (60.0, 153.0, true),
    (71.0, 152.0, true),
    (80.0, 150.0, true),
    (86.0, 147.0, true),
    (90.0, 141.0, true),
    (92.0, 132.0, true),
    (90.0, 122.0, true),
    (84.0, 110.0, true),
    (62.0, 78.0, false),
    (34.0, 50.0, false),
];

fn rib(an: &Anatomy, i: usize, side: f64, out: &mut Vec<Capsule>) {
    let (fall, end_deg, joined) = RIBS[i - 1];
    let fall = fall * an.height / 250.0;
    let head_z = an.vertebra_z(i as f64) + 6.0;
    let (sx, sy) = an.spine(head_z);
    // Height along the rib: level at the head, steepest at the side, flatter in front.
    let drop = |deg: f64| fall * (0.25 * (deg / 150.0) + 0.75 * smoothstep(10.0, 140.0, deg));
    let point = |deg: f64| {
        let (s, c) = sin_cos(deg.to_radians());
        let z = head_z - drop(deg);
        an.cage_radius(z, (side * s, c), 5.0)
    };
    let head = [sx + side * 17.0, sy + 9.0, head_z];
    let neck = [sx + side * 34.0, sy + 20.0, head_z - 1.0];
    out.push(Capsule::new(head, neck, 4.6, 4.6, Kind::Bone));
    const STEP_DEG: f64 = 6.0;
    let first = 24.0;
    let mut previous = neck;
    let steps = ((end_deg - first) / STEP_DEG) as usize;
    for k in 0..=steps {
        let deg = first + (end_deg - first) * k as f64 / steps as f64;
        let q = point(deg);
        let normal = an.cage_normal(q);
        let width = 5.6 + 0.8 * smoothstep(90.0, 150.0, deg) - if i == 12 { 1.5 } else { 0.0 };
        out.push(bone(previous, q, width, 0.62, normal, Kind::Bone));
        previous = q;
    }
    if joined {
        // Cartilage: towards the sternum and upwards from the fifth rib on; ribs 8 to 10 join their neighbour.
        let rise = [2.0, 0.0, 4.0, 12.0, 24.0, 38.0, 52.0, 44.0, 38.0, 32.0][i - 1] * an.height / 250.0;
        let stop = if i <= 7 { 172.0 } else { end_deg + 17.0 };
        let base = head_z - drop(end_deg);
        let n = 5;
        for k in 1..=n {
            let u = k as f64 / n as f64;
            let (s, c) = sin_cos(lerp(end_deg, stop, u).to_radians());
            let z = base + rise * u * u;
            let q = an.cage_radius(z, (side * s, c), 4.5);
            let normal = an.cage_normal(q);
            out.push(bone(previous, q, 6.0, 0.7, normal, Kind::Cartilage));
            previous = q;
        }
    }
}

fn sternum(an: &Anatomy, out: &mut Vec<Capsule>) {
    let at = |t: f64, x: f64| {
        let z = an.z(t);
        [x, an.front_y(z) - 3.5, z]
    };
    let plate = |t0: f64, t1: f64, half: f64, out: &mut Vec<Capsule>| {
        let pieces = 6;
        for k in 0..pieces {
            let (u, v) = (lerp(t0, t1, k as f64 / pieces as f64), lerp(t0, t1, (k + 1) as f64 / pieces as f64));
            for x in [-0.5, 0.0, 0.5] {
                out.push(bone(
                    at(u, x * half),
                    at(v, x * half),
                    half * 0.55,
                    5.2 / (half * 0.55),
                    [0.0, 1.0, 0.0],
                    Kind::Bone,
                ));
            }
        }
    };
    plate(0.40, 0.685, 15.0, out);
    plate(0.70, 0.80, 24.0, out);
    out.push(bone(at(0.40, 0.0), at(0.33, 0.0), 5.0, 0.6, [0.0, 1.0, 0.0], Kind::Cartilage));
}

fn shoulder(an: &Anatomy, side: f64, out: &mut Vec<Capsule>) {
    let w = an.half_width;
    // Clavicle.
    let z0 = an.z(0.81);
    let points = [
        [side * 21.0, an.front_y(z0) - 6.0, z0],
        [side * 0.45 * w, an.front_y(an.z(0.9)) + 2.0, an.z(0.89)],
        [side * 0.80 * w, an.y(0.35, an.z(0.95)), an.z(0.98)],
        [side * 1.08 * w, an.y(0.55, an.z(0.98)), an.z(1.04)],
    ];
    for pair in points.windows(2) {
        out.push(Capsule::new(pair[0], pair[1], 6.2, 5.6, Kind::Bone));
    }
    // Humeral head and the start of the raised shaft.
    let head = [side * 1.28 * w, an.y(0.62, an.z(0.98)), an.z(1.03)];
    out.push(Capsule::new(head, add(head, [side * 2.0, 0.0, 6.0]), 23.0, 21.0, Kind::Bone));
    out.push(Capsule::new(head, add(head, [side * 30.0, -5.0, 75.0]), 13.0, 12.0, Kind::Bone));
    // Scapula: a thin plate that rides on the cage, thick at its lateral border, with its spine behind.
    let plate = |u: f64, v: f64| {
        // u from the medial to the lateral border, v from the lower angle to the upper border.
        let z = an.z(lerp(0.56, 0.97, v));
        let medial = lerp(62.0, 46.0, v);
        let lateral = lerp(65.0, 88.0, v);
        let (s, c) = sin_cos(lerp(medial, lateral, u).to_radians());
        let reference = an.z(lerp(0.56, 0.86, v));
        let q = an.cage_radius(reference, (side * s, c), 19.0 + 7.0 * u);
        [q[0], q[1], z]
    };
    const NU: usize = 7;
    const NV: usize = 15;
    for iv in 0..NV {
        for iu in 0..NU {
            let (u, v) = (iu as f64 / NU as f64, iv as f64 / NV as f64);
            let a = plate(u, v);
            let normal = unit(cross(sub(plate(u, v + 0.05), a), sub(plate(u + 0.05, v), a)));
            let across = norm(sub(plate(u, v + 1.0 / NV as f64), a));
            let thick = 2.0 + 3.2 * smoothstep(0.6, 1.0, u) + 1.0 * smoothstep(0.15, 0.0, u);
            let width = (0.75 * across).max(thick);
            out.push(bone(a, plate(u + 1.0 / NU as f64, v), width, thick / width, normal, Kind::Bone));
        }
    }
    // Spine of the scapula, out to the acromion; glenoid.
    let mut previous = plate(0.05, 0.80);
    for k in 1..=6 {
        let u = k as f64 / 6.0;
        let base = plate(0.05 + 0.95 * u, lerp(0.80, 0.95, u));
        let q = add(base, scale(an.cage_normal([base[0], base[1], an.z(0.8)]), 20.0 * u));
        out.push(Capsule::new(previous, q, 3.2 + 2.0 * u, 3.6 + 2.0 * u, Kind::Bone));
        previous = q;
    }
    let glenoid = plate(1.0, 0.92);
    out.push(Capsule::new(plate(0.9, 0.9), add(glenoid, [side * 6.0, -4.0, 6.0]), 7.0, 10.0, Kind::Bone));
}

/// What fills a point of the spine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SpinePart {
    Bone,
    Disc,
    Canal,
}

/// Reach of the spine round the centre of a vertebral body: `(x, y front, y back)`.
pub(super) const SPINE_REACH: (f64, f64, f64) = (48.0, 24.0, 66.0);

fn segment(x: f64, y: f64, a: (f64, f64), b: (f64, f64), r: f64) -> f64 {
    let (ax, ay) = (b.0 - a.0, b.1 - a.1);
    let s = (((x - a.0) * ax + (y - a.1) * ay) / (ax * ax + ay * ay)).clamp(0.0, 1.0);
    let (dx, dy) = (x - a.0 - s * ax, y - a.1 - s * ay);
    (dx * dx + dy * dy).sqrt() - r
}

/// The distance `d` of a prism, limited in height: `beyond` is how far the point lies above or below it.
fn limited(d: f64, beyond: f64) -> f64 {
    if beyond > 0.0 { (d.max(0.0) * d.max(0.0) + beyond * beyond).sqrt() } else { d }
}

/// Signed distance and part at a point of the spine's neighbourhood (anatomy coordinates).
pub(super) fn spine(an: &Anatomy, p: V3) -> (f64, SpinePart) {
    let (sx, sy) = an.spine(p[2]);
    let number = an.vertebra_at(p[2]);
    let nearest = (number + 64.5) as i64 - 64;
    let pitch = an.vertebra_z(1.0) - an.vertebra_z(2.0);
    let dz = p[2] - an.vertebra_z(nearest as f64);
    let grown = 0.78 + 0.022 * (nearest as f64).clamp(0.0, 14.0);
    let (x, y) = ((p[0] - sx).abs(), p[1] - sy);
    let half = 0.5 * pitch - (1.6 + 0.13 * (nearest as f64).clamp(0.0, 14.0));
    let waist = 1.0 - 0.09 * (1.0 - (dz / half) * (dz / half)).max(0.0);
    let (rx, ry) = (18.0 * grown * waist, 15.0 * grown * waist);
    let canal_y = 15.0 * grown + 8.0;
    let canal = (x * x / 1.25 + (y - canal_y) * (y - canal_y)).sqrt() - 8.2;
    let (u, v) = (x / rx, y / ry);
    let k0 = (u * u + v * v).sqrt();
    let k1 = ((u / rx) * (u / rx) + (v / ry) * (v / ry)).sqrt().max(1e-6);
    let mut round = k0 * (k0 - 1.0) / k1;
    // The back of the body is flat or slightly hollow.
    round = round.max(y - (15.0 * grown - 1.5) + 0.01 * (x - 12.0).min(0.0) * x);
    let end = dz.abs() - half;
    let body = round.max(end);
    let mut bone = body;
    // Arch: pedicles in the upper half, laminae, transverse and spinous processes.
    let upper = ((dz - 4.0).abs() - 6.5).max(0.0);
    let pedicle = segment(x, y, (10.0, 12.0 * grown), (12.5, canal_y + 2.0), 3.6);
    let transverse = segment(x, y, (13.0, canal_y + 3.0), (28.0, canal_y + 12.0), 4.0);
    bone = bone.min(limited(pedicle, upper));
    bone = bone.min(limited(transverse, upper));
    let lamina = segment(x, y, (13.0, canal_y + 4.0), (1.0, canal_y + 13.0), 3.4);
    let low = (dz.abs() - 9.0).max(0.0);
    bone = bone.min(limited(lamina, low));
    // Spinous processes slope down; a point sees the process of the vertebra whose slope passes through it.
    let back = (y - canal_y - 12.0).max(0.0);
    let along = an.vertebra_at(p[2] + 0.75 * back);
    let around = (along - ((along + 64.5) as i64 - 64) as f64).abs() * pitch;
    let spinous = segment(x, y, (0.0, canal_y + 12.0), (0.0, canal_y + 31.0), 2.8 + 1.4 * smoothstep(20.0, 36.0, back));
    let sp = (around - 5.5).max(0.0);
    bone = bone.min(limited(spinous, sp));
    if canal < 0.0 && body > 0.0 {
        return (canal, SpinePart::Canal);
    }
    if round < 0.0 && end > -0.3 && bone > -0.3 {
        return (round, SpinePart::Disc);
    }
    (bone, SpinePart::Bone)
}
