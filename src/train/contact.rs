//! Contact sheets: what is in a cache, for people to look at.
//!
//! Input: a cache. Output: `NNN.png`, [`ROWS`] x [`COLUMNS`] cases a sheet in the order of the cache. Each case shows three
//! axial planes (at a quarter, a half and three quarters of the depth) under a bar in the colour of its class with the
//! case's index; lesion masks are outlined. Deliberately absent: names.

use std::path::Path;

use rayon::prelude::*;

use crate::explain::font;
use crate::train::cache::{Cache, write_atomically};
use crate::train::error::TrainDataError;

/// Cases above one another.
pub const ROWS: usize = 8;
/// Cases beside one another.
pub const COLUMNS: usize = 4;
/// Longest side of a plane on a sheet; larger ones are thinned out.
const MAX_SIDE: usize = 112;
/// Height of the bar.
const BAR: usize = 11;
/// Colours of the classes: orange, red, green; others take turns.
const CLASS_COLOURS: [[u8; 3]; 6] =
    [[230, 140, 30], [210, 50, 50], [60, 150, 70], [70, 110, 200], [150, 80, 180], [110, 110, 110]];
const OUTLINE: [u8; 3] = [255, 60, 60];

struct Sheet {
    width: usize,
    pixels: Vec<u8>,
}

impl Sheet {
    fn put(&mut self, x: usize, y: usize, colour: [u8; 3]) {
        let at = (y * self.width + x) * 3;
        self.pixels[at..at + 3].copy_from_slice(&colour);
    }
}

/// Draws all sheets into `dir`; sheets of an earlier run that are not needed any more go.
///
/// # Errors
/// Trouble with the file system.
pub fn write_sheets(cache: &Cache, dir: &Path) -> Result<usize, TrainDataError> {
    std::fs::create_dir_all(dir).map_err(TrainDataError::io("make folder", dir))?;
    let cases: Vec<usize> = (0..cache.cases().len()).collect();
    let sheets: Vec<&[usize]> = cases.chunks(ROWS * COLUMNS).collect();
    let results: Vec<Result<(), TrainDataError>> = sheets
        .par_iter()
        .enumerate()
        .map(|(n, cases)| write_sheet(cache, cases, &dir.join(format!("{n:03}.png"))))
        .collect();
    results.into_iter().collect::<Result<(), _>>()?;
    for entry in std::fs::read_dir(dir).map_err(TrainDataError::io("list", dir))? {
        let path = entry.map_err(TrainDataError::io("list", dir))?.path();
        let number = path.file_stem().and_then(|s| s.to_string_lossy().parse::<usize>().ok());
        if path.extension().is_some_and(|e| e == "png") && number.is_some_and(|n| n >= sheets.len()) {
            std::fs::remove_file(&path).map_err(TrainDataError::io("remove", &path))?;
        }
    }
    Ok(sheets.len())
}

fn write_sheet(cache: &Cache, cases: &[usize], path: &Path) -> Result<(), TrainDataError> {
    let [d, h, w] = cache.input_dhw();
    let step = h.max(w).div_ceil(MAX_SIDE);
    let (th, tw) = (h.div_ceil(step), w.div_ceil(step));
    let (tile_w, tile_h) = (3 * tw + 2, th + BAR + 2);
    let rows = cases.len().div_ceil(COLUMNS);
    let mut sheet = Sheet { width: COLUMNS * tile_w, pixels: vec![0; COLUMNS * tile_w * rows * tile_h * 3] };
    for (place, &index) in cases.iter().enumerate() {
        let (x0, y0) = ((place % COLUMNS) * tile_w, (place / COLUMNS) * tile_h);
        let case = &cache.cases()[index];
        let colour = CLASS_COLOURS[case.class % CLASS_COLOURS.len()];
        for y in 0..BAR {
            for x in 0..tile_w - 2 {
                sheet.put(x0 + x, y0 + y, colour);
            }
        }
        let key = cache.class_names().get(case.class).map_or("", String::as_str);
        for (x, y) in font::dots(&format!("{index} {key}")) {
            if x + 2 < tile_w - 2 {
                sheet.put(x0 + x + 2, y0 + y + 2, [255, 255, 255]);
            }
        }
        let (volume, mask) = (cache.volume(index), cache.mask(index));
        for part in 0..3 {
            let plane = ((part + 1) * d / 4).min(d - 1) * h * w;
            for ty in 0..th {
                for tx in 0..tw {
                    let (y, x) = (ty * step, tx * step);
                    let at = plane + y * w + x;
                    let grey = (volume[at].to_f32() * 255.0 + 0.5) as u8;
                    let edge = mask.is_some_and(|m| {
                        let inside = |y: usize, x: usize| y < h && x < w && m[plane + y * w + x] == 1;
                        let near = [(y + step, x), (y.wrapping_sub(step), x), (y, x + step), (y, x.wrapping_sub(step))];
                        inside(y, x) && near.into_iter().any(|(y, x)| !inside(y, x))
                    });
                    sheet.put(x0 + part * tw + tx, y0 + BAR + ty, if edge { OUTLINE } else { [grey; 3] });
                }
            }
        }
    }
    let height = rows * tile_h;
    write_atomically("write a contact sheet", path, |out| {
        let mut encoder = png::Encoder::new(out, sheet.width as u32, height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let as_io = |e| match e {
            png::EncodingError::IoError(e) => e,
            other => std::io::Error::other(other),
        };
        let mut writer = encoder.write_header().map_err(as_io)?;
        writer.write_image_data(&sheet.pixels).map_err(as_io)?;
        writer.finish().map_err(as_io)
    })
}
