use super::*;

fn small(class: PhantomClass, seed: u64) -> PhantomSpec {
    PhantomSpec::random(class, seed).with_shape(24, 96, 96)
}

/// Writes pictures of a few phantoms for a person to look at; only when `DARNET_PHANTOM_DUMP` names a folder.
#[test]
fn dump_pictures() {
    let Ok(dir) = std::env::var("DARNET_PHANTOM_DUMP") else { return };
    let seed: u64 = std::env::var("DARNET_PHANTOM_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let side: usize = std::env::var("DARNET_PHANTOM_SIDE").ok().and_then(|s| s.parse().ok()).unwrap_or(384);
    for &class in PhantomClass::ALL {
        let spec = PhantomSpec::random(class, seed);
        let spec = spec.with_shape(160, side, side);
        let start = std::time::Instant::now();
        let scene = scene_of(&spec, &Acquisition::default());
        let prepared = start.elapsed();
        drop(scene);
        let p = generate(&spec);
        println!("{spec:?}\nscene {prepared:?}, all {:?}", start.elapsed());
        picture::axial(&p, std::path::Path::new(&dir), -600.0, 1500.0, "lung");
        picture::axial(&p, std::path::Path::new(&dir), 40.0, 400.0, "soft");
        picture::coronal(&p, std::path::Path::new(&dir));
    }
}

mod picture {
    use super::*;
    use std::path::Path;

    fn grey(v: i16, c: f64, w: f64) -> u8 {
        ((f64::from(v) - c + 0.5 * w) * 255.0 / w).clamp(0.0, 255.0) as u8
    }

    fn save(path: &Path, w: usize, h: usize, data: &[u8]) {
        let file = std::fs::File::create(path).expect("create picture");
        let mut e = png::Encoder::new(std::io::BufWriter::new(file), w as u32, h as u32);
        e.set_color(png::ColorType::Grayscale);
        e.set_depth(png::BitDepth::Eight);
        e.write_header().expect("header").write_image_data(data).expect("data");
    }

    /// Six axial slices, two rows of three.
    pub fn axial(p: &Phantom, dir: &Path, c: f64, w: f64, name: &str) {
        let (h, wd) = (p.spec.rows, p.spec.columns);
        let mut out = vec![0u8; 6 * h * wd];
        for (i, f) in [0.88, 0.72, 0.6, 0.48, 0.33, 0.18].into_iter().enumerate() {
            let s = p.slice((f * p.spec.slices as f64) as usize);
            for r in 0..h {
                for col in 0..wd {
                    out[((i / 3) * h + r) * 3 * wd + (i % 3) * wd + col] = grey(s[r * wd + col], c, w);
                }
            }
        }
        save(&dir.join(format!("{}-{name}.png", p.spec.class)), 3 * wd, 2 * h, &out);
    }

    /// Coronal planes at two depths in the lung and bone windows, a sagittal one, and labels.
    pub fn coronal(p: &Phantom, dir: &Path) {
        let (d, h, wd) = (p.spec.slices, p.spec.rows, p.spec.columns);
        let ratio = p.spec.spacing_mm / p.spec.pixel_spacing_mm;
        let height = (d as f64 * ratio) as usize;
        let mut out = vec![0u8; 4 * wd * height];
        for r in 0..height {
            let k = d - 1 - ((r as f64 / ratio) as usize).min(d - 1);
            for col in 0..wd {
                let at = |row: usize, col: usize| p.hu[(k * h + row) * wd + col];
                out[r * 4 * wd + col] = grey(at(h / 2, col), -600.0, 1500.0);
                out[r * 4 * wd + wd + col] = grey(at(h * 62 / 100, col), -600.0, 1500.0);
                out[r * 4 * wd + 2 * wd + col] = grey(at(col.min(h - 1), wd * 32 / 100), -600.0, 1500.0);
                let mip = (0..h).map(|row| at(row, col)).max().unwrap_or(0);
                out[r * 4 * wd + 3 * wd + col] = grey(mip, 400.0, 1400.0);
            }
        }
        save(&dir.join(format!("{}-coronal.png", p.spec.class)), 4 * wd, height, &out);
        let mut out = vec![0u8; 6 * h * wd];
        for (i, f) in [0.88, 0.72, 0.6, 0.48, 0.33, 0.18].into_iter().enumerate() {
            let k = (f * d as f64) as usize;
            for r in 0..h {
                for col in 0..wd {
                    let j = r * wd + col;
                    let v = p.lung_slice(k)[j] * 30 + p.lesion_slice(k)[j] * 60;
                    out[((i / 3) * h + r) * 3 * wd + (i % 3) * wd + col] = v;
                }
            }
        }
        save(&dir.join(format!("{}-labels.png", p.spec.class)), 3 * wd, 2 * h, &out);
    }
}
