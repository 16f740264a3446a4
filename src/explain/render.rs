//! Pictures: the windowed slice in grey with the map over it, marks, colour bar, PNG.
//!
//! Display convention: radiological, rows to posterior, the patient's left on the right of the picture.

use super::{ExplainError, font};
use crate::resample::cpu::Window;
use crate::volume::geometry::InPlaneOrientation;
use std::path::Path;

/// How pictures are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct RenderOptions {
    /// How stored pixels are shown; [`super::explain_series`] sets it from the series.
    pub orientation: InPlaneOrientation,
    /// Opacity at the top of the scale, 0 to 1.
    pub max_opacity: f32,
    /// Share of the scale up to which nothing is drawn, 0 to 1; opacity grows with the value from there.
    pub threshold: f32,
    /// Number of top slices.
    pub top_slices: usize,
    /// Least distance between two top slices, millimetres.
    pub min_distance_mm: f64,
    /// Slices in the overview, evenly spaced.
    pub overview_slices: usize,
}

impl Default for RenderOptions {
    fn default() -> Self {
        Self {
            orientation: InPlaneOrientation::default(),
            max_opacity: 0.65,
            threshold: 0.15,
            top_slices: 5,
            min_distance_mm: 30.0,
            overview_slices: 12,
        }
    }
}

/// Steps of the colour scale.
const STEPS: usize = 256;

/// Colour and opacity (0 to 256) of each step of the scale.
struct Palette([([u16; 3], u16); STEPS]);

impl Palette {
    fn new(options: &RenderOptions) -> Self {
        Self(std::array::from_fn(|i| {
            let t = i as f32 / (STEPS - 1) as f32;
            let c = colorous::INFERNO.eval_continuous(f64::from(t));
            let above = ((t - options.threshold) / (1.0 - options.threshold).max(1e-3)).clamp(0.0, 1.0);
            // Visible from the threshold on, then growing with the value.
            let opacity = if t <= options.threshold { 0.0 } else { options.max_opacity * above.sqrt() };
            ([c.r, c.g, c.b].map(u16::from), (opacity.clamp(0.0, 1.0) * 256.0) as u16)
        }))
    }
}

/// Width and height of a slice as shown.
pub fn oriented_size(rows: u32, columns: u32, orientation: InPlaneOrientation) -> (u32, u32) {
    if orientation.transpose { (rows, columns) } else { (columns, rows) }
}

/// One slice in grey with the map over it: RGB, three bytes a pixel, [`oriented_size`] wide and high.
///
/// `hu` and `map` are `rows x columns` in stored order; `scale` gives the map's values at the ends of the colour scale
/// (inferno, perceptually uniform). Values at or below `scale.0` stay transparent, and so does everything when the scale
/// is empty.
///
/// # Panics
/// When lengths do not fit.
pub fn render_slice(
    hu: &[i16],
    rows: u32,
    columns: u32,
    window: &Window,
    map: &[f32],
    scale: (f32, f32),
    options: &RenderOptions,
) -> Vec<u8> {
    let (rows, columns) = (rows as usize, columns as usize);
    assert_eq!(hu.len(), rows * columns, "slice length");
    assert_eq!(map.len(), rows * columns, "map length");
    let o = options.orientation;
    let palette = Palette::new(options);
    let range = scale.1 - scale.0;
    let to_step = if range > 0.0 && range.is_finite() { (STEPS - 1) as f32 / range } else { 0.0 };
    let (grey_low, to_grey) = (window.low_hu(), 255.0 / window.width_hu);
    let (width, height) = oriented_size(rows as u32, columns as u32, o);
    let (width, height) = (width as usize, height as usize);
    // Stored index of the picture's (r, c): start + r * down + c * right.
    let stored = |r: usize, c: usize| {
        let (mut sr, mut sc) = if o.transpose { (c, r) } else { (r, c) };
        if o.flip_rows {
            sr = rows - 1 - sr;
        }
        if o.flip_columns {
            sc = columns - 1 - sc;
        }
        (sr * columns + sc) as isize
    };
    let right = if width > 1 { stored(0, 1) - stored(0, 0) } else { 0 };
    let mut rgb = vec![0u8; 3 * width * height];
    for (r, line) in rgb.chunks_exact_mut(3 * width).enumerate() {
        let mut at = stored(r, 0);
        for pixel in line.chunks_exact_mut(3) {
            let grey = ((f32::from(hu[at as usize]) - grey_low) * to_grey + 0.5).clamp(0.0, 255.0) as u16;
            // A float cast saturates: NaN and negative values become step 0, which is transparent.
            let step = (((map[at as usize] - scale.0) * to_step) as usize).min(STEPS - 1);
            let (colour, opacity) = palette.0[step];
            for (to, c) in pixel.iter_mut().zip(colour) {
                *to = ((grey * (256 - opacity) + c * opacity) >> 8) as u8;
            }
            at += right;
        }
    }
    rgb
}

/// An RGB picture that can be drawn on.
pub(super) struct Canvas {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) rgb: Vec<u8>,
}

const INK: [u8; 3] = [235, 235, 235];
const SHADOW: [u8; 3] = [0, 0, 0];
const BANNER: [u8; 3] = [176, 0, 32];

impl Canvas {
    pub(super) fn black(width: usize, height: usize) -> Self {
        Self { width, height, rgb: vec![0; 3 * width * height] }
    }

    fn put(&mut self, x: isize, y: isize, colour: [u8; 3]) {
        if (0..self.width as isize).contains(&x) && (0..self.height as isize).contains(&y) {
            let at = 3 * (y as usize * self.width + x as usize);
            self.rgb[at..at + 3].copy_from_slice(&colour);
        }
    }

    fn fill(&mut self, x: isize, y: isize, width: usize, height: usize, colour: [u8; 3]) {
        for dy in 0..height as isize {
            for dx in 0..width as isize {
                self.put(x + dx, y + dy, colour);
            }
        }
    }

    /// Text with its upper left corner at `(x, y)`, each dot `size` pixels wide, with a dark outline.
    pub(super) fn text(&mut self, x: isize, y: isize, size: usize, text: &str) {
        for dot in font::dots(text) {
            let (dx, dy) = (x + (dot.0 * size) as isize, y + (dot.1 * size) as isize);
            self.fill(dx - 1, dy - 1, size + 2, size + 2, SHADOW);
        }
        for dot in font::dots(text) {
            self.fill(x + (dot.0 * size) as isize, y + (dot.1 * size) as isize, size, size, INK);
        }
    }

    /// The banner across the lower edge, as large as fits.
    pub(super) fn banner(&mut self, text: &str) {
        let mut size = 2;
        while size > 1 && font::width(text) * size + 8 > self.width {
            size -= 1;
        }
        let height = font::HEIGHT * size + 6;
        let top = self.height as isize - height as isize;
        self.fill(0, top, self.width, height, BANNER);
        let x = (self.width as isize - (font::width(text) * size) as isize) / 2;
        self.text(x.max(2), top + 3, size, text);
    }

    /// R, L and A at their edges; the lower one may carry the banner.
    pub(super) fn sides(&mut self, size: usize) {
        let (w, h) = (self.width as isize, self.height as isize);
        let (gw, gh) = ((font::ADVANCE * size) as isize, (font::HEIGHT * size) as isize);
        self.text(4, (h - gh) / 2, size, "R");
        self.text(w - gw - 2, (h - gh) / 2, size, "L");
        self.text((w - gw) / 2, 4, size, "A");
    }

    /// The colour bar at the right edge, as drawn over mid grey, with its upper end marked by `top`.
    pub(super) fn colour_bar(&mut self, options: &RenderOptions, top: &str) {
        let palette = Palette::new(options);
        let (bar_w, bar_h) = (10usize, (self.height / 4).min(STEPS));
        if bar_h < 32 || self.width < 64 {
            return;
        }
        let x = self.width as isize - bar_w as isize - 8;
        let y = 20isize;
        self.fill(x - 1, y - 1, bar_w + 2, bar_h + 2, INK);
        for i in 0..bar_h {
            let (colour, opacity) = palette.0[(STEPS - 1) * (bar_h - 1 - i) / (bar_h - 1)];
            let mixed = colour.map(|c| ((96 * (256 - opacity) + c * opacity) >> 8) as u8);
            self.fill(x, y + i as isize, bar_w, 1, mixed);
        }
        let right = self.width as isize - 4;
        self.text(right - font::width(top) as isize, y - 14, 1, top);
        self.text(right - font::width("0") as isize - 8, y + bar_h as isize + 5, 1, "0");
    }

    /// Copies `from`, shrunk by the whole factor `shrink` (box mean), to `(x, y)`.
    pub(super) fn paste_shrunk(&mut self, from: &Canvas, shrink: usize, x: usize, y: usize) {
        let h = (from.height / shrink).min(self.height.saturating_sub(y));
        let w = (from.width / shrink).min(self.width.saturating_sub(x));
        let share = 1.0 / (shrink * shrink) as f32;
        let mut sums = vec![0u32; 3 * w];
        for r in 0..h {
            sums.fill(0);
            for line in from.rgb.chunks_exact(3 * from.width).skip(r * shrink).take(shrink) {
                for (sum, block) in sums.chunks_exact_mut(3).zip(line.chunks_exact(3 * shrink)) {
                    for pixel in block.chunks_exact(3) {
                        for (s, v) in sum.iter_mut().zip(pixel) {
                            *s += u32::from(*v);
                        }
                    }
                }
            }
            let at = 3 * ((y + r) * self.width + x);
            for (to, s) in self.rgb[at..at + 3 * w].iter_mut().zip(&sums) {
                *to = (*s as f32 * share) as u8;
            }
        }
    }

    pub(super) fn png(&self) -> Result<Vec<u8>, ExplainError> {
        encode_png(&self.rgb, self.width as u32, self.height as u32)
    }
}

/// An RGB picture as PNG bytes, compressed for speed.
///
/// # Errors
/// When `rgb` is not `3 * width * height` long, or the encoder fails.
pub fn encode_png(rgb: &[u8], width: u32, height: u32) -> Result<Vec<u8>, ExplainError> {
    let fault = |source| ExplainError::Png { width, height, source };
    let expected = 3 * width as usize * height as usize;
    if rgb.len() != expected {
        return Err(ExplainError::Shape { what: "the picture", expected, got: rgb.len() });
    }
    let mut bytes = Vec::with_capacity(rgb.len() / 2 + 1024);
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header().map_err(fault)?;
    writer.write_image_data(rgb).map_err(fault)?;
    writer.finish().map_err(fault)?;
    Ok(bytes)
}

/// Writes an RGB picture of `width x height` pixels as PNG.
///
/// # Errors
/// As [`encode_png`], or when the file cannot be written.
pub fn write_png(path: &Path, rgb: &[u8], width: u32, height: u32) -> Result<(), ExplainError> {
    let bytes = encode_png(rgb, width, height)?;
    std::fs::write(path, bytes).map_err(|source| ExplainError::Write { file: "a picture".into(), source })
}
