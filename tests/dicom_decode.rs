//! Real CT slices in every transfer syntax decode to the same HU.
//!
//! Needs the folder of real CT archives named by `DARNET_TEST_DATA`; without it these tests say that they were not run.

use darnet::dicom::decode::PixelDecoder;
use darnet::dicom::header::{SliceHeader, judge, parse_header};
use darnet::dicom::part10::{Part10, read_part10};
use darnet::volume::refusal::{Reason, Refusal};
use std::path::Path;
use std::process::Command;

const MAX: u64 = 64 << 20;

/// Unpacks an archive of real data, or says that the test was not run.
fn unpack(archive: &str) -> Option<tempfile::TempDir> {
    let Some(folder) = std::env::var_os("DARNET_TEST_DATA") else {
        eprintln!("not run: DARNET_TEST_DATA names no folder with {archive}");
        return None;
    };
    let file = Path::new(&folder).join(archive);
    assert!(file.is_file(), "{archive} is missing in the folder DARNET_TEST_DATA names");
    let dir = tempfile::tempdir().unwrap();
    let status = Command::new("tar").arg("xf").arg(&file).arg("-C").arg(dir.path()).status();
    assert!(status.expect("tar is needed: apt-get install tar xz-utils").success(), "cannot unpack {archive}");
    Some(dir)
}

fn load(path: &Path) -> (Part10, SliceHeader) {
    let part = read_part10(path, MAX).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let header = parse_header(part.dataset(), &part.transfer_syntax_uid).unwrap();
    (part, header)
}

fn decode(path: &Path) -> Result<(SliceHeader, Vec<i16>), Refusal> {
    let (part, header) = load(path);
    let mut out = vec![0; (header.rows * header.columns) as usize];
    PixelDecoder::new().decode_hu(part.dataset(), &part.transfer_syntax_uid, &header, &mut out)?;
    Ok((header, out))
}

#[test]
fn every_lossless_encoding_of_one_slice_gives_the_same_hu_and_header() {
    let Some(dir) = unpack("encodings.tar.xz") else { return };
    let dir = dir.path().join("encodings");
    let (header, expected) = decode(&dir.join("lidc0350.evrle.dcm")).unwrap();
    assert_eq!(judge(&header), Ok(()));
    let (low, high) = expected.iter().fold((i16::MAX, i16::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    assert!(low >= -2048 && high > 500, "plausible HU, got {low} to {high}");
    for name in ["ivrle", "evrbe", "deflate", "rle", "jpegll_p14", "jpegll_sv1", "j2k_ll"] {
        let (other, hu) = decode(&dir.join(format!("lidc0350.{name}.dcm"))).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(hu == expected, "{name}");
        assert_eq!(other.geometry, header.geometry, "{name}");
        assert_eq!(other.series_instance_uid, header.series_instance_uid, "{name}");
    }
}

#[test]
fn jpeg_ls_decodes_with_its_feature_and_is_refused_clearly_without() {
    let Some(dir) = unpack("encodings.tar.xz") else { return };
    let dir = dir.path().join("encodings");
    let result = decode(&dir.join("lidc0350.jpegls.dcm"));
    if cfg!(feature = "charls") {
        assert!(result.unwrap().1 == decode(&dir.join("lidc0350.evrle.dcm")).unwrap().1);
        for slice in ["CT1", "CT2"] {
            let lossless = decode(&dir.join(format!("wg04_{slice}_RLE.dcm"))).unwrap().1;
            assert!(decode(&dir.join(format!("wg04_{slice}_JLSL.dcm"))).unwrap().1 == lossless, "{slice}");
            let near = decode(&dir.join(format!("wg04_{slice}_JLSN.dcm"))).unwrap().1;
            // Near-lossless misses the padding value, so all below air counts as air.
            let air = |v: &i16| i32::from((*v).max(-1024));
            let worst = near.iter().zip(&lossless).map(|(a, b)| (air(a) - air(b)).abs()).max();
            assert!(worst.unwrap() <= 16, "near-lossless {slice} differs by {worst:?}");
        }
    } else {
        let refusal = result.unwrap_err();
        assert_eq!(refusal.reason, Reason::Undecodable);
        assert!(refusal.detail.contains("charls"), "{refusal}");
    }
}

#[test]
fn the_nema_slices_decode_alike_in_each_lossless_codec() {
    let Some(dir) = unpack("encodings.tar.xz") else { return };
    let dir = dir.path().join("encodings");
    for slice in ["CT1", "CT2"] {
        let (_, expected) = decode(&dir.join(format!("wg04_{slice}_RLE.dcm"))).unwrap();
        for codec in ["J2KR", "JPLL"] {
            let (_, hu) = decode(&dir.join(format!("wg04_{slice}_{codec}.dcm"))).unwrap();
            assert!(hu == expected, "{slice} {codec}");
        }
        // Irreversible JPEG 2000: near, not equal. It blurs the padding value too, so all below air counts as air.
        let (_, lossy) = decode(&dir.join(format!("wg04_{slice}_J2KI.dcm"))).unwrap();
        let air = |v: &i16| i32::from((*v).max(-1024));
        let sum: i64 = lossy.iter().zip(&expected).map(|(a, b)| i64::from((air(a) - air(b)).abs())).sum();
        let mean = sum as f64 / expected.len() as f64;
        assert!(mean < 60.0, "lossy {slice} differs by {mean} HU on average");
    }
}

#[test]
fn the_small_ct_decodes_and_what_has_no_decoder_is_refused() {
    let Some(dir) = unpack("encodings.tar.xz") else { return };
    let dir = dir.path().join("encodings");
    let (header, hu) = decode(&dir.join("CT_small.dcm")).unwrap();
    assert_eq!((header.rows, header.columns, hu.len()), (128, 128, 128 * 128));
    let lossy = decode(&dir.join("lidc0350.jpegext12.dcm")).unwrap_err();
    assert_eq!(lossy.reason, Reason::Undecodable);
    assert!(lossy.detail.contains("no decoder"), "{lossy}");
    let (_, enhanced) = load(&dir.join("eCT_Supplemental.dcm"));
    let refusal = judge(&enhanced).unwrap_err();
    assert_eq!(refusal.reason, Reason::Undecodable);
    assert!(refusal.detail.contains("multi-frame"), "{refusal}");
}

#[test]
fn every_slice_of_a_real_chest_series_is_accepted() {
    let Some(dir) = unpack("lidc-idri-0306.tar.xz") else { return };
    let mut files = Vec::new();
    let mut folders = vec![dir.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "dcm") {
                files.push(path);
            }
        }
    }
    assert_eq!(files.len(), 123);
    let mut decoder = PixelDecoder::new();
    let mut hu = vec![0; 512 * 512];
    let mut elapsed = std::time::Duration::ZERO;
    let mut decoding = std::time::Duration::ZERO;
    for file in &files {
        let part = read_part10(file, MAX).unwrap();
        let start = std::time::Instant::now();
        let header = parse_header(part.dataset(), &part.transfer_syntax_uid).unwrap();
        elapsed += start.elapsed();
        assert_eq!(judge(&header), Ok(()));
        let start = std::time::Instant::now();
        decoder.decode_hu(part.dataset(), &part.transfer_syntax_uid, &header, &mut hu).unwrap();
        decoding += start.elapsed();
        assert!(*hu.iter().min().unwrap() >= -3024 && *hu.iter().max().unwrap() > 0);
    }
    eprintln!("header {:?}, pixels {:?} a slice", elapsed / 123, decoding / 123);
}

#[test]
fn mutated_compressed_slices_never_panic() {
    let Some(dir) = unpack("encodings.tar.xz") else { return };
    let dir = dir.path().join("encodings");
    // A fixed linear congruential sequence: the same mutations each time.
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = move |bound: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % bound
    };
    for name in ["wg04_CT2_RLE", "wg04_CT2_JPLL", "wg04_CT2_J2KI", "wg04_CT2_JLSN", "lidc0350.deflate"] {
        let (part, _) = load(&dir.join(format!("{name}.dcm")));
        let pristine = part.dataset().to_vec();
        for round in 0..6 {
            let mut bytes = pristine.clone();
            for _ in 0..4 {
                let at = next(bytes.len());
                bytes[at] = next(256) as u8;
            }
            if round % 3 == 2 {
                bytes.truncate(next(bytes.len()));
            }
            let Ok(header) = parse_header(&bytes, &part.transfer_syntax_uid) else { continue };
            if header.pixel_fault.is_none() {
                let mut out = vec![0; (header.rows * header.columns) as usize];
                let _ = PixelDecoder::new().decode_hu(&bytes, &part.transfer_syntax_uid, &header, &mut out);
            }
        }
    }
}
