//! Bad input: a clear error, nothing lost. One table for files, one for the network.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{DARNET, Daemon, phantom_series, run};
use darnet::dicom::scu::{SendOptions, send};
use dicom_core::{DataElement, PrimitiveValue, VR, dicom_value};
use dicom_dictionary_std::tags;
use dicom_object::{DefaultDicomObject, open_file};
use serde_json::Value;

fn edit(from: &Path, to: &Path, change: impl Fn(&mut DefaultDicomObject)) {
    let mut object = open_file(from).unwrap();
    change(&mut object);
    object.write_to_file(to).unwrap();
}

/// Copies a series, changing every slice.
fn edited(files: &[PathBuf], to: &Path, change: impl Fn(usize, &mut DefaultDicomObject)) {
    for (k, file) in files.iter().enumerate() {
        edit(file, &to.join(format!("{k:05}.dcm")), |object| change(k, object));
    }
}

fn set(object: &mut DefaultDicomObject, tag: dicom_core::Tag, vr: VR, value: impl Into<PrimitiveValue>) {
    object.put(DataElement::new(tag, vr, value.into()));
}

type Prepare = fn(&[PathBuf], &Path);

struct Case {
    name: &'static str,
    prepare: Prepare,
    /// The refusal, or empty for "a result comes all the same".
    reason: &'static str,
    /// What the message must speak of.
    says: &'static str,
}

fn copy(files: &[PathBuf], to: &Path) {
    for (k, file) in files.iter().enumerate() {
        std::fs::copy(file, to.join(format!("{k:05}.dcm"))).unwrap();
    }
}

const CASES: &[Case] = &[
    Case {
        name: "truncated pixel data",
        prepare: |files, to| {
            copy(files, to);
            let path = to.join("00007.dcm");
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() - 5000]).unwrap();
        },
        reason: "undecodable",
        says: "",
    },
    Case {
        name: "file cut inside the header",
        prepare: |files, to| {
            let bytes = std::fs::read(&files[0]).unwrap();
            std::fs::write(to.join("cut.dcm"), &bytes[..300]).unwrap();
        },
        reason: "undecodable",
        says: "",
    },
    Case {
        name: "not DICOM at all",
        prepare: |_, to| std::fs::write(to.join("noise.dcm"), vec![0xA5u8; 10_000]).unwrap(),
        reason: "undecodable",
        says: "",
    },
    Case {
        name: "wrong VR (Rows as text)",
        prepare: |files, to| {
            edited(files, to, |_, o| set(o, tags::ROWS, VR::LO, "many"));
        },
        reason: "undecodable",
        says: "Rows",
    },
    Case {
        name: "absurd dimensions",
        prepare: |files, to| {
            edited(files, to, |_, o| {
                set(o, tags::ROWS, VR::US, dicom_value!(U16, [65535]));
                set(o, tags::COLUMNS, VR::US, dicom_value!(U16, [65535]));
            });
        },
        reason: "",
        says: "Rows",
    },
    Case { name: "one slice", prepare: |files, to| copy(&files[..1], to), reason: "too_few_slices", says: "1" },
    Case {
        name: "mixed sizes, a third of them",
        prepare: |files, to| {
            edited(files, to, |k, o| {
                if k % 3 == 0 {
                    set(o, tags::ROWS, VR::US, dicom_value!(U16, [64]));
                    let bytes = o.element(tags::PIXEL_DATA).unwrap().to_bytes().unwrap().into_owned();
                    set(o, tags::PIXEL_DATA, VR::OW, PrimitiveValue::from(&bytes[..bytes.len() / 2]));
                }
            });
        },
        reason: "inconsistent_geometry",
        says: "grid",
    },
    Case {
        name: "missing position",
        prepare: |files, to| {
            edited(files, to, |_, o| {
                o.remove_element(tags::IMAGE_POSITION_PATIENT);
            });
        },
        reason: "not_axial",
        says: "ImagePositionPatient",
    },
    Case {
        name: "missing position in the last third: what is left must not be judged as the whole",
        prepare: |files, to| {
            edited(files, to, |k, o| {
                if k >= 27 {
                    o.remove_element(tags::IMAGE_POSITION_PATIENT);
                }
            });
        },
        reason: "inconsistent_geometry",
        says: "without",
    },
    Case {
        name: "NaN spacing",
        prepare: |files, to| {
            edited(files, to, |_, o| set(o, tags::PIXEL_SPACING, VR::DS, "NaN\\NaN"));
        },
        reason: "",
        says: "PixelSpacing",
    },
    Case {
        name: "not CT",
        prepare: |files, to| {
            edited(files, to, |_, o| {
                set(o, tags::MODALITY, VR::CS, "MR");
                set(o, tags::SOP_CLASS_UID, VR::UI, "1.2.840.10008.5.1.4.1.1.4");
            });
        },
        reason: "not_ct",
        says: "",
    },
    Case {
        name: "localizer",
        prepare: |files, to| {
            edited(files, to, |_, o| set(o, tags::IMAGE_TYPE, VR::CS, "ORIGINAL\\PRIMARY\\LOCALIZER"));
        },
        reason: "localizer",
        says: "",
    },
    Case {
        name: "a slice missing in the middle",
        prepare: |files, to| {
            copy(files, to);
            std::fs::remove_file(to.join("00020.dcm")).unwrap();
        },
        reason: "gap",
        says: "",
    },
    Case {
        name: "one SOPInstanceUID, two different images",
        prepare: |files, to| {
            copy(files, to);
            edit(&files[5], &to.join("again.dcm"), |o| {
                let mut bytes = o.element(tags::PIXEL_DATA).unwrap().to_bytes().unwrap().into_owned();
                bytes[100] ^= 0x10;
                set(o, tags::PIXEL_DATA, VR::OW, PrimitiveValue::from(bytes.as_slice()));
            });
        },
        reason: "duplicate_conflict",
        says: "SOPInstanceUID",
    },
    Case {
        name: "no lung (everything is water)",
        prepare: |files, to| {
            edited(files, to, |_, o| {
                let n = o.element(tags::PIXEL_DATA).unwrap().to_bytes().unwrap().len();
                let water: Vec<u8> = 1024u16.to_le_bytes().iter().copied().cycle().take(n).collect();
                set(o, tags::PIXEL_DATA, VR::OW, PrimitiveValue::from(water.as_slice()));
            });
        },
        reason: "no_lung",
        says: "lung",
    },
];

#[test]
fn every_bad_series_is_refused_with_its_reason_and_a_clear_message() {
    let series = phantom_series(31, 40, 128);
    for case in CASES {
        let dir = tempfile::tempdir().unwrap();
        (case.prepare)(&series.files, dir.path());
        let (code, out, err) = run(Command::new(DARNET).args(["infer", "--json"]).arg(dir.path()));
        assert_eq!(code, 3, "{}: {out} {err}", case.name);
        let document: Value = serde_json::from_str(&out).unwrap();
        let entry = document["series"].as_array().unwrap().iter().find(|s| s["outcome"] == "no_result");
        let entry = entry.unwrap_or_else(|| panic!("{}: {out}", case.name));
        if case.reason.is_empty() {
            assert!(entry["reason"].is_string(), "{}: {entry}", case.name);
        } else {
            assert_eq!(entry["reason"], case.reason, "{}: {entry}", case.name);
        }
        let detail = entry["detail"].as_str().unwrap();
        assert!(!detail.is_empty() && detail.contains(case.says), "{}: {detail}", case.name);
    }
}

#[test]
fn the_same_bad_series_over_the_network_are_kept_and_refused_or_answered_with_a_failure() {
    let series = phantom_series(32, 40, 128);
    let daemon = Daemon::start("[assembly]\ngrace_ms = 100\n");
    let mut expected = 0;
    for case in CASES {
        let dir = tempfile::tempdir().unwrap();
        (case.prepare)(&series.files, dir.path());
        // Each case is a series of its own.
        let files = common::files_below(dir.path(), |_| true);
        let uid = format!("2.25.{}", 1000 + expected);
        let mut sendable = Vec::new();
        for file in &files {
            if let Ok(mut object) = open_file(file) {
                set(&mut object, tags::SERIES_INSTANCE_UID, VR::UI, uid.as_str());
                object.write_to_file(file).unwrap();
                sendable.push(file.clone());
            }
        }
        if sendable.is_empty() {
            continue;
        }
        let options = SendOptions { to: daemon.dicom.clone(), ..SendOptions::default() };
        let report = send(&sendable, &options, &mut |_| {}).unwrap();
        if report.stored == 0 {
            continue; // every object was answered with a failure: the sender still has them
        }
        expected += 1;
        let results = daemon.wait_results(expected, 60);
        let last = results.iter().filter(|r| r["outcome"] == "no_result").count();
        assert_eq!(last, expected, "{}: {results:?}", case.name);
    }
    assert!(expected >= 8, "most cases reach the daemon, got {expected}");
    assert_eq!(daemon.get("/healthz").0, 200);
    // A sound series is judged after all of that.
    let sound = phantom_series(33, 40, 128);
    let options = SendOptions { to: daemon.dicom.clone(), ..SendOptions::default() };
    send(&sound.files, &options, &mut |_| {}).unwrap();
    let results = daemon.wait_results(expected + 1, 60);
    assert_eq!(results.iter().filter(|r| r["outcome"] == "result").count(), 1);
}

#[test]
fn zero_slices_and_paths_that_do_not_exist_are_errors() {
    let empty = tempfile::tempdir().unwrap();
    let (code, _, err) = run(Command::new(DARNET).args(["infer", "--json"]).arg(empty.path()));
    assert_eq!(code, 1);
    assert!(err.contains("found none"), "{err}");
    let (code, _, err) = run(Command::new(DARNET).args(["infer", "--json", "no/such/folder"]));
    assert_eq!(code, 1);
    assert!(err.contains("no/such/folder"), "{err}");
    let (code, _, _) = run(Command::new(DARNET).args(["infer"]));
    assert_eq!(code, 2);
}

#[test]
fn twenty_thousand_slices_are_refused_before_they_fill_memory() {
    // One tiny slice, 20,000 times under new UIDs and positions.
    let series = phantom_series(34, 20, 64);
    let dir = tempfile::tempdir().unwrap();
    let mut object = open_file(&series.files[0]).unwrap();
    set(&mut object, tags::ROWS, VR::US, dicom_value!(U16, [16]));
    set(&mut object, tags::COLUMNS, VR::US, dicom_value!(U16, [16]));
    set(&mut object, tags::PIXEL_DATA, VR::OW, PrimitiveValue::from(vec![0u8; 512].as_slice()));
    for k in 0..20_000 {
        set(&mut object, tags::SOP_INSTANCE_UID, VR::UI, format!("2.25.77{k}").as_str());
        set(&mut object, tags::IMAGE_POSITION_PATIENT, VR::DS, format!("0\\0\\{k}").as_str());
        object.write_to_file(dir.path().join(format!("{k:05}.dcm"))).unwrap();
    }
    let (code, out, err) = run(Command::new(DARNET).args(["infer", "--json"]).arg(dir.path()));
    assert_eq!(code, 3, "{err}");
    let document: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(document["series"][0]["reason"], "too_many_slices");

    let daemon = Daemon::start("[assembly]\ndurability = \"page_cache\"\ngrace_ms = 100\n");
    // The daemon keeps 6,000 objects a series; what is beyond them is answered alike.
    let mut files = common::files_below(dir.path(), |_| true);
    files.truncate(6500);
    let options = SendOptions { to: daemon.dicom.clone(), ..SendOptions::default() };
    let report = send(&files, &options, &mut |_| {}).unwrap();
    assert_eq!(report.stored, 6000, "the surplus is answered with a failure, so the sender keeps it");
    let results = daemon.wait_results(1, 120);
    assert_eq!(results[0]["outcome"], "no_result");
}
