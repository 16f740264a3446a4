//! The phantom's files, read back by other programs: dicom-object, `dciodvfy`, the `nifti` and `png` crates.

use darnet::phantom::{
    DicomOptions, DicomSeries, Format, PatientPosition, Phantom, PhantomClass, PhantomSpec, WriteRequest, affine_ras,
    generate, series_variants, write_cases, write_dicom, write_nifti, write_nifti_mask,
};
use dicom_dictionary_std::tags;
use dicom_object::{DefaultDicomObject, Tag};
use nifti::{NiftiObject, NiftiVolume, RandomAccessNiftiVolume, ReaderOptions};
use std::path::Path;
use std::process::Command;

fn spec(class: PhantomClass, seed: u64) -> PhantomSpec {
    PhantomSpec::random(class, seed).with_shape(12, 64, 64)
}

fn open(path: &Path) -> DefaultDicomObject {
    dicom_object::open_file(path).expect("open the written file")
}

fn text(o: &DefaultDicomObject, tag: Tag) -> String {
    o.element(tag).expect("attribute").to_str().expect("text").trim().to_string()
}

fn numbers(o: &DefaultDicomObject, tag: Tag) -> Vec<f64> {
    o.element(tag).expect("attribute").to_multi_float64().expect("numbers")
}

fn pixels(o: &DefaultDicomObject) -> Vec<u16> {
    o.element(tags::PIXEL_DATA).expect("pixels").to_multi_int::<u16>().expect("words")
}

/// HU of every voxel of a written slice, with the patient position of that voxel.
fn voxels(o: &DefaultDicomObject) -> Vec<([f64; 3], f64)> {
    let (rows, columns) = (64, 64);
    let (position, orientation) =
        (numbers(o, tags::IMAGE_POSITION_PATIENT), numbers(o, tags::IMAGE_ORIENTATION_PATIENT));
    let pitch = numbers(o, tags::PIXEL_SPACING);
    let signed = text(o, tags::PIXEL_REPRESENTATION) == "1";
    let intercept = numbers(o, tags::RESCALE_INTERCEPT)[0];
    let words = pixels(o);
    let mut out = Vec::new();
    for r in 0..rows {
        for c in 0..columns {
            let p = [0, 1, 2]
                .map(|i| position[i] + c as f64 * pitch[1] * orientation[i] + r as f64 * pitch[0] * orientation[3 + i]);
            let w = words[r * columns + c];
            let stored = if signed { f64::from(w as i16) } else { f64::from(w) };
            out.push((p, stored + intercept));
        }
    }
    out
}

#[test]
fn every_attribute_and_pixel_is_read_back() {
    let dir = tempfile::tempdir().expect("folder");
    let p = generate(&spec(PhantomClass::Covid, 1));
    let options = DicomOptions { declare_count: true, ..Default::default() };
    let files = write_dicom(&p, dir.path(), &options).expect("write");
    assert_eq!(files.len(), 12);
    let mut times = Vec::new();
    for (k, file) in files.iter().enumerate() {
        let o = open(file);
        assert_eq!(o.meta().transfer_syntax.trim_end_matches('\0'), "1.2.840.10008.1.2.1");
        assert_eq!(text(&o, tags::IMAGE_TYPE), "ORIGINAL\\PRIMARY\\AXIAL");
        assert_eq!(text(&o, tags::MODALITY), "CT");
        assert_eq!(text(&o, tags::BODY_PART_EXAMINED), "CHEST");
        assert_eq!(text(&o, tags::PATIENT_POSITION), "HFS");
        assert_eq!(text(&o, tags::INSTANCE_NUMBER), (k + 1).to_string());
        assert_eq!(text(&o, tags::NUMBER_OF_SERIES_RELATED_INSTANCES), "12");
        assert!(text(&o, tags::PATIENT_NAME).starts_with("PHANTOM^"));
        assert!(text(&o, tags::SERIES_INSTANCE_UID).starts_with("2.25."));
        assert_eq!(text(&o, tags::SOP_INSTANCE_UID), o.meta().media_storage_sop_instance_uid());
        let position = numbers(&o, tags::IMAGE_POSITION_PATIENT);
        for (a, b) in position.iter().zip(p.position_mm(k)) {
            assert!((a - b).abs() < 1e-5);
        }
        let stored = pixels(&o);
        for (v, hu) in stored.iter().zip(p.slice(k)) {
            assert_eq!(i32::from(*v) - 1024, i32::from(*hu).max(-1024));
        }
        times.push(text(&o, tags::CONTENT_TIME));
    }
    assert!(times.windows(2).all(|t| t[0] < t[1]), "ContentTime must progress");
}

#[test]
fn every_patient_position_shows_the_same_patient() {
    let p = generate(&spec(PhantomClass::Healthy, 6));
    let base = DicomOptions::default();
    let reference = {
        let dir = tempfile::tempdir().expect("folder");
        voxels(&open(&write_dicom(&p, dir.path(), &base).expect("write")[6]))
    };
    for position in [PatientPosition::Hfs, PatientPosition::Ffs] {
        for seen_from_head in [false, true] {
            for (signed, bits_stored) in [(false, 12), (false, 16), (true, 16)] {
                let options = DicomOptions {
                    patient_position: position,
                    seen_from_head,
                    signed,
                    bits_stored,
                    descending: signed,
                    ..base.clone()
                };
                let dir = tempfile::tempdir().expect("folder");
                let files = write_dicom(&p, dir.path(), &options).expect("write");
                let file = if signed { &files[12 - 1 - 6] } else { &files[6] };
                let mut got = voxels(&open(file));
                got.sort_by(|a, b| a.0[1].total_cmp(&b.0[1]).then(a.0[0].total_cmp(&b.0[0])));
                for ((p, v), (q, w)) in got.iter().zip(&reference) {
                    assert!((0..3).all(|i| (p[i] - q[i]).abs() < 1e-4), "{p:?} {q:?}");
                    assert!((v - w.max(if signed { -1100.0 } else { -1024.0 })).abs() < 1e-9 || *w <= -1024.0);
                }
            }
        }
    }
}

/// Prone, the table lies in front and the stored image is turned by half a turn: the table is at the bottom again.
#[test]
fn a_prone_patient_lies_on_the_table() {
    let p = generate(&spec(PhantomClass::Healthy, 6));
    let options = DicomOptions { patient_position: PatientPosition::Hfp, ..Default::default() };
    let dir = tempfile::tempdir().expect("folder");
    let files = write_dicom(&p, dir.path(), &options).expect("write");
    let o = open(&files[6]);
    assert_eq!(numbers(&o, tags::IMAGE_ORIENTATION_PATIENT), [-1.0, 0.0, 0.0, 0.0, -1.0, 0.0]);
    // The spine: the brightest voxels lie behind (larger y) in patient coordinates.
    let bright: Vec<f64> =
        voxels(&o).into_iter().filter(|v| v.1 > 350.0 && v.0[0].abs() < 40.0).map(|v| v.0[1]).collect();
    assert!(!bright.is_empty());
    assert!(bright.iter().sum::<f64>() / bright.len() as f64 > 0.0);
}

#[test]
fn a_tilted_gantry_shears_the_stack() {
    let p = generate(&spec(PhantomClass::Healthy, 9));
    let options = DicomOptions { tilt_deg: 15.0, ..Default::default() };
    let dir = tempfile::tempdir().expect("folder");
    let files = write_dicom(&p, dir.path(), &options).expect("write");
    let first = open(&files[0]);
    let o = numbers(&first, tags::IMAGE_ORIENTATION_PATIENT);
    let tilt = 15.0f64.to_radians();
    assert!((o[4] - tilt.cos()).abs() < 1e-5 && (o[5] - tilt.sin()).abs() < 1e-5);
    let step: Vec<f64> = numbers(&open(&files[1]), tags::IMAGE_POSITION_PATIENT)
        .iter()
        .zip(numbers(&first, tags::IMAGE_POSITION_PATIENT))
        .map(|(a, b)| a - b)
        .collect();
    assert!(step[0].abs() < 1e-5 && step[1].abs() < 1e-5 && (step[2] - p.spec.spacing_mm).abs() < 1e-4);
    // The same anatomy: lung at the same world positions as in the straight scan, mostly.
    let straight = |q: [f64; 3]| {
        let s = &p.spec;
        let origin = p.position_mm(0);
        let k = ((q[2] - origin[2]) / s.spacing_mm + 0.5).max(0.0) as usize;
        let r = ((q[1] - origin[1]) / s.pixel_spacing_mm + 0.5).max(0.0) as usize;
        let c = ((q[0] - origin[0]) / s.pixel_spacing_mm + 0.5).max(0.0) as usize;
        (k < s.slices && r < s.rows && c < s.columns).then(|| f64::from(p.slice(k)[r * s.columns + c]))
    };
    let (mut same, mut all) = (0, 0);
    for (q, v) in voxels(&open(&files[6])) {
        if let Some(w) = straight(q) {
            all += 1;
            same += usize::from((v > -500.0) == (w > -500.0));
        }
    }
    assert!(all > 2000 && same as f64 > 0.93 * all as f64, "{same} of {all}");
}

#[test]
fn series_of_one_patient_share_study_and_frame_of_reference() {
    let base = spec(PhantomClass::Cp, 4);
    let mut seen = Vec::new();
    for (i, s) in series_variants(&base).into_iter().enumerate() {
        let p: Phantom = generate(&PhantomSpec { slices: 2, ..s });
        let options = DicomOptions { series_number: 2 + i as u32, ..Default::default() };
        let dir = tempfile::tempdir().expect("folder");
        let o = open(&write_dicom(&p, dir.path(), &options).expect("write")[0]);
        seen.push(
            [tags::STUDY_INSTANCE_UID, tags::FRAME_OF_REFERENCE_UID, tags::SERIES_INSTANCE_UID].map(|t| text(&o, t)),
        );
        let series = DicomSeries::new(&p, &options).expect("series");
        assert_eq!(series.series_uid(), seen[i][2]);
    }
    assert!(seen.iter().all(|s| s[0] == seen[0][0] && s[1] == seen[0][1]));
    assert!(seen[0][2] != seen[1][2] && seen[1][2] != seen[2][2]);
}

/// dicom3tools' validator finds nothing wrong with any way of writing a slice.
#[test]
fn dciodvfy_finds_no_error() {
    let p = generate(&spec(PhantomClass::Cp, 2));
    let ways = [
        DicomOptions::default(),
        DicomOptions { signed: true, circle_padding: true, declare_count: true, ..Default::default() },
        DicomOptions { bits_stored: 12, circle_padding: true, ..Default::default() },
        DicomOptions {
            patient_position: PatientPosition::Ffp,
            tilt_deg: -12.5,
            descending: true,
            ..Default::default()
        },
    ];
    for options in ways {
        let dir = tempfile::tempdir().expect("folder");
        let files = write_dicom(&p, dir.path(), &options).expect("write");
        let run = Command::new("dciodvfy").arg(&files[3]).output();
        let output = run.unwrap_or_else(|e| panic!("dciodvfy: {e}; install it: apt-get install -y dicom3tools"));
        let report = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(report.contains("CTImage"), "not recognised as a CT image: {report}");
        assert!(!report.contains("Error"), "{options:?}\n{report}");
        // NumberOfSeriesRelatedInstances in an image is an extension of the IOD, which the standard allows.
        let warnings = report.lines().filter(|l| l.contains("Warning"));
        let extension = |l: &str| l.contains("(0x0020,0x1209)") || l.contains("Standard Extended SOP Class");
        for line in warnings {
            assert!(options.declare_count && extension(line), "{options:?}\n{report}");
        }
    }
}

#[test]
fn nifti_has_the_voxels_and_the_affine() {
    let p = generate(&spec(PhantomClass::Covid, 3));
    let dir = tempfile::tempdir().expect("folder");
    let (image, mask) = (dir.path().join("ct.nii.gz"), dir.path().join("lesion.nii.gz"));
    write_nifti(&p, &image).expect("image");
    write_nifti_mask(&p, &p.lesion, &mask).expect("mask");
    let read = |path: &Path| ReaderOptions::new().read_file(path).expect("read NIfTI");
    let (ct, lesion) = (read(&image), read(&mask));
    let h = ct.header();
    assert_eq!(ct.volume().dim(), [64, 64, 12]);
    let affine = affine_ras(&p);
    for (row, want) in [h.srow_x, h.srow_y, h.srow_z].iter().zip(&affine) {
        for (a, b) in row.iter().zip(want) {
            assert!((f64::from(*a) - b).abs() < 1e-3);
        }
    }
    // LPS to RAS: columns run to the left (negative x), rows to the back (negative y), slices to the head.
    assert!(h.srow_x[0] < 0.0 && h.srow_y[1] < 0.0 && h.srow_z[2] > 0.0);
    let origin = p.position_mm(0);
    assert!((f64::from(h.srow_x[3]) + origin[0]).abs() < 1e-3 && (f64::from(h.srow_z[3]) - origin[2]).abs() < 1e-3);
    for (k, r, c) in [(0u16, 0u16, 0u16), (5, 30, 20), (11, 63, 63), (6, 20, 45)] {
        let i = (usize::from(k) * 64 + usize::from(r)) * 64 + usize::from(c);
        assert_eq!(ct.volume().get_f32(&[c, r, k]).expect("voxel"), f32::from(p.hu[i]));
        assert_eq!(lesion.volume().get_f32(&[c, r, k]).expect("voxel"), f32::from(p.lesion[i]));
    }
}

#[test]
fn cases_are_written_with_their_masks_in_every_format() {
    for &format in Format::ALL {
        let dir = tempfile::tempdir().expect("folder");
        let mut request = WriteRequest::new(dir.path(), PhantomClass::Covid, 2, 77, format);
        request.shape = Some([6, 48, 48]);
        let mut seen = Vec::new();
        let cases = write_cases(&request, &mut |p| seen.push((p.done, p.total, p.slices))).expect("cases");
        assert_eq!(seen, [(1, 2, 6), (2, 2, 6)]);
        assert_ne!(cases[0].spec.seed, cases[1].spec.seed);
        for case in &cases {
            assert!(case.lesion.exists() && case.image.exists() && case.dir.join("spec.json").is_file());
            match format {
                Format::Nifti => assert!(case.image.is_file()),
                _ => assert_eq!(std::fs::read_dir(&case.image).expect("folder").count(), 6),
            }
            let text = std::fs::read_to_string(case.dir.join("spec.json")).expect("spec");
            assert_eq!(serde_json::from_str::<PhantomSpec>(&text).expect("spec"), case.spec);
        }
    }
}

#[test]
fn png_slices_hold_the_stated_window() {
    let dir = tempfile::tempdir().expect("folder");
    let p = generate(&spec(PhantomClass::Healthy, 3));
    let files = darnet::phantom::write_png(&p, dir.path(), -600.0, 1500.0).expect("write");
    assert!(files[7].ends_with("0007.png"));
    let file = std::io::BufReader::new(std::fs::File::open(&files[7]).expect("file"));
    let mut reader = png::Decoder::new(file).read_info().expect("png");
    let mut grey = vec![0u8; 64 * 64];
    reader.next_frame(&mut grey).expect("frame");
    for (g, hu) in grey.iter().zip(p.slice(7)) {
        let want = ((f64::from(*hu) + 1350.0) / 1500.0 * 255.0).clamp(0.0, 255.0);
        assert!((f64::from(*g) - want).abs() <= 0.51);
    }
}
