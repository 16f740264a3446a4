//! One series explained: the top slices as PNG, an overview, the raw map, a self-contained summary page.

use super::cam::{Cam, CamGeometry, class_activation_map, slice_map, top_slices, write_cam};
use super::render::{Canvas, RenderOptions, oriented_size, render_slice};
use super::{ExplainError, font};
use crate::engine::Inference;
use crate::resample::cpu::Window;
use crate::volume::geometry::InPlaneOrientation;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Tiles in a line of the overview.
const OVERVIEW_COLUMNS: usize = 4;
/// Side an overview tile has at most, pixels.
const OVERVIEW_TILE: usize = 256;

/// Everything the explanation of a series is made from. Texts go onto the page as they are, escaped; they must not
/// identify a patient.
#[derive(Clone, Copy)]
pub struct SeriesToExplain<'a> {
    /// The HU of a slice by ordered index, feet to head, in stored order; `None` when it is gone.
    pub slices: &'a dyn Fn(usize) -> Option<&'a [i16]>,
    /// Positions along the stack axis, feet to head.
    pub depth_mm: &'a [f64],
    /// In-plane offset of each slice that was sheared out (`Stack::shear_px`); `None` without tilt.
    pub shear_px: Option<&'a [[f64; 2]]>,
    /// Stored rows.
    pub rows: u32,
    /// Stored columns.
    pub columns: u32,
    /// PixelSpacing: between rows, between columns.
    pub pixel_spacing_mm: [f64; 2],
    /// How stored slices are shown.
    pub orientation: InPlaneOrientation,
    /// What the network said.
    pub inference: &'a Inference,
    /// The head's weights, `classes x channels`.
    pub head_weight: &'a [f32],
    /// The class to explain.
    pub class: usize,
    /// Names of the classes, in the order of the outputs.
    pub class_names: &'a [String],
    /// Scores to show, in the same order.
    pub scores: &'a [f32],
    /// How the input was made.
    pub geometry: CamGeometry<'a>,
    /// Window of the grey picture.
    pub window: Window,
    /// Burnt into every picture and put on top of the page: `DEMO MODEL - NOT FOR DIAGNOSIS`.
    pub banner: Option<&'a str>,
    /// Quality notes.
    pub notes: &'a [String],
    /// The model.
    pub model_id: &'a str,
    /// What the model was trained on, from its manifest.
    pub trained_on: &'a str,
}

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// Ordered index and mass, by falling mass.
    pub top_slices: Vec<(u32, f32)>,
    /// Every file: pictures, overview, map, page.
    pub files: Vec<PathBuf>,
    /// The page.
    pub summary_html: PathBuf,
}

/// Writes `top-1.png` …, `overview.png`, `cam.safetensors` and `summary.html` into `dir`, which is made if it is not
/// there. The page embeds its pictures and needs nothing else. `options.orientation` is ignored: the series has one.
///
/// # Errors
/// When lengths do not fit together, a slice is gone, or a file cannot be written.
pub fn explain_series(
    dir: &Path,
    input: &SeriesToExplain<'_>,
    options: &RenderOptions,
) -> Result<Explanation, ExplainError> {
    check(input)?;
    std::fs::create_dir_all(dir).map_err(|source| ExplainError::Write { file: "the folder".into(), source })?;
    let options = RenderOptions { orientation: input.orientation, ..options.clone() };
    let cam = class_activation_map(input.inference, input.head_weight, input.class);
    let top = top_slices(&cam, &input.geometry, input.depth_mm, options.top_slices, options.min_distance_mm);
    let mut files = Vec::with_capacity(top.len() + 3);
    let cam_path = dir.join("cam.safetensors");
    write_cam(&cam_path, &cam)?;
    files.push(cam_path);

    let mut painter = Painter::new(input, &cam, &options);
    let mut pictures = Vec::with_capacity(top.len());
    for (rank, (index, _)) in top.iter().enumerate() {
        let mut canvas = painter.slice(*index as usize)?;
        painter.annotate(&mut canvas, *index as usize);
        let png = canvas.png()?;
        let name = format!("top-{}.png", rank + 1);
        files.push(write(dir, &name, &png)?);
        pictures.push(png);
    }
    let overview = painter.overview(&top)?;
    files.push(write(dir, "overview.png", &overview)?);
    let html = summary_page(input, &options, &cam, &top, &pictures, &overview);
    let summary_html = write(dir, "summary.html", html.as_bytes())?;
    files.push(summary_html.clone());
    Ok(Explanation { top_slices: top, files, summary_html })
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> Result<PathBuf, ExplainError> {
    let path = dir.join(name);
    std::fs::write(&path, bytes).map_err(|source| ExplainError::Write { file: name.into(), source })?;
    Ok(path)
}

fn check(input: &SeriesToExplain<'_>) -> Result<(), ExplainError> {
    let fits = |what, expected: usize, got: usize| {
        if expected == got { Ok(()) } else { Err(ExplainError::Shape { what, expected, got }) }
    };
    let [channels, d, h, w] = input.inference.feature_shape_cdhw;
    let classes = input.class_names.len();
    fits("the feature map", channels * d * h * w, input.inference.feature_map.len())?;
    fits("the head's weights", classes * channels, input.head_weight.len())?;
    fits("the scores", classes, input.scores.len())?;
    fits("the positions", input.geometry.depth.slices(), input.depth_mm.len())?;
    fits("the rows", input.geometry.in_plane.rows() as usize, input.rows as usize)?;
    fits("the columns", input.geometry.in_plane.columns() as usize, input.columns as usize)?;
    if let Some(shear) = input.shear_px {
        fits("the shear offsets", input.depth_mm.len(), shear.len())?;
    }
    if input.class >= classes {
        return Err(ExplainError::Shape { what: "the class names", expected: input.class + 1, got: classes });
    }
    Ok(())
}

/// Draws slices with one colour scale and one scratch map.
struct Painter<'p, 'a> {
    input: &'p SeriesToExplain<'a>,
    cam: &'p Cam,
    options: &'p RenderOptions,
    top_of_scale: f32,
    map: Vec<f32>,
}

impl<'p, 'a> Painter<'p, 'a> {
    fn new(input: &'p SeriesToExplain<'a>, cam: &'p Cam, options: &'p RenderOptions) -> Self {
        let map = vec![0.0; input.rows as usize * input.columns as usize];
        Self { input, cam, options, top_of_scale: cam.max_positive(), map }
    }

    fn slice(&mut self, index: usize) -> Result<Canvas, ExplainError> {
        let input = self.input;
        let hu = (input.slices)(index).ok_or(ExplainError::MissingSlice { index })?;
        if hu.len() != self.map.len() {
            return Err(ExplainError::Shape { what: "a slice", expected: self.map.len(), got: hu.len() });
        }
        let shifted = input.shear_px.map(|shear| input.geometry.in_plane.shifted(shear[index]));
        let geometry = CamGeometry { in_plane: shifted.as_ref().unwrap_or(input.geometry.in_plane), ..input.geometry };
        slice_map(self.cam, &geometry, input.depth_mm[index], input.rows, input.columns, &mut self.map);
        let scale = (0.0, self.top_of_scale);
        let rgb = render_slice(hu, input.rows, input.columns, &input.window, &self.map, scale, self.options);
        let (width, height) = oriented_size(input.rows, input.columns, input.orientation);
        Ok(Canvas { width: width as usize, height: height as usize, rgb })
    }

    fn annotate(&self, canvas: &mut Canvas, index: usize) {
        let input = self.input;
        let size = if canvas.width >= 400 { 2 } else { 1 };
        let lines = [
            format!("SLICE {}/{}", index + 1, input.depth_mm.len()),
            format!("{:.1} MM", input.depth_mm[index] - input.depth_mm[0]),
            format!("CAM {}", input.class_names[input.class]),
        ];
        for (i, line) in lines.iter().enumerate() {
            canvas.text(6, 6 + (i * (font::HEIGHT + 3) * size) as isize, size, line);
        }
        canvas.sides(size);
        canvas.colour_bar(self.options, &format!("{:.3}", self.top_of_scale));
        if let Some(banner) = input.banner {
            canvas.banner(banner);
        }
    }

    /// Evenly spaced slices over the scan, shrunk; top slices among them are marked.
    fn overview(&mut self, top: &[(u32, f32)]) -> Result<Vec<u8>, ExplainError> {
        let (width, height) = oriented_size(self.input.rows, self.input.columns, self.input.orientation);
        let shrink = (width.max(height) as usize).div_ceil(OVERVIEW_TILE);
        let (tile_w, tile_h) = ((width as usize / shrink).max(1), (height as usize / shrink).max(1));
        let slices = self.input.depth_mm.len();
        let count = self.options.overview_slices.clamp(1, slices);
        let columns = OVERVIEW_COLUMNS.min(count);
        // The banner gets its own line, so that it hides nothing.
        let foot = if self.input.banner.is_some() { 2 * font::HEIGHT + 6 } else { 0 };
        let mut sheet = Canvas::black(columns * tile_w, count.div_ceil(columns) * tile_h + foot);
        for tile in 0..count {
            let index = ((tile as f64 + 0.5) * slices as f64 / count as f64) as usize;
            let index = index.min(slices - 1);
            let (x, y) = (tile % columns * tile_w, tile / columns * tile_h);
            let canvas = self.slice(index)?;
            sheet.paste_shrunk(&canvas, shrink, x, y);
            let mark = if top.iter().any(|t| t.0 as usize == index) { " TOP" } else { "" };
            sheet.text(x as isize + 4, y as isize + 4, 1, &format!("{}/{slices}{mark}", index + 1));
        }
        if let Some(banner) = self.input.banner {
            sheet.banner(banner);
        }
        sheet.png()
    }
}

/// Text as HTML content or attribute value.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
    }
    out
}

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:0 auto;padding:1rem;background:#16181c;color:#e8e8e8}\
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.15rem;margin:1.5rem 0 .5rem}\
.banner{background:#b00020;color:#fff;font-weight:700;padding:.6rem 1rem;border-radius:.3rem}\
table{border-collapse:collapse}td,th{padding:.25rem .8rem .25rem 0;text-align:left}\
.bar{display:inline-block;height:.8rem;background:#f98e09;border-radius:.2rem;vertical-align:middle}\
.predicted{font-weight:700}.pictures{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;flex:1 1 20rem;max-width:34rem}\
img{width:100%;height:auto;background:#000}figcaption,.small{color:#b9bec6;font-size:.9rem}";

fn summary_page(
    input: &SeriesToExplain<'_>,
    options: &RenderOptions,
    cam: &Cam,
    top: &[(u32, f32)],
    pictures: &[Vec<u8>],
    overview: &[u8],
) -> String {
    let class_name = escaped(&input.class_names[input.class]);
    let predicted = (0..input.scores.len()).reduce(|a, b| if input.scores[b] > input.scores[a] { b } else { a });
    let embedded: usize = pictures.iter().map(Vec::len).sum::<usize>() + overview.len();
    let mut page = String::with_capacity(embedded * 4 / 3 + 16 * 1024);
    // Writing to a String cannot fail.
    let _ = write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>Series explanation</title><style>{STYLE}</style></head>\n<body>\n"
    );
    if let Some(banner) = input.banner {
        let _ = writeln!(page, "<p class=\"banner\" role=\"alert\">{}</p>", escaped(banner));
    }
    let predicted_name = predicted.map_or_else(String::new, |p| escaped(&input.class_names[p]));
    let _ =
        writeln!(page, "<h1>Predicted: {predicted_name}</h1>\n<table><tr><th>Class</th><th>Score</th><th></th></tr>");
    for (i, (name, score)) in input.class_names.iter().zip(input.scores).enumerate() {
        let class = if Some(i) == predicted { " class=\"predicted\"" } else { "" };
        let bar = f64::from(*score).clamp(0.0, 1.0) * 12.0;
        let _ = writeln!(
            page,
            "<tr{class}><td>{}</td><td>{score:.4}</td><td><span class=\"bar\" style=\"width:{bar:.2}rem\"></span></td></tr>",
            escaped(name)
        );
    }
    page.push_str("</table>\n");
    if !input.notes.is_empty() {
        page.push_str("<h2>Quality notes</h2>\n<ul>\n");
        for note in input.notes {
            let _ = writeln!(page, "<li>{}</li>", escaped(note));
        }
        page.push_str("</ul>\n");
    }
    let _ = writeln!(page, "<h2>Slices that raised the score of {class_name} most</h2>\n<div class=\"pictures\">");
    let total = input.depth_mm.len();
    let (width, height) = oriented_size(input.rows, input.columns, input.orientation);
    let [row_mm, column_mm] = input.pixel_spacing_mm;
    let (pixel_w_mm, pixel_h_mm) = if input.orientation.transpose { (row_mm, column_mm) } else { (column_mm, row_mm) };
    let (width_mm, height_mm) = (f64::from(width) * pixel_w_mm, f64::from(height) * pixel_h_mm);
    for ((index, mass), png) in top.iter().zip(pictures) {
        let at = input.depth_mm[*index as usize] - input.depth_mm[0];
        let number = index + 1;
        let _ = writeln!(
            page,
            "<figure><img alt=\"Slice {number} of {total} with the class activation map\" \
             style=\"aspect-ratio:{width_mm:.3}/{height_mm:.3}\" src=\"data:image/png;base64,{}\">\
             <figcaption>Slice {number} of {total}, {at:.1} mm from the first slice at the feet; mean positive map {mass:.4}\
             </figcaption></figure>",
            BASE64.encode(png)
        );
    }
    let _ = writeln!(
        page,
        "</div>\n<h2>Overview</h2>\n<figure style=\"max-width:64rem\"><img alt=\"Evenly spaced slices with the class activation map\" \
         src=\"data:image/png;base64,{}\"><figcaption>Evenly spaced slices from feet to head, one colour scale.</figcaption></figure>",
        BASE64.encode(overview)
    );
    let [d, h, w] = cam.shape_dhw;
    let crop = input.geometry.in_plane.crop();
    let coverage = input.geometry.depth.coverage();
    let planes_mm = coverage.pitch_mm * input.geometry.input_dhw[0] as f64;
    let cell = [
        planes_mm / d.max(1) as f64,
        crop.rows * pixel_h_mm / h.max(1) as f64,
        crop.cols * pixel_w_mm / w.max(1) as f64,
    ];
    let _ = write!(
        page,
        "<h2>How to read this</h2>\n<p class=\"small\">Colours show the class activation map of {class_name}: which parts of the \
         scan raised its score. The map has {d} x {h} x {w} cells of about {:.0} x {:.0} x {:.0} mm; edges finer than that come from \
         interpolation. It is no segmentation and no measurement, and it can be bright where nothing is wrong. Scale: 0 to {:.4}, \
         values below {:.0} % of it, negative ones among them, are not drawn. Outside the analysed field nothing is drawn. \
         Rows run to posterior, the patient&#39;s left is on the right.</p>\n\
         <p class=\"small\">Model {}, trained on: {}. Window centre {} HU, width {} HU. {total} slices.</p>\n</body></html>\n",
        cell[0],
        cell[1],
        cell[2],
        cam.max_positive(),
        options.threshold * 100.0,
        escaped(input.model_id),
        escaped(input.trained_on),
        input.window.center_hu,
        input.window.width_hu,
    );
    page
}
