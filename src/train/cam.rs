//! How well activation maps find lesions: the pointing game, the energy inside, overlap; and the figure.
//!
//! Input: models, scans with lesion masks. Output: a [`CamDocument`] and a picture of cases by models.
//!
//! The map of the true class is placed on the input grid as the scanner places it on slices (trilinear between cell
//! centres, ends held). Of a scan:
//! - *hit*: the voxel with the largest value is lesion; *near*: the cell that holds it has lesion (a cell of the last
//!   layer is much larger than a voxel: 8 x 16 x 16 of them, so that *hit* asks for more than the map can say);
//! - *energy*: share of the positive part of the map that is on lesion, beside the share of voxels that are, which is
//!   what a map without knowledge would get;
//! - *Dice* of the mask with the voxels above a share of the largest value: at one share for all scans, the best on
//!   their mean, and at the best of each scan.
//!
//! Scans without a mask (the healthy, above all) say nothing here and are left out.
//!
//! Deliberately absent: any tuning on masks, any smoothing.

use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::metrics::{Z_95, mean, mean_deviation};
use super::plot::{COLOURS, Picture};
use super::{Dataset, TrainError, judge, write_results};
use crate::explain::{Cam, class_activation_map};
use crate::model::Model;

/// Version of the JSON document.
pub const CAM_SCHEMA: &str = "darnet.cam/1";
/// Shares of the largest value that are tried as thresholds: 0.05 to 0.95.
pub const THRESHOLDS: usize = 19;
/// Most cases of a figure: 24 rows of 200 pixels.
pub const MAX_FIGURE_CASES: usize = 24;

fn threshold(i: usize) -> f32 {
    0.05 * (i + 1) as f32
}

/// Figures of one scan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseFigures {
    /// The scan.
    pub scan: String,
    /// Key of its class.
    pub class: String,
    /// Whether the model predicts it.
    pub right: bool,
    /// Whether the largest value is on lesion.
    pub hit: bool,
    /// Whether its cell has lesion.
    pub near: bool,
    /// Share of the positive part on lesion.
    pub energy: f64,
    /// Share of the voxels that are lesion.
    pub lesion_share: f64,
    /// Dice at each threshold.
    pub dice: Vec<f64>,
}

/// Figures of a model on several scans.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CamFigures {
    /// Scans.
    pub scans: usize,
    /// Share of hits, with Wilson's 95 % interval.
    pub hit: [f64; 3],
    /// Share of near hits, likewise.
    pub near: [f64; 3],
    /// Mean and deviation of the energy inside.
    pub energy: [f64; 2],
    /// Mean share of lesion voxels: the energy inside of a map without knowledge.
    pub lesion_share: f64,
    /// The best threshold for all, as a share of the largest value.
    pub best_threshold: f64,
    /// Mean and deviation of Dice there.
    pub dice: [f64; 2],
    /// Mean Dice at the best threshold of each scan.
    pub dice_own_threshold: f64,
}

/// A model's figures: over all scans, and by class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelFigures {
    /// The model's name.
    pub name: String,
    /// All scans with a mask.
    pub all: CamFigures,
    /// By class key.
    pub by_class: Vec<(String, CamFigures)>,
    /// Every scan.
    pub cases: Vec<CaseFigures>,
}

/// The JSON document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CamDocument {
    /// [`CAM_SCHEMA`].
    pub schema: String,
    /// Models.
    pub models: Vec<ModelFigures>,
}

/// For each voxel along an axis, two cells and the share of the second.
fn axis(inputs: usize, cells: usize) -> Vec<(usize, usize, f32)> {
    (0..inputs)
        .map(|i| {
            let at = ((i as f64 + 0.5) * cells as f64 / inputs as f64 - 0.5).clamp(0.0, (cells - 1) as f64);
            let low = at as usize;
            (low, (low + 1).min(cells - 1), (at - low as f64) as f32)
        })
        .collect()
}

/// The map on the input grid, D x H x W.
pub fn on_grid(cam: &Cam, input_dhw: [usize; 3]) -> Vec<f32> {
    let [d, h, w] = cam.shape_dhw;
    assert!(cam.values.len() == d * h * w && d * h * w > 0, "one value a cell");
    let [zs, ys, xs] = [axis(input_dhw[0], d), axis(input_dhw[1], h), axis(input_dhw[2], w)];
    let mut out = Vec::with_capacity(input_dhw.iter().product());
    let lerp = |a: f32, b: f32, t: f32| a + (b - a) * t;
    let mut row = vec![0.0f32; w];
    for &(z0, z1, tz) in &zs {
        for &(y0, y1, ty) in &ys {
            for (x, value) in row.iter_mut().enumerate() {
                let at = |z: usize, y: usize| cam.values[(z * h + y) * w + x];
                *value = lerp(lerp(at(z0, y0), at(z0, y1), ty), lerp(at(z1, y0), at(z1, y1), ty), tz);
            }
            out.extend(xs.iter().map(|&(x0, x1, tx)| lerp(row[x0], row[x1], tx)));
        }
    }
    out
}

/// The figures of one map against one mask, both on the input grid.
fn measure(map: &[f32], mask: &[u8], input_dhw: [usize; 3], cells_dhw: [usize; 3]) -> Option<CaseFigures> {
    let lesion = mask.iter().filter(|m| **m != 0).count();
    if lesion == 0 {
        return None;
    }
    let mut top = 0;
    for (i, v) in map.iter().enumerate() {
        if *v > map[top] {
            top = i;
        }
    }
    let [_, h, w] = input_dhw;
    let cell_of = |i: usize| {
        let place = [i / (h * w), i / w % h, i % w];
        [0, 1, 2].map(|a| place[a] * cells_dhw[a] / input_dhw[a])
    };
    let cell = cell_of(top);
    let near = mask.iter().enumerate().any(|(i, m)| *m != 0 && cell_of(i) == cell);
    let (mut inside, mut all) = (0.0f64, 0.0f64);
    for (v, m) in map.iter().zip(mask) {
        let v = f64::from(v.max(0.0));
        all += v;
        inside += if *m != 0 { v } else { 0.0 };
    }
    let largest = map[top];
    // How many voxels lie above each threshold, and how many of them on lesion.
    let (mut above, mut both) = ([0usize; THRESHOLDS], [0usize; THRESHOLDS]);
    if largest > 0.0 {
        for (v, m) in map.iter().zip(mask) {
            for i in (0..THRESHOLDS).take_while(|&i| *v >= threshold(i) * largest) {
                above[i] += 1;
                both[i] += usize::from(*m != 0);
            }
        }
    }
    Some(CaseFigures {
        scan: String::new(),
        class: String::new(),
        right: false,
        hit: mask[top] != 0,
        near,
        energy: if all > 0.0 { inside / all } else { 0.0 },
        lesion_share: lesion as f64 / mask.len() as f64,
        dice: above.iter().zip(both).map(|(a, b)| 2.0 * b as f64 / (a + lesion) as f64).collect(),
    })
}

/// A share with Wilson's 95 % interval.
pub fn wilson(successes: usize, of: usize) -> [f64; 3] {
    if of == 0 {
        return [0.0, 0.0, 1.0];
    }
    let (n, p) = (of as f64, successes as f64 / of as f64);
    let z2 = Z_95 * Z_95;
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z_95 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    [p, (centre - half).clamp(0.0, p), (centre + half).clamp(p, 1.0)]
}

fn summary(cases: &[&CaseFigures]) -> CamFigures {
    let share = |f: fn(&CaseFigures) -> bool| wilson(cases.iter().filter(|c| f(c)).count(), cases.len());
    let of = |f: &dyn Fn(&CaseFigures) -> f64| cases.iter().map(|c| f(c)).collect::<Vec<f64>>();
    let pair = |values: &[f64]| <[f64; 2]>::from(mean_deviation(values));
    let at = |i: usize| of(&|c| c.dice[i]);
    let best = (0..THRESHOLDS).max_by(|&a, &b| mean(&at(a)).total_cmp(&mean(&at(b))).then(b.cmp(&a))).unwrap_or(0);
    CamFigures {
        scans: cases.len(),
        hit: share(|c| c.hit),
        near: share(|c| c.near),
        energy: pair(&of(&|c| c.energy)),
        lesion_share: mean(&of(&|c| c.lesion_share)),
        best_threshold: f64::from(threshold(best)),
        dice: pair(&at(best)),
        dice_own_threshold: mean(&of(&|c| c.dice.iter().copied().fold(0.0, f64::max))),
    }
}

/// Maps of the scans of a figure: scan, map on the input grid, whether the model was right.
pub type Kept = Vec<(usize, Vec<f32>, bool)>;

/// The figures of `model` on those of `indices` that have a mask, and the maps of `keep`.
///
/// # Errors
/// A model for other data, no scan with a mask.
pub fn evaluate(
    name: &str,
    model: &Model,
    data: &dyn Dataset,
    indices: &[usize],
    keep: &[usize],
    threads: usize,
) -> Result<(ModelFigures, Kept), TrainError> {
    let with_mask: Vec<usize> = indices.iter().copied().filter(|&i| data.mask(i).is_some()).collect();
    if with_mask.is_empty() {
        return Err(TrainError::Data(
            "no scan with a lesion mask; prepare the cache from a source that has them".into(),
        ));
    }
    let (mut cases, mut kept) = (Vec::new(), Vec::new());
    judge::each(model, data, &with_mask, threads, &mut |index, _, inference| {
        let class = data.class(index);
        let cam = class_activation_map(inference, model.weights.head_weight(), class);
        let map = on_grid(&cam, data.input_dhw());
        let best = |l: &[f32]| (0..l.len()).fold(0, |best, i| if l[i] > l[best] { i } else { best });
        let right = best(&inference.logits) == class;
        let found = data.mask(index).and_then(|mask| measure(&map, mask, data.input_dhw(), cam.shape_dhw));
        if let Some(found) = found {
            let (scan, key) = (data.scan(index).to_owned(), data.class_names()[class].clone());
            cases.push(CaseFigures { scan, class: key, right, ..found });
        }
        if keep.contains(&index) {
            kept.push((index, map, right));
        }
        Ok(())
    })?;
    let all = summary(&cases.iter().collect::<Vec<_>>());
    let by_class = data
        .class_names()
        .iter()
        .map(|key| (key.clone(), cases.iter().filter(|c| c.class == *key).collect::<Vec<_>>()))
        .filter(|(_, of)| !of.is_empty())
        .map(|(key, of)| (key, summary(&of)))
        .collect();
    Ok((ModelFigures { name: name.to_owned(), all, by_class, cases }, kept))
}

/// Scans for a figure: of each class, `per_class` of evenly spaced ranks by lesion volume.
pub fn choose(data: &dyn Dataset, indices: &[usize], per_class: usize) -> Vec<usize> {
    let mut chosen = Vec::new();
    for class in 0..data.class_names().len() {
        let lesion = |i: usize| data.mask(i).map_or(0, |m| m.iter().filter(|v| **v != 0).count());
        let mut of: Vec<(usize, usize)> = indices
            .iter()
            .filter(|&&i| data.class(i) == class)
            .map(|&i| (lesion(i), i))
            .filter(|(n, _)| *n > 0)
            .collect();
        of.sort_unstable();
        let take = per_class.min(of.len());
        chosen.extend((0..take).map(|k| of[(2 * k + 1) * of.len() / (2 * take)].1));
    }
    chosen.truncate(MAX_FIGURE_CASES);
    chosen
}

/// The figure: a row a scan (its slice with the most lesion, the lesion's outline in green), a column a model.
///
/// # Errors
/// A file that cannot be written.
pub fn figure(path: &Path, data: &dyn Dataset, cases: &[usize], columns: &[(String, Kept)]) -> Result<(), TrainError> {
    const INK: [u8; 3] = [30, 30, 30];
    const OUTLINE: [u8; 3] = [0, 230, 90];
    const GAP: usize = 6;
    const HEAD: usize = 22;
    const FOOT: usize = 14;
    let [_, h, w] = data.input_dhw();
    let scale = (200 / h.max(w)).max(1);
    let (tile_w, tile_h) = (w * scale, h * scale);
    let mut picture =
        Picture::new(GAP + (columns.len() + 1) * (tile_w + GAP), HEAD + cases.len().max(1) * (tile_h + FOOT + GAP));
    let x_of = |column: usize| GAP + column * (tile_w + GAP);
    picture.text(x_of(0) as i64, 6, 1, "LESION", INK);
    for (c, (name, _)) in columns.iter().enumerate() {
        picture.text(x_of(c + 1) as i64, 6, 1, name, INK);
    }
    for (row, &index) in cases.iter().enumerate() {
        let (Some(mask), volume) = (data.mask(index), data.volume_f16(index)) else { continue };
        let area = |z: usize| mask[z * h * w..(z + 1) * h * w].iter().filter(|m| **m != 0).count();
        let plane = (0..data.input_dhw()[0]).max_by_key(|&z| (area(z), std::cmp::Reverse(z))).unwrap_or(0) * h * w;
        let top = HEAD + row * (tile_h + FOOT + GAP);
        let inside = |y: usize, x: usize| y < h && x < w && mask[plane + y * w + x] != 0;
        let edge = |y: usize, x: usize| {
            inside(y, x)
                && [(y + 1, x), (y.wrapping_sub(1), x), (y, x + 1), (y, x.wrapping_sub(1))]
                    .iter()
                    .any(|&(y, x)| !inside(y, x))
        };
        let mut tile = |left: usize, map: Option<&[f32]>| {
            let largest = map.map_or(0.0, |m| m.iter().copied().fold(0.0f32, f32::max));
            for y in 0..h {
                for x in 0..w {
                    let at = plane + y * w + x;
                    let grey = volume[at].to_f32().clamp(0.0, 1.0) * 255.0;
                    let mut colour = [grey as u8; 3];
                    if let Some(map) = map.filter(|_| largest > 0.0) {
                        let t = (map[at] / largest).clamp(0.0, 1.0);
                        let c = colorous::INFERNO.eval_continuous(f64::from(t));
                        let alpha = 0.65 * t.sqrt();
                        colour = [c.r, c.g, c.b].map(|c| (grey * (1.0 - alpha) + f32::from(c) * alpha) as u8);
                    }
                    if edge(y, x) {
                        colour = OUTLINE;
                    }
                    let (px, py) = (left + x * scale, top + y * scale);
                    picture.fill(px as i64, py as i64, scale as i64, scale as i64, colour);
                }
            }
        };
        tile(x_of(0), None);
        let mut verdicts = Vec::new();
        for (c, (_, kept)) in columns.iter().enumerate() {
            if let Some((_, map, right)) = kept.iter().find(|(i, ..)| *i == index) {
                tile(x_of(c + 1), Some(map));
                verdicts.push((c + 1, *right));
            }
        }
        let foot = (top + tile_h + 3) as i64;
        picture.text(x_of(0) as i64, foot, 1, &data.class_names()[data.class(index)].to_uppercase(), INK);
        for (c, right) in verdicts {
            let (word, colour) = if right { ("RIGHT", COLOURS[2]) } else { ("WRONG", COLOURS[1]) };
            picture.text(x_of(c) as i64, foot, 1, word, colour);
        }
    }
    picture.save(path)
}

/// The document as Markdown.
pub fn markdown(document: &CamDocument) -> String {
    let mut out =
        String::from("# Activation maps against lesion masks\n\nPercent; the map is that of the true class.\n\n");
    out.push_str(
        "| network | class | scans | hit (95 %) | hit or near (95 %) | energy inside, mean ± sd | lesion share | ",
    );
    out.push_str("Dice at the best threshold, mean ± sd | threshold | Dice, own threshold |\n");
    out.push_str("|---|---|---|---|---|---|---|---|---|---|\n");
    for model in &document.models {
        let rows = std::iter::once(("all", &model.all)).chain(model.by_class.iter().map(|(k, f)| (k.as_str(), f)));
        for (class, f) in rows {
            let percent = |v: f64| format!("{:.1}", 100.0 * v);
            let interval = |v: [f64; 3]| format!("{} ({} to {})", percent(v[0]), percent(v[1]), percent(v[2]));
            let pm = |v: [f64; 2]| format!("{} ± {}", percent(v[0]), percent(v[1]));
            let _ = writeln!(
                out,
                "| {} | {class} | {} | {} | {} | {} | {} | {} | {:.2} | {} |",
                model.name,
                f.scans,
                interval(f.hit),
                interval(f.near),
                pm(f.energy),
                percent(f.lesion_share),
                pm(f.dice),
                f.best_threshold,
                percent(f.dice_own_threshold)
            );
        }
    }
    out
}

/// Writes `cam.json` and `cam.md` into `dir`.
///
/// # Errors
/// A full disk.
pub fn write(dir: &Path, document: &CamDocument) -> Result<(), TrainError> {
    write_results(dir, "cam", document, &markdown(document))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cam(shape_dhw: [usize; 3], values: Vec<f32>) -> Cam {
        Cam { class: 0, shape_dhw, values }
    }

    #[test]
    fn a_map_of_one_value_stays_and_a_ramp_stays_a_ramp() {
        assert!(on_grid(&cam([1, 1, 1], vec![0.5]), [3, 4, 5]).iter().all(|v| *v == 0.5));
        let map = on_grid(&cam([1, 1, 2], vec![0.0, 1.0]), [1, 1, 8]);
        // Cell centres are at 1.5 and 5.5.
        let wanted = [0.0, 0.0, 0.125, 0.375, 0.625, 0.875, 1.0, 1.0];
        assert!(map.iter().zip(wanted).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-6), "{map:?}");
    }

    #[test]
    fn figures_are_those_of_the_definition() {
        // Two planes of 2 x 2; the map's top is on lesion; half of its energy is.
        let map = [1.0, 0.5, 0.0, -1.0, 0.5, 0.0, 0.0, 0.0];
        let mask = [1, 0, 1, 0, 0, 0, 0, 0];
        let f = measure(&map, &mask, [2, 2, 2], [1, 1, 1]).unwrap();
        assert!(f.hit && f.near);
        assert_eq!((f.energy, f.lesion_share), (0.5, 0.25));
        // Above 0.05 to 0.5: three voxels, one of them lesion; above that only the top.
        assert_eq!(f.dice[0], 2.0 / 5.0);
        assert_eq!(f.dice[THRESHOLDS - 1], 2.0 / 3.0);
        let s = summary(&[&f]);
        assert_eq!((s.dice[0], s.scans), (2.0 / 3.0, 1));
        assert!(s.best_threshold > 0.5);
        assert!(measure(&map, &[0; 8], [2, 2, 2], [1, 1, 1]).is_none());
        // The top is off the lesion, in a cell that has some.
        let off = measure(&map, &[0, 1, 0, 0, 0, 0, 0, 0], [2, 2, 2], [2, 1, 1]).unwrap();
        assert!(!off.hit && off.near);
        let far = measure(&map, &[0, 0, 0, 0, 0, 0, 0, 1], [2, 2, 2], [2, 1, 1]).unwrap();
        assert!(!far.hit && !far.near);
        assert_eq!(far.energy, 0.0);
    }

    #[test]
    fn a_map_without_a_positive_value_finds_nothing() {
        let f = measure(&[-1.0, -2.0], &[0, 1], [1, 1, 2], [1, 1, 2]).unwrap();
        assert_eq!((f.hit, f.energy), (false, 0.0));
        assert!(f.dice.iter().all(|d| *d == 0.0));
    }

    #[test]
    fn wilsons_interval_is_the_published_one() {
        // 8 of 10: 0.490 to 0.943 (Newcombe 1998, method 3).
        let [p, low, high] = wilson(8, 10);
        assert!((p - 0.8).abs() < 1e-12 && (low - 0.4902).abs() < 1e-3 && (high - 0.9433).abs() < 1e-3);
        assert_eq!(wilson(0, 0), [0.0, 0.0, 1.0]);
        assert_eq!(wilson(5, 5)[2], 1.0);
    }
}
