//! MetaImage: `.mha`, and `.mhd` with its raw file beside it.
//!
//! Input: a file: lines of `Key = value` up to `ElementDataFile`, then voxels, the first axis fastest, perhaps through
//! zlib. Output: [`Loaded`] slices; values are HU, rounded and saturated. Coordinates are LPS, as ITK writes them.
//!
//! Deliberately absent: lists of files, several channels, other numbers of axes than three, `ElementToIntensity…`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use crate::scan::{Loaded, MAX_FILE_BYTES, VoxelGrid, slices_of_grid, to_hu, undecodable};
use crate::volume::geometry::GeometryLimits;
use crate::volume::refusal::Refusal;

/// Longest header; those of ITK have less than 1 KiB.
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Most voxels along an axis, as everywhere.
const MAX_SIDE: usize = 4096;
/// Most bytes of voxels: 2 GiB, a thousand slices of 512 x 512 doubles.
const MAX_VOXEL_BYTES: usize = 2 << 30;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Element {
    I8,
    U8,
    I16,
    U16,
    I32,
    U32,
    F32,
    F64,
}

impl Element {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "MET_CHAR" => Self::I8,
            "MET_UCHAR" => Self::U8,
            "MET_SHORT" => Self::I16,
            "MET_USHORT" => Self::U16,
            // A MetaImage's long has 32 bits, like its int.
            "MET_INT" | "MET_LONG" => Self::I32,
            "MET_UINT" | "MET_ULONG" => Self::U32,
            "MET_FLOAT" => Self::F32,
            "MET_DOUBLE" => Self::F64,
            _ => return None,
        })
    }

    fn bytes(self) -> usize {
        match self {
            Self::I8 | Self::U8 => 1,
            Self::I16 | Self::U16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    fn hu(self, bytes: &[u8], msb: bool) -> i16 {
        let mut b = [0u8; 8];
        let n = self.bytes();
        b[..n].copy_from_slice(&bytes[..n]);
        if msb {
            b[..n].reverse();
        }
        let saturated = |v: i64| v.clamp(i64::from(i16::MIN), i64::from(i16::MAX)) as i16;
        match self {
            Self::I8 => i16::from(b[0] as i8),
            Self::U8 => i16::from(b[0]),
            Self::I16 => i16::from_le_bytes([b[0], b[1]]),
            Self::U16 => saturated(i64::from(u16::from_le_bytes([b[0], b[1]]))),
            Self::I32 => saturated(i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            Self::U32 => saturated(i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            Self::F32 => to_hu(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::F64 => to_hu(f64::from_le_bytes(b) as f32),
        }
    }
}

#[derive(Clone, Debug)]
struct Header {
    element: Element,
    msb: bool,
    compressed: bool,
    grid: VoxelGrid,
    /// `LOCAL` or the name of a file beside.
    data_file: String,
    /// Where the voxels start in this file; in a file beside, how many bytes it has before them. `None`: they end it.
    skip: Option<u64>,
}

fn numbers<const N: usize>(key: &str, text: &str) -> Result<[f64; N], Refusal> {
    let fault = || undecodable(format!("MetaImage {key}: expected {N} finite numbers"));
    let values: Vec<f64> = text.split_whitespace().map_while(|t| t.parse().ok()).collect();
    let values: [f64; N] = values.try_into().map_err(|_| fault())?;
    if values.iter().all(|v| v.is_finite()) { Ok(values) } else { Err(fault()) }
}

fn flag(key: &str, text: &str) -> Result<bool, Refusal> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(undecodable(format!("MetaImage {key}: expected True or False"))),
    }
}

/// Parses the lines at the start of `bytes`.
fn header(bytes: &[u8]) -> Result<Header, Refusal> {
    let mut element = None;
    let (mut msb, mut compressed) = (false, false);
    let mut dims = None;
    let mut spacing = [1.0; 3];
    let mut origin = [0.0; 3];
    let mut directions = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
    let mut header_size = 0i64;
    let mut at = 0usize;
    while let Some(len) = bytes[at..].iter().position(|b| *b == b'\n') {
        let line =
            std::str::from_utf8(&bytes[at..at + len]).map_err(|_| undecodable("MetaImage: a line is no text"))?;
        at += len + 1;
        let Some((key, value)) = line.split_once('=') else {
            return Err(undecodable("MetaImage: expected lines of `Key = value`"));
        };
        let (key, value) = (key.trim(), value.trim());
        match key {
            "ObjectType" if value != "Image" => return Err(undecodable("MetaImage: expected ObjectType Image")),
            "NDims" if value != "3" => return Err(undecodable("MetaImage: expected NDims 3")),
            "ElementNumberOfChannels" if value != "1" => {
                return Err(undecodable("MetaImage: expected one channel"));
            }
            "DimSize" => {
                let d: [f64; 3] = numbers(key, value)?;
                if d.iter().any(|v| !(1.0..=MAX_SIDE as f64).contains(v) || v.fract() != 0.0) {
                    return Err(undecodable(format!("MetaImage DimSize: expected 1 to {MAX_SIDE} along each axis")));
                }
                dims = Some(d.map(|v| v as usize));
            }
            "ElementType" => {
                let known = Element::parse(value);
                element = Some(known.ok_or_else(|| undecodable("MetaImage ElementType: expected one number a voxel"))?);
            }
            "ElementSpacing" => spacing = numbers(key, value)?,
            "ElementSize" => {}
            "Offset" | "Position" | "Origin" => origin = numbers(key, value)?,
            "TransformMatrix" | "Rotation" | "Orientation" => directions = numbers(key, value)?,
            "BinaryDataByteOrderMSB" | "ElementByteOrderMSB" => msb = flag(key, value)?,
            "BinaryData" if !flag(key, value)? => return Err(undecodable("MetaImage: expected binary data")),
            "CompressedData" => compressed = flag(key, value)?,
            "HeaderSize" => header_size = value.parse().map_err(|_| undecodable("MetaImage HeaderSize: no number"))?,
            "ElementDataFile" => {
                let element = element.ok_or_else(|| undecodable("MetaImage: expected ElementType"))?;
                let dims = dims.ok_or_else(|| undecodable("MetaImage: expected DimSize"))?;
                if spacing.iter().any(|s: &f64| *s <= 0.0) {
                    return Err(undecodable("MetaImage ElementSpacing: expected positive numbers"));
                }
                // Row `i` of the matrix is the direction of file axis `i`.
                let step_mm = std::array::from_fn(|i| std::array::from_fn(|k| directions[3 * i + k] * spacing[i]));
                let local = value.eq_ignore_ascii_case("LOCAL");
                let skip = match (header_size, local) {
                    (-1, _) => None,
                    (_, true) => Some(at as u64),
                    (n, false) => Some(u64::try_from(n).map_err(|_| undecodable("MetaImage HeaderSize: negative"))?),
                };
                let grid = VoxelGrid { dims, origin_mm: origin, step_mm };
                return Ok(Header { element, msb, compressed, grid, data_file: value.to_owned(), skip });
            }
            _ => {}
        }
    }
    Err(undecodable("MetaImage: expected a header that ends with ElementDataFile"))
}

/// Reads a file.
///
/// # Errors
/// `undecodable` for a header or voxels that are not as they should be; `too_many_slices`; an impossible geometry.
pub fn load(path: &Path, limits: &GeometryLimits) -> Result<Loaded, Refusal> {
    let read = |e: std::io::Error| undecodable(format!("read MetaImage: {e}"));
    let mut file = File::open(path).map_err(read)?;
    let mut head = Vec::new();
    (&mut file).take(MAX_HEADER_BYTES as u64).read_to_end(&mut head).map_err(read)?;
    let header = header(&head)?;
    let mut data = if header.data_file.eq_ignore_ascii_case("LOCAL") {
        file
    } else {
        let plain = !header.data_file.contains(['/', '\\']) && !header.data_file.starts_with('.');
        if !plain || header.data_file.split_whitespace().count() != 1 || header.data_file == "LIST" {
            return Err(undecodable("MetaImage ElementDataFile: expected LOCAL or the name of one file beside"));
        }
        File::open(path.with_file_name(&header.data_file)).map_err(read)?
    };
    let dims = header.grid.dims;
    let len = dims.iter().product::<usize>() * header.element.bytes();
    let size = data.metadata().map_err(read)?.len();
    if len > MAX_VOXEL_BYTES || size > MAX_FILE_BYTES.max(MAX_VOXEL_BYTES as u64) {
        return Err(undecodable(format!("MetaImage: expected at most {MAX_VOXEL_BYTES} bytes of voxels")));
    }
    let start = match header.skip {
        Some(start) => start,
        // Voxels that are compressed have no length to count back from.
        None if header.compressed => return Err(undecodable("MetaImage HeaderSize: -1 with compressed data")),
        None => size.checked_sub(len as u64).ok_or_else(|| undecodable("MetaImage: fewer voxels than DimSize says"))?,
    };
    data.seek(SeekFrom::Start(start)).map_err(read)?;
    let mut voxels = vec![0u8; len];
    let whole = if header.compressed {
        flate2::read::ZlibDecoder::new(std::io::BufReader::new(data)).read_exact(&mut voxels)
    } else {
        data.read_exact(&mut voxels)
    };
    whole.map_err(|e| undecodable(format!("MetaImage: fewer voxels than DimSize says: {e}")))?;
    let (element, msb, bytes) = (header.element, header.msb, header.element.bytes());
    let (geometry, hu) = slices_of_grid(&header.grid, limits, |[x, y, z]| {
        element.hu(&voxels[((z * dims[1] + y) * dims[0] + x) * bytes..], msb)
    })?;
    Ok(Loaded { geometry, hu, notes: vec!["MetaImage: voxel values are taken as HU".to_owned()] })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const LIMITS: fn() -> GeometryLimits = || GeometryLimits { min_slices: 2, ..GeometryLimits::default() };

    fn text(extra: &str, file: &str) -> String {
        format!(
            "ObjectType = Image\nNDims = 3\nBinaryData = True\n{extra}TransformMatrix = 1 0 0 0 1 0 0 0 1\n\
             Offset = -10 -20 -30\nElementSpacing = 0.7 0.8 2.5\nDimSize = 3 2 4\nElementDataFile = {file}\n"
        )
    }

    fn values() -> Vec<i16> {
        (0..24).map(|i| i * 50 - 1000).collect()
    }

    #[test]
    fn every_type_order_and_packing_gives_the_same_slices() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scan.mha");
        let mut seen = Vec::new();
        for (kind, msb, packed) in [
            ("MET_SHORT", false, false),
            ("MET_SHORT", true, false),
            ("MET_SHORT", false, true),
            ("MET_INT", true, true),
            ("MET_FLOAT", false, false),
            ("MET_DOUBLE", true, false),
        ] {
            let mut bytes = Vec::new();
            for v in values() {
                let mut b = match kind {
                    "MET_SHORT" => v.to_le_bytes().to_vec(),
                    "MET_INT" => i32::from(v).to_le_bytes().to_vec(),
                    "MET_FLOAT" => f32::from(v).to_le_bytes().to_vec(),
                    _ => f64::from(v).to_le_bytes().to_vec(),
                };
                if msb {
                    b.reverse();
                }
                bytes.extend(b);
            }
            let name = |b: bool| if b { "True" } else { "False" };
            let extra = format!(
                "ElementType = {kind}\nBinaryDataByteOrderMSB = {}\nCompressedData = {}\n",
                name(msb),
                name(packed)
            );
            let mut file = text(&extra, "LOCAL").into_bytes();
            if packed {
                let mut z = flate2::write::ZlibEncoder::new(&mut file, flate2::Compression::fast());
                z.write_all(&bytes).unwrap();
                z.finish().unwrap();
            } else {
                file.extend(bytes);
            }
            std::fs::write(&path, file).unwrap();
            seen.push(load(&path, &LIMITS()).unwrap());
        }
        assert!(seen.windows(2).all(|w| w[0] == w[1]));
        let scan = seen.remove(0).into_scan(&LIMITS()).unwrap();
        assert_eq!((scan.stack.rows, scan.stack.columns, scan.hu.len()), (2, 3, 4));
        assert_eq!(scan.stack.pixel_spacing_mm, [0.8, 0.7]);
        assert_eq!(scan.stack.spacing_mm, 2.5);
        assert_eq!(scan.hu.concat(), values());
    }

    #[test]
    fn a_header_may_name_a_file_beside_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scan.mhd");
        let raw: Vec<u8> = values().iter().flat_map(|v| v.to_le_bytes()).collect();
        std::fs::write(dir.path().join("scan.raw"), [b"junk".as_slice(), &raw].concat()).unwrap();
        std::fs::write(&path, text("ElementType = MET_SHORT\nHeaderSize = -1\n", "scan.raw")).unwrap();
        assert_eq!(load(&path, &LIMITS()).unwrap().hu.concat(), values());
        for name in ["../scan.raw", "sub/scan.raw", "LIST", "scan%d.raw 1 4 1"] {
            std::fs::write(&path, text("ElementType = MET_SHORT\n", name)).unwrap();
            assert!(load(&path, &LIMITS()).is_err(), "{name}");
        }
    }

    #[test]
    fn bad_headers_and_short_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scan.mha");
        let good = text("ElementType = MET_SHORT\n", "LOCAL");
        for bad in [
            String::new(),
            "no header".to_owned(),
            good.clone(),
            good.replace("NDims = 3", "NDims = 4"),
            good.replace("DimSize = 3 2 4", "DimSize = 3 2"),
            good.replace("DimSize = 3 2 4", "DimSize = 99999 99999 99999"),
            good.replace("0.7 0.8 2.5", "0.7 -0.8 2.5"),
            good.replace("MET_SHORT", "MET_SHORT_ARRAY"),
            good.replace("1 0 0 0 1 0 0 0 1", "nan 0 0 0 1 0 0 0 1"),
            good.replace("1 0 0 0 1 0 0 0 1", "0 0 0 0 0 0 0 0 0"),
            good.replace("BinaryData = True", "CompressedData = True"),
        ] {
            std::fs::write(&path, &bad).unwrap();
            assert!(load(&path, &LIMITS()).is_err(), "{bad}");
        }
    }
}
