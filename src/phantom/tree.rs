//! Airway and vessel trees that fill a volume.
//!
//! A branch grows a fixed share of the way towards the centroid of the points it has to reach; the points are then
//! halved across their longest spread and each half gets a child (the volume-filling scheme of Tawhai et al., J Appl
//! Physiol 97:2310, 2004, with the splitting plane taken from the points). Radii follow the number of ends a branch
//! feeds. Pure and deterministic; recursion depth is bounded by the halving.

use super::math::{Draw, V3, add, cross, dot, norm, scale, sub, unit};

/// A straight piece of a tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Branch {
    pub(super) a: V3,
    pub(super) b: V3,
    /// Ends fed at the start (by the parent) and along this branch.
    pub(super) leaves_before: usize,
    pub(super) leaves: usize,
}

/// Share of the way to the centroid that a branch grows.
const SHARE: f64 = 0.42;
/// Largest angle between a branch and its parent: cosine of 65 degrees.
const MIN_COSINE: f64 = 0.42;

/// Grows a tree from `root` to all of `points` (reordered). Appends to `out`.
pub(super) fn grow(root: V3, direction: V3, points: &mut [V3], draw: &mut Draw, out: &mut Vec<Branch>) {
    let n = points.len();
    if n > 0 {
        branch(root, unit(direction), points, n, draw, out);
    }
}

fn branch(start: V3, parent: V3, points: &mut [V3], before: usize, draw: &mut Draw, out: &mut Vec<Branch>) {
    let n = points.len();
    if n == 1 {
        bend(start, points[0], before, 1, draw, out);
        return;
    }
    let mut centroid = [0.0; 3];
    for p in points.iter() {
        centroid = add(centroid, *p);
    }
    centroid = scale(centroid, 1.0 / n as f64);
    let way = sub(centroid, start);
    let length = (norm(way) * SHARE).max(1.2);
    // No sharp turns: lean the direction towards the parent's until the angle is allowed.
    let mut dir = unit(way);
    let mut lean = 0.0;
    while dot(dir, parent) < MIN_COSINE && lean < 1.0 {
        lean += 0.2;
        dir = unit(add(scale(unit(way), 1.0 - lean), scale(parent, lean)));
    }
    let end = add(start, scale(dir, length));
    bend(start, end, before, n, draw, out);

    let axis = spread(points, centroid, dir);
    // Split near the middle of the spread, a little off centre as in nature.
    points.sort_by(|p, q| dot(sub(*p, centroid), axis).total_cmp(&dot(sub(*q, centroid), axis)));
    let cut = ((n as f64 * draw.range(0.38, 0.62)) as usize).clamp(1, n - 1);
    let (left, right) = points.split_at_mut(cut);
    branch(end, dir, left, n, draw, out);
    branch(end, dir, right, n, draw, out);
}

/// The direction, across `dir`, along which the points are spread most (power iteration on their covariance).
fn spread(points: &[V3], centroid: V3, dir: V3) -> V3 {
    let mut m = [[0.0; 3]; 3];
    // A few hundred points tell the direction as well as thousands.
    let step = points.len() / 400 + 1;
    for p in points.iter().step_by(step) {
        let q = sub(*p, centroid);
        let q = sub(q, scale(dir, dot(q, dir)));
        for (i, row) in m.iter_mut().enumerate() {
            for (j, v) in row.iter_mut().enumerate() {
                *v += q[i] * q[j];
            }
        }
    }
    let helper = if dir[0].abs() < 0.7 { [1.0, 0.0, 0.0] } else { [0.0, 1.0, 0.0] };
    let mut v = add(unit(cross(dir, helper)), scale(cross(dir, unit(cross(dir, helper))), 0.618));
    for _ in 0..8 {
        v = unit([dot(m[0], v), dot(m[1], v), dot(m[2], v)]);
    }
    unit(sub(v, scale(dir, dot(v, dir))))
}

/// One branch as one or two pieces with a slight bend.
fn bend(a: V3, b: V3, before: usize, leaves: usize, draw: &mut Draw, out: &mut Vec<Branch>) {
    let length = norm(sub(b, a));
    if length < 1e-6 {
        return;
    }
    if length < 6.0 {
        out.push(Branch { a, b, leaves_before: before, leaves });
        return;
    }
    let side = scale(draw.direction(), length * 0.07);
    let middle = add(scale(add(a, b), 0.5), side);
    out.push(Branch { a, b: middle, leaves_before: before, leaves });
    out.push(Branch { a: middle, b, leaves_before: leaves, leaves });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_reaches_every_point_and_thins_out() {
        let mut draw = Draw::new(3, 3);
        let mut points: Vec<V3> =
            (0..200).map(|_| [draw.range(0.0, 50.0), draw.range(0.0, 60.0), draw.range(0.0, 70.0)]).collect();
        let targets = points.clone();
        let mut out = Vec::new();
        grow([-10.0, 30.0, 35.0], [1.0, 0.0, 0.0], &mut points, &mut draw, &mut out);
        for t in &targets {
            assert!(out.iter().any(|b| b.leaves == 1 && norm(sub(b.b, *t)) < 1e-9));
        }
        assert!(out.iter().all(|b| b.leaves <= b.leaves_before));
        assert_eq!(out.iter().map(|b| b.leaves).max(), Some(200));
    }
}
