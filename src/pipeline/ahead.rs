//! What can be computed while slices still arrive: the guess of how a series will end, and the planes that are final if
//! it holds. Pure: no pixels, no clock, no threads.
//!
//! Input: where the slices lie that are there, in what order they came, and how many there will be if anybody said so.
//! Output: the place of each in the finished stack, the depth plan of that stack, and which planes it makes of slices
//! that are there already. Invariant: if the finished stack is even ([`crate::resample::plan`]) and its slices lie where
//! the guess says, the plan has the weights of the final one, to the bit. A wrong guess costs time and nothing else: what
//! was computed is compared with the final input before it is used.
//!
//! What is guessed:
//! - the steps are equal, and a hole between two slices is made of slices still to come;
//! - a count tells how many slices are missing in all, and the order of arrival at which end: a series comes from one
//!   end, so as long as places rise (or fall) with time, everything missing lies ahead;
//! - a fixed grid needs no count when its first slice is the first to come.
//!
//! Deliberately absent: tilted and uneven series, whose in-plane offsets or weights depend on slices still to come.

use crate::model::manifest::{DepthGrid, SliceDirection};
use crate::resample::plan::{DepthPlan, even_tolerance_mm};

/// Correlation of place and time from which a series counts as coming from one end. A monotone one has 1; four
/// associations that share it evenly stay above 0.9 after ten slices; a shuffled one of 20 slices reaches 0.5 in 2 % of
/// cases.
pub const MIN_TREND: f64 = 0.5;
/// Gaps below this many times the smallest are taken as one step.
const ONE_STEP: f64 = 1.5;
/// Slices of an unknown rest that are assumed beyond those there: what the filter of a fixed grid reaches, and two more,
/// so that no plane is taken for one at the end.
const BEYOND: usize = 2;
/// Most of that rest: a fixed pitch of a hundred slice distances skips what lies between.
const MAX_REST: f64 = 100.0;

/// How planes are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Fitted or fixed.
    pub depth_grid: DepthGrid,
    /// Which end is plane 0.
    pub direction: SliceDirection,
    /// Number of planes.
    pub planes: usize,
}

/// What is expected of the finished stack. As long as it stays the same, work done for an earlier prediction of the
/// series is of use for a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guess {
    /// Slices of the finished stack; `None` when nobody said and a fixed grid does without.
    pub slices: Option<usize>,
    /// Places of the two slices that came first, counted from the feet, or from plane 0's end when `slices` is `None`.
    /// One tells where the stack begins, both how long a step is.
    pub anchors: [usize; 2],
}

/// A guess with what follows from it.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// The guess.
    pub guess: Guess,
    /// Place in the finished stack, feet first, of each slice that is there.
    pub place: Vec<usize>,
    /// The plan of the finished stack; when its length is not known, of as much of it as matters so far.
    pub depth: DepthPlan,
    /// Slices on either side of a plane's own that its weights depend on: the widths of cells do, unless all are equal.
    beside: usize,
}

impl Prediction {
    /// Which planes are made of slices that are there, `held` saying which of them (in depth order) have their in-plane
    /// result at hand.
    ///
    /// # Panics
    /// When `held` has another length than there are slices.
    pub fn ready(&self, held: &[bool]) -> Vec<bool> {
        assert_eq!(held.len(), self.place.len(), "one flag a slice");
        let slices = self.depth.slices();
        let mut there = vec![false; slices];
        for (place, held) in self.place.iter().zip(held) {
            there[*place] = *held;
        }
        let plane = |p| {
            let (own, _) = self.depth.plane_weights(p);
            let (Some(first), Some(last)) = (own.first(), own.last()) else {
                // A plane beyond the scan is final once it is known where the scan ends.
                return self.guess.slices.is_some();
            };
            let from = (*first as usize).saturating_sub(self.beside);
            let to = (*last as usize + self.beside).min(slices - 1);
            there[from..=to].iter().all(|t| *t)
        };
        (0..self.depth.planes()).map(plane).collect()
    }
}

/// Correlation of two series of numbers, -1 to 1; 0 when one of them does not vary.
fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len() as f64;
    let (mean_a, mean_b) = (a.iter().sum::<f64>() / n, b.iter().sum::<f64>() / n);
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        let (x, y) = (x - mean_a, y - mean_b);
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    if aa > 0.0 && bb > 0.0 { ab / (aa * bb).sqrt() } else { 0.0 }
}

/// Places of slices on a grid of equal steps, the first at 0, and the step; `None` when they lie on none.
fn on_grid(depth_mm: &[f64], out_d: usize, slices: Option<usize>) -> Option<(Vec<usize>, f64)> {
    let gaps: Vec<f64> = depth_mm.windows(2).map(|p| p[1] - p[0]).collect();
    let smallest = gaps.iter().copied().fold(f64::INFINITY, f64::min);
    if !(smallest.is_finite() && smallest > 0.0) {
        return None;
    }
    // Positions are rounded, so the smallest gap alone is a poor step: the mean of all single ones is near it.
    let single: Vec<f64> = gaps.iter().copied().filter(|g| *g < ONE_STEP * smallest).collect();
    let step = single.iter().sum::<f64>() / single.len() as f64;
    let mut place = Vec::with_capacity(depth_mm.len());
    let mut at = 0usize;
    place.push(at);
    for gap in &gaps {
        at += ((gap / step).round() as usize).max(1);
        place.push(at);
    }
    let step = (depth_mm[depth_mm.len() - 1] - depth_mm[0]) / at as f64;
    let tolerance = even_tolerance_mm(step, slices.unwrap_or(at + 1), out_d);
    let fits = |(p, d): (&usize, &f64)| (d - depth_mm[0] - *p as f64 * step).abs() <= tolerance;
    place.iter().zip(depth_mm).all(fits).then_some((place, step))
}

/// Guesses the finished stack.
///
/// `depth_mm` are the positions of the slices that are there, feet to head; `arrival` gives for each of them a number
/// that rises in the order of arrival; `count` is how many the finished stack is said to have. `None` when nothing can be
/// said: fewer than two slices, uneven ones, more than `count`, or no hint at which end more will come.
///
/// # Panics
/// When the lengths differ.
pub fn predict(depth_mm: &[f64], arrival: &[u64], count: Option<usize>, grid: Grid) -> Option<Prediction> {
    assert_eq!(depth_mm.len(), arrival.len(), "one arrival a slice");
    if depth_mm.len() < 2 {
        return None;
    }
    let (place, step) = on_grid(depth_mm, grid.planes, count)?;
    let span = place.last()? + 1;
    let trend = correlation(
        &place.iter().map(|p| *p as f64).collect::<Vec<_>>(),
        &arrival.iter().map(|a| *a as f64).collect::<Vec<_>>(),
    );
    let (rises, falls) = (trend >= MIN_TREND, trend <= -MIN_TREND);
    // Slices of the finished stack, and how many of them are missing at the feet.
    let (slices, before) = match (count, grid.depth_grid) {
        (Some(slices), _) if span > slices => return None,
        (Some(slices), _) if span == slices || rises => (slices, 0),
        (Some(slices), _) if falls => (slices, slices - span),
        (Some(_), _) | (None, DepthGrid::Fit) => return None,
        (None, DepthGrid::FixedMm(pitch)) => {
            let rest = (pitch / step).ceil().min(MAX_REST) as usize + BEYOND;
            match grid.direction {
                SliceDirection::FeetToHead if rises => (span + rest, 0),
                SliceDirection::HeadToFeet if falls => (span + rest, rest),
                _ => return None,
            }
        }
    };
    let place: Vec<usize> = place.into_iter().map(|p| p + before).collect();
    let mut by_arrival: Vec<usize> = (0..arrival.len()).collect();
    by_arrival.sort_by_key(|i| arrival[*i]);
    let from_head = count.is_none() && grid.direction == SliceDirection::HeadToFeet;
    let anchor = |i: usize| if from_head { slices - 1 - place[i] } else { place[i] };
    let guess = Guess { slices: count, anchors: [anchor(by_arrival[0]), anchor(by_arrival[1])] };
    let mut positions: Vec<f64> = (0..slices).map(|i| depth_mm[0] + (i as f64 - before as f64) * step).collect();
    for (place, depth) in place.iter().zip(depth_mm) {
        positions[*place] = *depth;
    }
    let depth = DepthPlan::new(&positions, grid.depth_grid, grid.direction, grid.planes).ok()?;
    let beside = usize::from(grid.depth_grid != DepthGrid::Fit);
    Some(Prediction { guess, place, depth, beside })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::volume::geometry::{GeometryLimits, SliceGeometry, build_stack};

    const FIT: Grid = Grid { depth_grid: DepthGrid::Fit, direction: SliceDirection::FeetToHead, planes: 64 };

    /// Depths of slices at `z`, feet to head, and the index of each in `z`, as the geometry gives them.
    fn stacked(z: &[f64]) -> (Vec<f64>, Vec<usize>) {
        let slices: Vec<SliceGeometry> = z
            .iter()
            .map(|z| SliceGeometry {
                rows: 512,
                columns: 512,
                pixel_spacing_mm: [0.7, 0.7],
                position_mm: [-180.3, -171.7, *z],
                row_cosines: [1.0, 0.0, 0.0],
                column_cosines: [0.0, 1.0, 0.0],
            })
            .collect();
        let limits = GeometryLimits {
            min_slices: 2,
            gap_factor: f64::INFINITY,
            max_spacing_mm: f64::INFINITY,
            ..GeometryLimits::default()
        };
        let stack = build_stack(&slices, &limits).unwrap();
        (stack.depth_mm, stack.order.iter().map(|i| *i as usize).collect())
    }

    /// A uniform series as a scanner writes it: decimals, rounded to `digits`.
    fn series(n: usize, start: f64, step: f64, digits: usize) -> Vec<f64> {
        (0..n).map(|i| format!("{:.digits$}", start + i as f64 * step).parse().unwrap()).collect()
    }

    /// Weights of every plane, with each slice by its place.
    fn same_weights(a: &DepthPlan, b: &DepthPlan, planes: &[bool]) -> bool {
        planes.iter().enumerate().filter(|(_, r)| **r).all(|(p, _)| a.plane_weights(p) == b.plane_weights(p))
    }

    /// What is predicted of the first `k` slices of `arriving`.
    fn after(arriving: &[f64], k: usize, count: Option<usize>, grid: Grid) -> Option<Prediction> {
        let (depth, order) = stacked(&arriving[..k]);
        let arrival: Vec<u64> = order.iter().map(|i| *i as u64).collect();
        predict(&depth, &arrival, count, grid)
    }

    fn final_plan(z: &[f64], grid: Grid) -> DepthPlan {
        DepthPlan::new(&stacked(z).0, grid.depth_grid, grid.direction, grid.planes).unwrap()
    }

    fn grids() -> impl Strategy<Value = Grid> {
        (prop::option::of(0.5f64..6.0), any::<bool>(), 4usize..80).prop_map(|(fixed, down, planes)| Grid {
            depth_grid: fixed.map_or(DepthGrid::Fit, DepthGrid::FixedMm),
            direction: if down { SliceDirection::HeadToFeet } else { SliceDirection::FeetToHead },
            planes,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

        #[test]
        fn a_uniform_series_from_one_end_is_predicted_to_the_bit(
            n in 20usize..400, start in -900.0f64..500.0, step_um in 250u32..8000, grid in grids(), down in any::<bool>(),
            part in 0.05f64..1.0,
        ) {
            let mut z = series(n, (start * 1000.0).round() / 1000.0, f64::from(step_um) / 1000.0, 3);
            let expected = final_plan(&z, grid);
            if down {
                z.reverse();
            }
            let k = ((part * n as f64) as usize).max(2);
            let p = after(&z, k, Some(n), grid).expect("predicted");
            prop_assert_eq!(p.guess, Guess { slices: Some(n), anchors: if down { [n - 1, n - 2] } else { [0, 1] } });
            let place: Vec<usize> = if down { (n - k..n).collect() } else { (0..k).collect() };
            prop_assert_eq!(&p.place, &place);
            prop_assert!(same_weights(&p.depth, &expected, &p.ready(&vec![true; k])));
            if grid.depth_grid == DepthGrid::Fit {
                prop_assert!(same_weights(&p.depth, &expected, &vec![true; grid.planes]), "the whole plan");
            }
        }

        #[test]
        fn a_fixed_grid_needs_no_count_from_its_first_end(
            n in 20usize..300, start in -900.0f64..500.0, step in 0.3f64..5.0, pitch in 0.5f64..6.0, down in any::<bool>(),
            digits in 3usize..8, part in 0.1f64..1.0,
        ) {
            let direction = if down { SliceDirection::HeadToFeet } else { SliceDirection::FeetToHead };
            let grid = Grid { depth_grid: DepthGrid::FixedMm(pitch), direction, planes: 64 };
            let mut z = series(n, start, step, digits);
            let expected = final_plan(&z, grid);
            if down {
                z.reverse();
            }
            let k = ((part * n as f64) as usize).max(2);
            let p = after(&z, k, None, grid).expect("predicted");
            let ready = p.ready(&vec![true; k]);
            prop_assert_eq!(p.guess, Guess { slices: None, anchors: [0, 1] });
            for plane in (0..64).filter(|plane| ready[*plane]) {
                let (slices, weights) = p.depth.plane_weights(plane);
                let (real, real_weights) = expected.plane_weights(plane);
                // How much is missing at the feet is not known: compare from the end that is there.
                let (assumed, total) = if down { (p.depth.slices(), n) } else { (0, 0) };
                let a: Vec<usize> = slices.iter().map(|s| assumed.abs_diff(*s as usize)).collect();
                let b: Vec<usize> = real.iter().map(|s| total.abs_diff(*s as usize)).collect();
                prop_assert_eq!(a, b);
                prop_assert_eq!(weights, real_weights);
            }
        }

        #[test]
        fn any_order_is_survived_and_the_last_slice_settles_it(
            n in 20usize..200, step_um in 300u32..5000, seed in any::<u64>(), grid in grids(),
        ) {
            let z = series(n, -512.7, f64::from(step_um) / 1000.0, 3);
            let expected = final_plan(&z, grid);
            let mut mixed = z.clone();
            let mut state = seed | 1;
            for i in (1..n).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                mixed.swap(i, (state >> 33) as usize % (i + 1));
            }
            for k in [2, n / 3, n / 2, n - 1] {
                let _ = after(&mixed, k, Some(n), grid);
                prop_assert!(after(&mixed, k, Some(1), grid).is_none(), "more than there should be");
            }
            let p = after(&mixed, n, Some(n), grid).expect("all are there");
            prop_assert!(same_weights(&p.depth, &expected, &vec![true; grid.planes]));
            prop_assert!(p.ready(&vec![true; n]).iter().all(|r| *r));
        }
    }

    #[test]
    fn positions_as_scanners_write_them_are_predicted_whole() {
        for (n, start, step, digits) in [
            (300, -102.7, 1.25, 2),
            (450, -333.1, 0.7, 1),
            (480, -1024.55, 0.625, 1), // rounded by half a decimal: 0.6 and 0.7 in turn
            (600, 12.3, 2.0 / 3.0, 3),
            (400, -0.05, 0.703125, 6),
        ] {
            let z = series(n, start, step, digits);
            let expected = final_plan(&z, FIT);
            for k in [30, n / 2, n - 1] {
                let p = after(&z, k, Some(n), FIT).unwrap_or_else(|| panic!("{n} x {step}: {k} slices"));
                assert!(same_weights(&p.depth, &expected, &[true; 64]), "{n} x {step}: {k} slices");
            }
        }
    }

    #[test]
    fn slices_of_several_associations_are_placed_with_holes_between() {
        // Four associations that share a series, each a little ahead of or behind the others.
        let z = series(120, -200.0, 2.5, 1);
        let mut arriving: Vec<f64> = z.chunks(4).flat_map(|c| [c[2], c[0], c[3], c[1]]).collect();
        let p = after(&arriving, 41, Some(120), FIT).unwrap();
        assert_eq!(p.guess, Guess { slices: Some(120), anchors: [2, 0] });
        let ready = p.ready(&[true; 41]);
        assert_eq!(ready.iter().filter(|r| **r).count(), ready.iter().take_while(|r| **r).count());
        assert!(ready.iter().filter(|r| **r).count() > 18);
        arriving.reverse();
        let p = after(&arriving, 41, Some(120), FIT).unwrap();
        assert_eq!(p.place.last(), Some(&119));
        // A slice whose in-plane result is not at hand keeps its planes back.
        let none = p.ready(&[false; 41]);
        assert!(none.iter().all(|r| !*r));
    }

    #[test]
    fn nothing_is_said_without_grounds() {
        let z = series(60, 0.0, 2.0, 1);
        assert!(after(&z, 40, None, FIT).is_none(), "no count");
        assert!(after(&z, 40, Some(39), FIT).is_none(), "more than the count");
        let fixed = Grid { depth_grid: DepthGrid::FixedMm(4.0), ..FIT };
        assert!(after(&z, 40, None, fixed).is_some());
        let down = Grid { direction: SliceDirection::HeadToFeet, ..fixed };
        assert!(after(&z, 40, None, down).is_none(), "the grid starts at the other end");
        let outwards: Vec<f64> = (0..30).flat_map(|i| [z[30 + i], z[29 - i]]).collect();
        assert!(after(&outwards, 40, Some(60), FIT).is_none(), "from the middle outwards");
        let uneven: Vec<f64> = (0..60).map(|i| f64::from(i) * 2.0 + f64::from(i % 3) * 0.3).collect();
        assert!(after(&uneven, 40, Some(60), FIT).is_none());
        assert!(predict(&[0.0], &[0], Some(3), FIT).is_none());
    }

    #[test]
    fn another_count_or_a_slice_before_the_first_changes_the_guess() {
        let z = series(60, 0.0, 2.0, 1);
        let guess = |k, count| after(&z, k, count, FIT).unwrap().guess;
        assert_eq!(guess(50, Some(60)), guess(30, Some(60)));
        assert_ne!(guess(50, Some(61)), guess(30, Some(60)));
        let fixed = Grid { depth_grid: DepthGrid::FixedMm(4.0), ..FIT };
        let open = |z: &[f64], k| after(z, k, None, fixed).unwrap().guess;
        assert_eq!(open(&z, 50), open(&z, 30));
        let mut late: Vec<f64> = z[1..40].to_vec();
        late.push(z[0]);
        assert_ne!(open(&late, 40), open(&late, 39));
        // Every other slice first: the step is taken for twice what it is until one between them comes.
        let mut halved: Vec<f64> = z.iter().copied().step_by(2).collect();
        halved.push(z[1]);
        let guess = |k| after(&halved, k, Some(60), FIT).unwrap().guess;
        assert_ne!(guess(30), guess(31));
    }
}
