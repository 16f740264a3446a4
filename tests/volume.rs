//! Geometry on real series, and the cost of keeping a slice.
//!
//! The real series are found through `DARNET_TEST_DATA`, a folder with `lidc-idri-0306.tar.xz` and
//! `tilt-ge-18.5deg.tar.xz`. Unset, those tests say that they were not run.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use darnet::volume::geometry::{GeometryLimits, InPlaneOrientation, SliceGeometry, Stack, build_stack};
use darnet::volume::journal::{JournalWriter, RecordHead, RecordKind};
use darnet::volume::refusal::Reason;
use darnet::volume::store::{SlotMeta, VolumeFile};
use dicom_dictionary_std::tags;
use dicom_object::{InMemDicomObject, OpenFileOptions};

/// Unpacks an archive of real data, or says that the test is not run.
fn unpack(archive: &str) -> Option<tempfile::TempDir> {
    let Some(folder) = std::env::var_os("DARNET_TEST_DATA") else {
        println!("not run: DARNET_TEST_DATA names no folder with {archive}");
        return None;
    };
    let path = Path::new(&folder).join(archive);
    assert!(path.is_file(), "DARNET_TEST_DATA is set and has no {archive}");
    let dir = tempfile::tempdir().expect("tempdir");
    let status = Command::new("tar").arg("-xf").arg(&path).arg("-C").arg(dir.path()).status();
    assert!(status.expect("tar must be there: apt-get install tar xz-utils").success(), "{archive} does not unpack");
    Some(dir)
}

fn slices_in(folder: &Path) -> Vec<SliceGeometry> {
    let mut folders = vec![folder.to_owned()];
    let mut files: Vec<PathBuf> = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("folder") {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "dcm") {
                files.push(path);
            }
        }
    }
    files.sort();
    files.iter().map(|f| geometry_of(f)).collect()
}

fn geometry_of(file: &Path) -> SliceGeometry {
    let object = OpenFileOptions::new().read_until(tags::PIXEL_DATA).open_file(file).expect("a DICOM file");
    let object: &InMemDicomObject = &object;
    let floats = |tag| object.element(tag).expect("present").to_multi_float64().expect("numbers");
    let triple = |v: &[f64]| [v[0], v[1], v[2]];
    let side = |tag| object.element(tag).expect("present").to_int::<u32>().expect("number");
    let (orientation, spacing) = (floats(tags::IMAGE_ORIENTATION_PATIENT), floats(tags::PIXEL_SPACING));
    SliceGeometry {
        rows: side(tags::ROWS),
        columns: side(tags::COLUMNS),
        pixel_spacing_mm: [spacing[0], spacing[1]],
        position_mm: triple(&floats(tags::IMAGE_POSITION_PATIENT)),
        row_cosines: triple(&orientation[..3]),
        column_cosines: triple(&orientation[3..]),
    }
}

/// Patient position of a stored pixel (PS3.3 C.7.6.2.1.1).
fn patient(s: &SliceGeometry, r: f64, c: f64) -> [f64; 3] {
    let [dr, dc] = s.pixel_spacing_mm;
    std::array::from_fn(|k| s.position_mm[k] + c * dc * s.row_cosines[k] + r * dr * s.column_cosines[k])
}

/// The stack of the same slices given in another order, with `order` in terms of the first.
fn reversed(slices: &[SliceGeometry], limits: &GeometryLimits) -> Stack {
    let other: Vec<_> = slices.iter().rev().cloned().collect();
    let mut stack = build_stack(&other, limits).expect("a stack");
    stack.order.iter_mut().for_each(|i| *i = slices.len() as u32 - 1 - *i);
    stack
}

#[test]
fn a_real_chest_scanned_feet_first_is_ordered_from_feet_to_head() {
    let Some(dir) = unpack("lidc-idri-0306.tar.xz") else { return };
    let slices = slices_in(dir.path());
    assert_eq!(slices.len(), 123);
    let limits = GeometryLimits::default();
    let stack = build_stack(&slices, &limits).expect("a chest CT");
    // Its instance numbers run from head to feet.
    assert_eq!(stack.order, (0..123).rev().collect::<Vec<u32>>());
    assert_eq!((stack.in_plane, stack.shear_px.as_ref(), stack.tilt_deg), (InPlaneOrientation::default(), None, 0.0));
    assert!(stack.uniform && (stack.spacing_mm - 2.5).abs() < 1e-5);
    assert!((stack.depth_mm[122] - 305.0).abs() < 1e-3);
    assert_eq!(reversed(&slices, &limits), stack);
    let mut holed = slices;
    holed.remove(60);
    assert_eq!(build_stack(&holed, &limits).expect_err("a hole").reason, Reason::Gap);
}

#[test]
fn a_real_tilted_gantry_is_measured_and_sheared_out() {
    let Some(dir) = unpack("tilt-ge-18.5deg.tar.xz") else { return };
    let slices = slices_in(dir.path());
    assert_eq!(slices.len(), 28);
    let limits = GeometryLimits::default();
    let stack = build_stack(&slices, &limits).expect("mixed spacings are no gap");
    assert!((stack.tilt_deg - 18.5).abs() < 1e-3, "{}", stack.tilt_deg);
    assert!(!stack.uniform);
    assert_eq!(reversed(&slices, &limits), stack);
    let shear = stack.shear_px.as_ref().expect("tilted");
    let middle_index = stack.order.len() / 2;
    let middle = &slices[stack.order[middle_index] as usize];
    let axis = middle.normal();
    assert!(axis[2] > 0.9);
    for (k, &i) in stack.order.iter().enumerate() {
        for (r, c) in [(0.0, 0.0), (255.5, 255.5), (511.0, 0.0)] {
            let p = patient(&slices[i as usize], r - shear[k][0], c - shear[k][1]);
            let m = patient(middle, r, c);
            let depth = stack.depth_mm[k] - stack.depth_mm[middle_index];
            for a in 0..3 {
                // The file's cosines have seven decimals: 1e-7 of the field and of the extent.
                assert!((p[a] - m[a] - depth * axis[a]).abs() < 1e-4, "slice {k} is not above the middle one");
            }
        }
    }
    // The table moved 4.22 and 7.38 mm; along the normal that is less by the cosine.
    let step = stack.depth_mm[1] - stack.depth_mm[0];
    assert!((step - 4.22 * 18.5f64.to_radians().cos()).abs() < 1e-3, "{step}");
}

#[test]
fn the_cost_of_keeping_a_slice_is_printed() {
    let dir = tempfile::tempdir().expect("tempdir");
    let payload: Vec<u8> = (0..512 * 1024u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut journal = JournalWriter::create(&dir.path().join("journal")).expect("create");
    let volume = VolumeFile::create(&dir.path().join("volume"), 512, 512, 100).expect("create");
    let (mut appends, mut syncs, mut writes, mut publishes) = (vec![], vec![], vec![], vec![]);
    for k in 0..100u64 {
        let head = RecordHead {
            kind: RecordKind::Dataset,
            transfer_syntax_uid: "1.2.840.10008.1.2",
            sop_class_uid: "1.2.840.10008.5.1.4.1.1.2",
            sop_instance_uid: "2.25.1",
            received_unix_ns: k,
        };
        let start = Instant::now();
        let record = journal.append(&head, &payload).expect("append");
        let appended = Instant::now();
        journal.sync().expect("sync");
        let synced = Instant::now();
        let mut slot = volume.claim().expect("claim");
        slot.pixels_mut().fill(k as i16);
        let written = Instant::now();
        slot.publish(&SlotMeta { position_mm: [0.0; 3], journal_offset: record.offset });
        let published = Instant::now();
        appends.push(appended - start);
        syncs.push(synced - appended);
        writes.push(written - synced);
        publishes.push(published - written);
    }
    let text = |times: &mut Vec<std::time::Duration>| {
        times.sort_unstable();
        format!("p50 {:?}, p99 {:?}", times[times.len() / 2], times[times.len() * 99 / 100])
    };
    println!("512 KiB record: append {}; fdatasync {}", text(&mut appends), text(&mut syncs));
    println!("512 x 512 slot: claim and fill {}; publish {}", text(&mut writes), text(&mut publishes));
    assert_eq!(volume.published(), 100);
}
