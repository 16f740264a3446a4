//! Small charts as PNG: curves, ROC, confusion.
//!
//! Input: numbers. Output: an RGB picture through the encoder that the heat maps use. Drawn here because a chart library
//! wants fonts of the system. Letters come from the `font` of the pictures: capitals, digits, a few signs.
//!
//! Deliberately absent: styles, legends outside the picture, vector graphics.

use std::path::Path;

use super::{TrainError, write_atomic};
use crate::explain::{encode_png, font};

const BACK: [u8; 3] = [255, 255, 255];
const INK: [u8; 3] = [30, 30, 30];
const GRID: [u8; 3] = [222, 222, 222];
/// Colours of lines, readable with the common defects of colour vision (Okabe and Ito).
pub const COLOURS: [[u8; 3]; 6] =
    [[0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [230, 159, 0], [86, 180, 233]];

/// A white picture to draw on.
pub struct Picture {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

impl Picture {
    /// A white picture.
    pub fn new(width: usize, height: usize) -> Self {
        Self { width, height, rgb: BACK.repeat(width * height) }
    }

    fn put(&mut self, x: i64, y: i64, colour: [u8; 3]) {
        let inside = |v: i64, n: usize| usize::try_from(v).ok().filter(|v| *v < n);
        if let (Some(x), Some(y)) = (inside(x, self.width), inside(y, self.height)) {
            let at = 3 * (y * self.width + x);
            self.rgb[at..at + 3].copy_from_slice(&colour);
        }
    }

    /// A filled rectangle.
    pub fn fill(&mut self, x: i64, y: i64, width: i64, height: i64, colour: [u8; 3]) {
        for dy in 0..height {
            for dx in 0..width {
                self.put(x + dx, y + dy, colour);
            }
        }
    }

    /// A line two pixels wide.
    pub fn line(&mut self, from: [f64; 2], to: [f64; 2], colour: [u8; 3]) {
        let steps = (to[0] - from[0]).abs().max((to[1] - from[1]).abs()).ceil().clamp(1.0, 1e5);
        for i in 0..=steps as u32 {
            let t = f64::from(i) / steps;
            let (x, y) = (from[0] + t * (to[0] - from[0]), from[1] + t * (to[1] - from[1]));
            self.fill(x.round() as i64, y.round() as i64, 2, 2, colour);
        }
    }

    /// Text with its upper left corner at `(x, y)`, dots of `size` pixels.
    pub fn text(&mut self, x: i64, y: i64, size: i64, text: &str, colour: [u8; 3]) {
        for (dx, dy) in font::dots(text) {
            self.fill(x + dx as i64 * size, y + dy as i64 * size, size, size, colour);
        }
    }

    /// Writes the picture as PNG, whole or not at all.
    ///
    /// # Errors
    /// An encoder that fails or a file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), TrainError> {
        let png = encode_png(&self.rgb, self.width as u32, self.height as u32)
            .map_err(|e| TrainError::Picture(e.to_string()))?;
        write_atomic(path, &png)
    }
}

/// A named line.
pub struct Line {
    /// Its name in the legend.
    pub name: String,
    /// Its points, left to right; values that are not finite are left out.
    pub points: Vec<[f64; 2]>,
}

/// Where a chart lies in a picture.
pub struct Frame {
    /// Left, top, width, height in pixels.
    pub place: [i64; 4],
    /// Lowest and highest x.
    pub x: [f64; 2],
    /// Lowest and highest y.
    pub y: [f64; 2],
}

/// Draws axes, grid, title, lines and legend.
pub fn chart(picture: &mut Picture, frame: &Frame, title: &str, lines: &[Line]) {
    let [left, top, width, height] = frame.place;
    let span = |r: [f64; 2]| if r[1] > r[0] { r[1] - r[0] } else { 1.0 };
    let (sx, sy) = (span(frame.x), span(frame.y));
    let at = |p: [f64; 2]| {
        [
            left as f64 + (p[0] - frame.x[0]) / sx * width as f64,
            (top + height) as f64 - (p[1] - frame.y[0]) / sy * height as f64,
        ]
    };
    const DIVISIONS: i64 = 5;
    for i in 0..=DIVISIONS {
        let t = i as f64 / DIVISIONS as f64;
        let (x, y) = (left + width * i / DIVISIONS, top + height - height * i / DIVISIONS);
        picture.fill(left, y, width, 1, GRID);
        picture.fill(x, top, 1, height, GRID);
        picture.text(left - 44, y - 3, 1, &short(frame.y[0] + t * sy), INK);
        picture.text(x - 8, top + height + 6, 1, &short(frame.x[0] + t * sx), INK);
    }
    picture.fill(left, top, 1, height, INK);
    picture.fill(left, top + height, width, 1, INK);
    picture.text(left, top - 20, 2, title, INK);
    for (i, line) in lines.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let points: Vec<[f64; 2]> =
            line.points.iter().copied().filter(|p| p[0].is_finite() && p[1].is_finite()).collect();
        for pair in points.windows(2) {
            picture.line(at(pair[0]), at(pair[1]), colour);
        }
        if let [only] = points.as_slice() {
            let [x, y] = at(*only);
            picture.fill(x as i64 - 2, y as i64 - 2, 5, 5, colour);
        }
        let y = top + 6 + 12 * i as i64;
        picture.fill(left + width - 150, y + 2, 14, 3, colour);
        picture.text(left + width - 130, y, 1, &line.name, INK);
    }
}

fn short(v: f64) -> String {
    if v != 0.0 && !(1e-3..1e5).contains(&v.abs()) {
        format!("{v:.1e}")
    } else if v.fract() == 0.0 {
        format!("{v:.0}")
    } else {
        let text = format!("{v:.3}");
        text.trim_end_matches('0').to_owned()
    }
}

/// Lowest and highest of all finite y, with 0 inside.
pub fn y_range(lines: &[Line]) -> [f64; 2] {
    let ys = lines.iter().flat_map(|l| l.points.iter().map(|p| p[1])).filter(|y| y.is_finite());
    let high = ys.fold(0.0f64, f64::max);
    [0.0, if high > 0.0 { 1.05 * high } else { 1.0 }]
}

/// ROC curves, one a line of (false positive rate, true positive rate).
pub fn roc_picture(lines: &[Line]) -> Picture {
    let mut picture = Picture::new(560, 540);
    let frame = Frame { place: [60, 40, 460, 440], x: [0.0, 1.0], y: [0.0, 1.0] };
    chart(&mut picture, &frame, "ROC: TPR OVER FPR", &[]);
    picture.line([60.0, 480.0], [520.0, 40.0], GRID);
    // The legend lies below, where curves are not.
    for (i, line) in lines.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let at = |p: [f64; 2]| [60.0 + 460.0 * p[0], 480.0 - 440.0 * p[1]];
        for pair in line.points.windows(2) {
            picture.line(at(pair[0]), at(pair[1]), colour);
        }
        let y = 460 - 14 * (lines.len() - i) as i64;
        picture.fill(260, y + 2, 14, 3, colour);
        picture.text(282, y, 1, &line.name, INK);
    }
    picture
}

/// The confusion matrix, true classes down, predicted ones across.
pub fn confusion_picture(confusion: &[Vec<usize>], classes: &[String]) -> Picture {
    const CELL: i64 = 110;
    let k = confusion.len() as i64;
    let mut picture = Picture::new((140 + k * CELL) as usize, (90 + k * CELL) as usize);
    picture.text(120, 12, 2, "PREDICTED", INK);
    picture.text(8, 40, 1, "TRUE", INK);
    for (r, row) in confusion.iter().enumerate() {
        let total: usize = row.iter().sum();
        let name = |i: usize| classes.get(i).map_or("", String::as_str);
        let y = 60 + r as i64 * CELL;
        picture.text(8, y + CELL / 2, 1, name(r), INK);
        picture.text(120 + r as i64 * CELL + 8, 40, 1, name(r), INK);
        for (c, &count) in row.iter().enumerate() {
            let share = count as f64 / total.max(1) as f64;
            let mix = |full: u8| (255.0 - share * (255.0 - f64::from(full))) as u8;
            let x = 120 + c as i64 * CELL;
            picture.fill(x + 1, y + 1, CELL - 2, CELL - 2, COLOURS[0].map(mix));
            let ink = if share > 0.5 { BACK } else { INK };
            picture.text(x + 20, y + 36, 3, &count.to_string(), ink);
            picture.text(x + 20, y + 70, 2, &format!("{:.1}%", 100.0 * share), ink);
        }
    }
    picture
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_drawn_where_its_points_are() {
        let mut picture = Picture::new(200, 200);
        let frame = Frame { place: [50, 50, 100, 100], x: [0.0, 1.0], y: [0.0, 1.0] };
        let line = Line { name: "A".to_owned(), points: vec![[0.0, 0.0], [1.0, 1.0], [f64::NAN, 2.0]] };
        chart(&mut picture, &frame, "T", &[line]);
        let at = 3 * (100 * 200 + 100);
        assert_eq!(picture.rgb[at..at + 3], COLOURS[0]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.png");
        picture.save(&path).unwrap();
        let image = image::open(path).unwrap();
        assert_eq!((image.width(), image.height()), (200, 200));
    }

    #[test]
    fn labels_are_short() {
        assert_eq!(short(0.25), "0.25");
        assert_eq!(short(80.0), "80");
        assert_eq!(short(1e-4), "1.0e-4");
    }

    #[test]
    fn a_confusion_matrix_and_roc_can_be_drawn() {
        let picture = confusion_picture(&[vec![3, 1], vec![0, 0]], &["a".into(), "b".into()]);
        assert!(picture.rgb.chunks_exact(3).any(|p| p != BACK && p != INK));
        let line = Line { name: "B".into(), points: vec![[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]] };
        assert!(roc_picture(&[line]).rgb.chunks_exact(3).any(|p| p == COLOURS[0]));
    }
}
