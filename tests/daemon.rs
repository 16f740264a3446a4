//! What a user sees of the running daemon: folder, privacy, metrics, reconstructions, limits, reload, full disk.

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{DARNET, Daemon, chest_series, files_below, phantom_series, python, real_data, require, run};
use darnet::dicom::scu::{ScuError, SendOptions, SendReport, SendStatus, send};
use darnet::phantom::{DicomOptions, Kernel, PhantomClass, PhantomSpec, generate, series_variants, write_dicom};
use dicom_core::{DataElement, PrimitiveValue, Tag, VR};
use dicom_dictionary_std::{tags, uids};
use dicom_object::{DefaultDicomObject, FileMetaTableBuilder, InMemDicomObject, open_file};
use serde_json::Value;

fn options(daemon: &Daemon) -> SendOptions {
    SendOptions { to: daemon.dicom.clone(), ..SendOptions::default() }
}

fn try_push(daemon: &Daemon, files: &[PathBuf]) -> SendReport {
    send(files, &options(daemon), &mut |_| {}).unwrap()
}

fn push(daemon: &Daemon, files: &[PathBuf]) {
    assert_eq!(try_push(daemon, files).stored, files.len());
}

fn set(object: &mut DefaultDicomObject, tag: Tag, vr: VR, value: &str) {
    object.put(DataElement::new(tag, vr, PrimitiveValue::from(value)));
}

/// Copies of `files` in `to`, each changed.
fn edited(files: &[PathBuf], to: &Path, change: impl Fn(usize, &mut DefaultDicomObject)) -> Vec<PathBuf> {
    let write = |(k, file): (usize, &PathBuf)| {
        let mut object = open_file(file).unwrap();
        change(k, &mut object);
        let path = to.join(format!("{k:05}.dcm"));
        object.write_to_file(&path).unwrap();
        path
    };
    files.iter().enumerate().map(write).collect()
}

/// Gives an object another SOP instance or class, in the data set and the file meta information.
fn identify(object: &mut DefaultDicomObject, sop_class_uid: &str, sop_instance_uid: &str) {
    set(object, tags::SOP_CLASS_UID, VR::UI, sop_class_uid);
    set(object, tags::SOP_INSTANCE_UID, VR::UI, sop_instance_uid);
    object.update_meta(|meta| {
        meta.media_storage_sop_class_uid = sop_class_uid.to_owned();
        meta.media_storage_sop_instance_uid = sop_instance_uid.to_owned();
    });
}

fn flip_a_pixel(object: &mut DefaultDicomObject) {
    let mut bytes = object.element(tags::PIXEL_DATA).unwrap().to_bytes().unwrap().into_owned();
    bytes[1000] ^= 0x20;
    object.put(DataElement::new(tags::PIXEL_DATA, VR::OW, PrimitiveValue::from(bytes.as_slice())));
}

/// Stays long enough to see that nothing more is published.
fn expect_no_more(daemon: &Daemon, count: usize) {
    std::thread::sleep(Duration::from_millis(2500));
    let results = daemon.results();
    assert_eq!(results.len(), count, "{results:?}");
}

// ---- the watched folder

fn watching(inbox: &Path, after: &str) -> Daemon {
    let inbox = inbox.display().to_string();
    Daemon::start(&format!("[folder]\npath = {inbox:?}\nafter = {after:?}\n\n[assembly]\ngrace_ms = 1000\n"))
}

fn copy_in(files: &[PathBuf], inbox: &Path) {
    for file in files {
        std::fs::copy(file, inbox.join(file.file_name().unwrap())).unwrap();
    }
}

#[test]
fn a_watched_folder_is_judged_and_left_as_it_was() {
    let series = phantom_series(101, 40, 128);
    let inbox = tempfile::tempdir().unwrap();
    std::fs::write(inbox.path().join("notes.txt"), "not DICOM").unwrap();
    let daemon = watching(inbox.path(), "leave");
    let deep = inbox.path().join("study/series");
    std::fs::create_dir_all(&deep).unwrap();
    copy_in(&series.files, &deep);
    let result = &daemon.wait_results(1, 60)[0];
    assert_eq!((result["outcome"].as_str(), result["slices"].as_u64()), (Some("result"), Some(40)), "{result}");
    assert_eq!(files_below(inbox.path(), |_| true).len(), 41);
    expect_no_more(&daemon, 1);
    assert_eq!(daemon.metric("darnet_slices_total{outcome=\"duplicate\"}"), 0.0, "each file is taken once");
}

#[test]
fn a_file_written_in_two_goes_is_taken_whole() {
    let series = phantom_series(102, 40, 128);
    let inbox = tempfile::tempdir().unwrap();
    let daemon = watching(inbox.path(), "leave");
    // The pause is longer than the settling time for one file and shorter for the other.
    for (file, pause_ms) in [(0, 200), (1, 1500)] {
        let bytes = std::fs::read(&series.files[file]).unwrap();
        let mut out = std::fs::File::create(inbox.path().join(format!("slow-{file}.dcm"))).unwrap();
        out.write_all(&bytes[..bytes.len() / 2]).unwrap();
        out.flush().unwrap();
        std::thread::sleep(Duration::from_millis(pause_ms));
        out.write_all(&bytes[bytes.len() / 2..]).unwrap();
    }
    copy_in(&series.files[2..], inbox.path());
    daemon.wait_until("40 slices judged", 60, |d| d.results().iter().any(|r| r["slices"] == 40));
    expect_no_more(&daemon, daemon.results().len());
    let results = daemon.results();
    let last = results.iter().max_by_key(|r| r["revision"].as_u64()).unwrap();
    assert_eq!((last["outcome"].as_str(), last["slices"].as_u64()), (Some("result"), Some(40)), "{last}");
}

#[test]
fn taken_files_are_moved_aside_and_others_stay() {
    let series = phantom_series(103, 40, 128);
    let inbox = tempfile::tempdir().unwrap();
    let daemon = watching(inbox.path(), "move");
    std::fs::write(inbox.path().join("aaa.dcm"), vec![0x5A; 5000]).unwrap();
    std::fs::write(inbox.path().join("empty.dcm"), []).unwrap();
    copy_in(&series.files, inbox.path());
    assert_eq!(daemon.wait_results(1, 60)[0]["slices"], 40);
    let taken = files_below(&inbox.path().join("taken"), |_| true);
    assert_eq!(taken.len(), 40);
    for (taken, sent) in taken.iter().zip(&series.files) {
        assert_eq!(std::fs::read(taken).unwrap(), std::fs::read(sent).unwrap());
    }
    let left = files_below(inbox.path(), |p| !p.starts_with(inbox.path().join("taken")));
    assert_eq!(left.len(), 2, "{left:?}");
    expect_no_more(&daemon, 1);
}

#[test]
fn taken_files_are_deleted_and_a_second_series_follows() {
    let (a, b) = (phantom_series(104, 40, 128), phantom_series(105, 30, 128));
    let inbox = tempfile::tempdir().unwrap();
    let daemon = watching(inbox.path(), "delete");
    copy_in(&a.files, inbox.path());
    assert_eq!(daemon.wait_results(1, 60)[0]["slices"], 40);
    assert_eq!(files_below(inbox.path(), |_| true).len(), 0);
    copy_in(&b.files, inbox.path());
    let results = daemon.wait_results(2, 60);
    assert!(results.iter().any(|r| r["slices"] == 30), "{results:?}");
    assert_eq!(files_below(inbox.path(), |_| true).len(), 0);
}

// ---- planted identifiers

const PLANTED: [&str; 8] =
    ["zebrafish", "quagmire", "xq-planted", "acc55512345", "19330417", "1.2.826.0.1.999", "plantedaet", "wombat"];

fn plant(k: usize, object: &mut DefaultDicomObject) {
    let class = object.element(tags::SOP_CLASS_UID).unwrap().to_str().unwrap().into_owned();
    identify(object, &class, &format!("1.2.826.0.1.999.3.{k}"));
    set(object, tags::STUDY_INSTANCE_UID, VR::UI, "1.2.826.0.1.999.1");
    set(object, tags::SERIES_INSTANCE_UID, VR::UI, "1.2.826.0.1.999.2");
    set(object, tags::FRAME_OF_REFERENCE_UID, VR::UI, "1.2.826.0.1.999.4");
    set(object, tags::PATIENT_NAME, VR::PN, "ZEBRAFISH^QUAGMIRE");
    set(object, tags::PATIENT_ID, VR::LO, "XQ-PLANTED-7781");
    set(object, tags::PATIENT_BIRTH_DATE, VR::DA, "19330417");
    set(object, tags::ACCESSION_NUMBER, VR::SH, "ACC55512345");
    for tag in [tags::STUDY_DATE, tags::SERIES_DATE, tags::ACQUISITION_DATE, tags::CONTENT_DATE] {
        set(object, tag, VR::DA, "19330417");
    }
    set(object, tags::REFERRING_PHYSICIAN_NAME, VR::PN, "WOMBAT^A");
    set(object, tags::INSTITUTION_NAME, VR::LO, "WOMBAT HOSPITAL");
    set(object, tags::STUDY_DESCRIPTION, VR::LO, "WOMBAT CHEST");
    set(object, tags::SERIES_DESCRIPTION, VR::LO, "WOMBAT AXIAL");
    set(object, tags::PROTOCOL_NAME, VR::LO, "WOMBAT PROTOCOL");
    set(object, tags::STATION_NAME, VR::SH, "PLANTEDAET");
}

fn expect_nothing_planted(what: &str, bytes: &[u8]) {
    let lower = bytes.to_ascii_lowercase();
    for planted in PLANTED {
        let at = lower.windows(planted.len()).position(|w| w == planted.as_bytes());
        if let Some(at) = at {
            let around = &bytes[at.saturating_sub(200)..(at + 100).min(bytes.len())];
            panic!("{planted} in {what}: {}", String::from_utf8_lossy(around));
        }
    }
}

#[test]
fn planted_identifiers_are_in_no_log_metric_page_answer_or_file_name() {
    let series = phantom_series(111, 40, 128);
    let (work, inbox) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let made = |name: &str| {
        let dir = work.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        dir
    };
    let sound = edited(&series.files, &made("sound"), plant);
    let other_uid = |k: usize, object: &mut DefaultDicomObject, series: u32| {
        plant(k, object);
        set(object, tags::SERIES_INSTANCE_UID, VR::UI, &format!("1.2.826.0.1.999.2.{series}"));
        let class = object.element(tags::SOP_CLASS_UID).unwrap().to_str().unwrap().into_owned();
        identify(object, &class, &format!("1.2.826.0.1.999.3.{series}.{k}"));
    };
    // Values that parsers complain of.
    let bad = edited(&series.files[..10], &made("bad"), |k, o| {
        other_uid(k, o, k as u32 + 7);
        match k {
            0 => set(o, tags::ROWS, VR::LO, "ZEBRAFISH"),
            1 => set(o, tags::PIXEL_SPACING, VR::DS, "ZEBRAFISH\\1"),
            2 => set(o, tags::IMAGE_POSITION_PATIENT, VR::DS, "1\\QUAGMIRE\\2"),
            3 => set(o, tags::IMAGE_ORIENTATION_PATIENT, VR::DS, "QUAGMIRE"),
            4 => set(o, tags::RESCALE_SLOPE, VR::DS, "WOMBAT"),
            5 => set(o, tags::MODALITY, VR::CS, "WOMBAT"),
            6 => set(o, tags::IMAGE_TYPE, VR::CS, "DERIVED\\SECONDARY\\WOMBAT"),
            7 => set(o, tags::RESCALE_TYPE, VR::LO, "WOMBAT"),
            8 => set(o, tags::PHOTOMETRIC_INTERPRETATION, VR::CS, "WOMBAT"),
            _ => set(o, tags::SERIES_INSTANCE_UID, VR::UI, "1.2.826.0.1.999.ZEBRAFISH/../QUAGMIRE"),
        }
    });
    let foreign = edited(&series.files[..1], &made("foreign"), |k, o| {
        other_uid(k, o, 40);
        identify(o, "1.2.826.0.1.999.77", "1.2.826.0.1.999.3.78");
    });
    let inbox_path = inbox.path().display().to_string();
    let daemon = Daemon::start(&format!(
        "[folder]\npath = {inbox_path:?}\n\n[log]\nfilter = \"trace\"\n\n[assembly]\ngrace_ms = 200\n"
    ));
    let planted = SendOptions { calling_ae_title: "PLANTEDAET".to_owned(), ..options(&daemon) };
    send(&sound, &planted, &mut |_| {}).unwrap();
    for files in [&bad, &foreign] {
        send(files, &planted, &mut |_| {}).unwrap();
    }
    let wrong = SendOptions { called_ae_title: "WOMBAT".to_owned(), ..planted.clone() };
    assert!(matches!(send(&sound, &wrong, &mut |_| {}), Err(ScuError::Rejected(_))));
    std::fs::create_dir(inbox.path().join("ZEBRAFISH")).unwrap();
    std::fs::write(inbox.path().join("ZEBRAFISH/QUAGMIRE.dcm"), b"no DICOM").unwrap();
    std::fs::write(inbox.path().join("WOMBAT.dcm"), &std::fs::read(&bad[0]).unwrap()[..400]).unwrap();
    // A late slice, a conflict and a restart write more lines.
    let conflict = edited(&sound[3..4], &made("conflict"), |_, o| flip_a_pixel(o));
    daemon.wait_until("a result", 60, |d| d.results().iter().any(|r| r["outcome"] == "result"));
    send(&conflict, &planted, &mut |_| {}).unwrap();
    daemon.wait_until("a conflict", 60, |d| d.results().iter().any(|r| r["reason"] == "duplicate_conflict"));
    // All but the one whose UID is none.
    daemon.wait_results(2 + 9, 60);
    // They are made once, after the result is out.
    daemon.wait_until("pictures", 60, |d| {
        files_below(&d.data.join("results"), |p| p.extension().is_some_and(|e| e == "html")).len() == 1
    });
    let daemon = daemon.kill_and_restart();
    std::thread::sleep(Duration::from_secs(3));

    let results = daemon.results();
    let log = daemon.log();
    assert!(log.contains("slice stored") && log.contains("slice refused"), "the log says enough to be worth a look");
    expect_nothing_planted("the log", log.as_bytes());
    for page in ["/metrics", "/readyz", "/healthz", "/api/results"] {
        expect_nothing_planted(page, daemon.get(page).1.as_bytes());
    }
    let mut contents = 0;
    for file in files_below(&daemon.data, |_| true) {
        let name = file.strip_prefix(&daemon.data).unwrap().display().to_string();
        expect_nothing_planted("a file name", name.as_bytes());
        let base = file.file_name().unwrap().to_string_lossy().into_owned();
        let may_hold =
            base == "journal" || base == "identity" || base.starts_with("volume-") || base.starts_with("darnet.sqlite");
        if !may_hold {
            contents += 1;
            expect_nothing_planted(&name, &std::fs::read(&file).unwrap());
        }
    }
    assert!(contents > 3, "pages and pictures were read");
    for result in results.iter().filter(|r| r["outcome"] == "result") {
        let page = format!("/results/{}/{}/summary.html", result["series"].as_str().unwrap(), result["revision"]);
        let (status, body) = daemon.get(&page);
        if status == 200 {
            expect_nothing_planted(&page, body.as_bytes());
        }
    }
}

// ---- metrics and health

#[test]
fn metrics_health_and_readiness_after_a_series() {
    let promtool = require("promtool", "apt-get install prometheus");
    let series = phantom_series(121, 40, 128);
    let daemon = Daemon::start("[assembly]\ngrace_ms = 300\n");
    push(&daemon, &series.files);
    daemon.wait_results(1, 60);
    daemon
        .wait_until("the pictures are timed", 30, |d| d.metric("darnet_stage_seconds_count{stage=\"explain\"}") >= 2.0);
    let (status, text) = daemon.get("/metrics");
    assert_eq!(status, 200);
    let mut child = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.trim().is_empty(), "promtool: {said}");

    for (stage, at_least) in [
        ("ingest", 40.0),
        ("journal", 1.0),
        ("decode", 40.0),
        ("assemble", 40.0),
        ("resample", 40.0),
        ("infer", 1.0),
        ("explain", 1.0),
        ("publish", 1.0),
    ] {
        let count = daemon.metric(&format!("darnet_stage_seconds_count{{stage=\"{stage}\"}}"));
        assert!(count >= at_least, "{stage}: {count}");
        let sum = daemon.metric(&format!("darnet_stage_seconds_sum{{stage=\"{stage}\"}}"));
        // A small slice comes in one read: no time between its first and last byte.
        assert!((sum > 0.0 || stage == "ingest") && (0.0..120.0).contains(&sum), "{stage}: {sum} s");
    }
    assert_eq!(daemon.metric("darnet_last_slice_to_alert_seconds_count"), 1.0);
    let alert = daemon.metric("darnet_last_slice_to_alert_seconds_sum");
    let wait = daemon.metric("darnet_completion_wait_seconds_sum");
    assert!(wait >= 0.3 && alert >= wait && alert < 60.0, "alert {alert} s, of it waiting {wait} s");
    assert_eq!(daemon.metric("darnet_slices_total{outcome=\"stored\"}"), 40.0);
    let bytes: u64 = series.files.iter().map(|f| std::fs::metadata(f).unwrap().len()).sum();
    let received = daemon.metric("darnet_ingest_bytes_total");
    assert!(received < bytes as f64 && received > bytes as f64 - 40.0 * 600.0, "{received} of {bytes}");
    assert_eq!(daemon.metric("darnet_outcomes_total"), 1.0);
    assert_eq!(daemon.metric("darnet_outcomes_total{outcome=\"result\",reason=\"none\"}"), 1.0);
    assert_eq!(daemon.metric("darnet_build_info"), 1.0);
    assert_eq!(daemon.metric("darnet_series_completed_total{cause=\"released\"}"), 1.0);
    assert_eq!(daemon.metric("darnet_associations_total{result=\"released\"}"), 1.0);
    assert_eq!(daemon.metric("darnet_associations_active"), 0.0);
    for queue in ["assemble", "decode", "decoded", "infer", "publish"] {
        assert!(text.contains(&format!("darnet_queue_depth{{queue=\"{queue}\"}}")), "{queue}");
        let depth = daemon.metric(&format!("darnet_queue_depth{{queue=\"{queue}\"}}"));
        let capacity = daemon.metric(&format!("darnet_queue_capacity{{queue=\"{queue}\"}}"));
        assert!(depth == 0.0 && capacity >= 1.0, "{queue}: {depth} of {capacity}");
    }

    assert_eq!(daemon.get("/healthz").0, 200);
    let (status, body) = daemon.get("/readyz");
    assert_eq!(status, 200, "{body}");
    let ready: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(ready["ready"], true);
    let checks = ready["checks"].as_array().unwrap();
    for name in ["store", "pipeline", "disk", "backend"] {
        let check = checks.iter().find(|c| c["name"] == name).unwrap_or_else(|| panic!("{name}: {body}"));
        assert_eq!(check["ok"], true, "{check}");
    }
}

// ---- several reconstructions, several series

#[test]
fn of_several_reconstructions_the_preferred_one_is_live_whatever_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let spec = PhantomSpec::random(PhantomClass::Covid, 131).with_shape(110, 128, 128).with_kernel(Kernel::Medium);
    let mut sets: Vec<Vec<PathBuf>> = Vec::new();
    for (n, variant) in series_variants(&spec).iter().enumerate() {
        let options = DicomOptions {
            study_uid: Some("2.25.131131131".to_owned()),
            series_number: n as u32 + 2,
            ..DicomOptions::default()
        };
        sets.push(write_dicom(&generate(variant), &dir.path().join(n.to_string()), &options).unwrap());
    }
    let expected = spec.thickness_mm;
    for order in [[0, 1, 2], [1, 2, 0], [2, 0, 1]] {
        let daemon = Daemon::start("[assembly]\ngrace_ms = 100\n");
        for (sent, set) in order.iter().enumerate() {
            push(&daemon, &sets[*set]);
            // One by one, so that the order of publication is that of sending.
            daemon.wait_results(sent + 1, 60);
        }
        let results = daemon.results();
        assert!(results.iter().all(|r| r["outcome"] == "result"), "{order:?}: {results:?}");
        let studies: std::collections::BTreeSet<_> = results.iter().map(|r| r["study"].to_string()).collect();
        assert_eq!(studies.len(), 1, "{order:?}");
        let live: Vec<&Value> = results.iter().filter(|r| r["live"] == true).collect();
        assert_eq!(live.len(), 1, "{order:?}: {results:?}");
        assert_eq!(live[0]["reconstruction"]["kernel"], "MEDIUM", "{order:?}: {results:?}");
        let thickness = live[0]["reconstruction"]["slice_thickness_mm"].as_f64().unwrap();
        assert!((thickness - expected).abs() < 1e-3, "{order:?}: {thickness} for {expected}");
        let (_, only_live) = daemon.get("/api/results?live=true");
        let only_live: Value = serde_json::from_str(&only_live).unwrap();
        assert_eq!(only_live["results"].as_array().unwrap().len(), 1);
    }
}

#[test]
fn three_series_over_six_associations_are_counted_right() {
    let series = [phantom_series(141, 40, 128), phantom_series(142, 50, 128), phantom_series(143, 60, 128)];
    let mut files: Vec<PathBuf> = Vec::new();
    for k in 0..60 {
        files.extend(series.iter().filter_map(|s| s.files.get(k).cloned()));
    }
    let daemon = Daemon::start("");
    let options = SendOptions { associations: 6, ..options(&daemon) };
    assert_eq!(send(&files, &options, &mut |_| {}).unwrap().stored, 150);
    let results = daemon.wait_results(3, 60);
    let mut counts: Vec<u64> = results.iter().map(|r| r["slices"].as_u64().unwrap()).collect();
    counts.sort_unstable();
    assert_eq!(counts, [40, 50, 60], "{results:?}");
    assert!(results.iter().all(|r| r["outcome"] == "result" && r["revision"] == 1), "{results:?}");
    assert_eq!(daemon.metric("darnet_slices_total{outcome=\"stored\"}"), 150.0);
    assert_eq!(daemon.metric("darnet_associations_total{result=\"accepted\"}"), 6.0);
    assert_eq!(daemon.metric("darnet_outcomes_total"), 3.0);
    expect_no_more(&daemon, 3);
}

// ---- repeats

#[test]
fn other_pixels_under_a_published_uid_withdraw_the_result() {
    let series = phantom_series(151, 40, 128);
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start("[assembly]\ngrace_ms = 200\n");
    push(&daemon, &series.files);
    let first = daemon.wait_results(1, 60).remove(0);
    push(&daemon, &series.files);
    expect_no_more(&daemon, 1);
    assert_eq!(daemon.metric("darnet_slices_total{outcome=\"duplicate\"}"), 40.0);

    let other = edited(&series.files[5..6], dir.path(), |_, o| flip_a_pixel(o));
    push(&daemon, &other);
    let both = daemon.wait_results(2, 60);
    let second = both.iter().find(|r| r["revision"] == 2).unwrap_or_else(|| panic!("{both:?}"));
    assert_eq!(second["outcome"], "no_result");
    assert_eq!(second["reason"], "duplicate_conflict");
    assert_eq!(second["supersedes"], first["result_uid"]);
    assert_eq!(second["live"], true);
    assert_eq!(both.iter().filter(|r| r["live"] == true).count(), 1, "{both:?}");
    assert_eq!(daemon.metric("darnet_slices_total{outcome=\"conflict\"}"), 1.0);

    push(&daemon, &other);
    push(&daemon, &series.files[5..6]);
    expect_no_more(&daemon, 2);
    // Nor does a restart.
    let daemon = daemon.kill_and_restart();
    push(&daemon, &other);
    expect_no_more(&daemon, 2);
}

// ---- what is no CT slice

fn object_without_image(sop_class_uid: &str, modality: &str, n: usize, to: &Path) -> PathBuf {
    let instance = format!("2.25.161{n}");
    let mut object = InMemDicomObject::new_empty();
    let mut put = |tag: Tag, vr: VR, value: &str| object.put(DataElement::new(tag, vr, PrimitiveValue::from(value)));
    put(tags::SOP_CLASS_UID, VR::UI, sop_class_uid);
    put(tags::SOP_INSTANCE_UID, VR::UI, &instance);
    put(tags::MODALITY, VR::CS, modality);
    put(tags::STUDY_INSTANCE_UID, VR::UI, "2.25.1610");
    put(tags::SERIES_INSTANCE_UID, VR::UI, &format!("2.25.1611{n}"));
    put(tags::SERIES_NUMBER, VR::IS, "900");
    put(tags::INSTANCE_NUMBER, VR::IS, "1");
    let meta = FileMetaTableBuilder::new()
        .media_storage_sop_class_uid(sop_class_uid)
        .media_storage_sop_instance_uid(&instance)
        .transfer_syntax(uids::EXPLICIT_VR_LITTLE_ENDIAN);
    let path = to.join(format!("object-{n}.dcm"));
    object.with_meta(meta).unwrap().write_to_file(&path).unwrap();
    path
}

#[test]
fn objects_without_images_are_taken_and_ignored_and_other_images_are_refused() {
    let series = phantom_series(161, 25, 64);
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start("[assembly]\ngrace_ms = 200\n");
    let ignored: Vec<PathBuf> = [
        ("1.2.840.10008.5.1.4.1.1.88.67", "SR"), // X-Ray Radiation Dose SR
        ("1.2.840.10008.5.1.4.1.1.88.11", "SR"), // Basic Text SR
        ("1.2.840.10008.5.1.4.1.1.11.1", "PR"),  // Grayscale Softcopy Presentation State
        ("1.2.840.10008.5.1.4.1.1.66", "REG"),   // Raw Data
        ("1.3.12.2.1107.5.9.1", "CT"),           // a vendor's own
    ]
    .iter()
    .enumerate()
    .map(|(n, (class, modality))| object_without_image(class, modality, n, dir.path()))
    .collect();
    let report = try_push(&daemon, &ignored);
    assert!(report.statuses.iter().all(|s| *s == SendStatus::Stored), "{:?}", report.statuses);
    assert_eq!(daemon.metric("darnet_objects_ignored_total"), 5.0);
    expect_no_more(&daemon, 0);

    for (n, (class, modality)) in
        [("1.2.840.10008.5.1.4.1.1.7", "OT"), ("1.2.840.10008.5.1.4.1.1.4", "MR")].iter().enumerate()
    {
        let to = dir.path().join(modality);
        std::fs::create_dir(&to).unwrap();
        let files = edited(&series.files, &to, |k, o| {
            identify(o, class, &format!("2.25.162{n}{k}"));
            set(o, tags::MODALITY, VR::CS, modality);
            set(o, tags::SERIES_INSTANCE_UID, VR::UI, &format!("2.25.1629{n}"));
        });
        push(&daemon, &files);
        let results = daemon.wait_results(n + 1, 60);
        assert!(results.iter().all(|r| r["outcome"] == "no_result" && r["reason"] == "not_ct"), "{results:?}");
    }
    assert_eq!(daemon.metric("darnet_outcomes_total{outcome=\"no_result\",reason=\"not_ct\"}"), 2.0);
}

// ---- associations

/// Runs a pynetdicom script with the port; what it prints.
///
/// The answer to an association request is taken from the PDU as it came. `associate` itself loses a reject now and
/// then: it looks whether the connection is open only after its other thread may have read the reject and closed it,
/// and then says that it could not connect. A failed script ends at once and does not wait for the threads of its
/// open associations.
fn pynetdicom(daemon: &Daemon, script: &str) -> String {
    let head = r#"
import os, sys, traceback
from pynetdicom import AE, evt
from pynetdicom.pdu import A_ASSOCIATE_RJ
def fail(*what):
    traceback.print_exception(*what)
    sys.stderr.flush()
    os._exit(1)
sys.excepthook = fail
def ask(calling="PEER", called="DARNET"):
    ae = AE(ae_title=calling)
    ae.add_requested_context("1.2.840.10008.1.1")
    pdus = []
    handlers = [(evt.EVT_PDU_RECV, lambda event: pdus.append(event.pdu))]
    assoc = ae.associate("127.0.0.1", int(sys.argv[1]), ae_title=called, evt_handlers=handlers)
    if assoc.is_established:
        return assoc, "accepted"
    assert [type(p) for p in pdus] == [A_ASSOCIATE_RJ], f"{pdus}: aborted {assoc.is_aborted}, {calling} to {called}"
    return assoc, f"{pdus[0].result}/{pdus[0].source}/{pdus[0].reason_diagnostic}"
"#;
    let (code, out, err) = run(Command::new(python()).args(["-c", &format!("{head}{script}"), daemon.dicom_port()]));
    assert_eq!(code, 0, "{out}{err}");
    out.trim().to_owned()
}

#[test]
fn the_third_association_of_two_is_rejected_until_one_ends() {
    let daemon = Daemon::start("[dicom]\nbind = \"127.0.0.1:0\"\nmax_associations = 2\n");
    // The place is free when the answer to the release is there, without a wait.
    let script = r#"
a, said_a = ask()
b, said_b = ask()
c, said_c = ask()
a.release()
d, said_d = ask()
print(said_a, said_b, said_c, said_d)
for x in (b, d):
    assert x.send_c_echo().Status == 0
    x.release()
"#;
    assert_eq!(pynetdicom(&daemon, script), "accepted accepted 2/3/2 accepted");
    assert_eq!(daemon.metric("darnet_association_rejects_total{reason=\"local_limit\"}"), 1.0);
    daemon.wait_until("no association is open", 10, |d| d.metric("darnet_associations_active") == 0.0);
}

#[test]
fn ae_titles_are_checked_both_ways() {
    let daemon = Daemon::start(
        "[dicom]\nbind = \"127.0.0.1:0\"\nae_title = \"TRIAGE\"\ncalling_ae_titles = [\"SCANNER1\", \"ARCHIVE\"]\n",
    );
    let script = r#"
for pair in (("SCANNER1", "TRIAGE"), ("ARCHIVE", "TRIAGE"), ("SCANNER1", "DARNET"), ("STRANGER", "TRIAGE")):
    assoc, said = ask(*pair)
    print(said)
    if assoc.is_established:
        assoc.release()
"#;
    assert_eq!(pynetdicom(&daemon, script), "accepted\naccepted\n1/1/7\n1/1/3");
    let echoscu = require("echoscu", "apt-get install dcmtk");
    let (code, _, _) =
        run(Command::new(&echoscu).args(["-aet", "ARCHIVE", "-aec", "TRIAGE", "127.0.0.1", daemon.dicom_port()]));
    assert_eq!(code, 0);
    let (code, _, err) =
        run(Command::new(&echoscu).args(["-aet", "ARCHIVE", "-aec", "OTHER", "127.0.0.1", daemon.dicom_port()]));
    assert_ne!(code, 0);
    assert!(err.contains("Called AE Title Not Recognized"), "{err}");
    assert_eq!(daemon.metric("darnet_association_rejects_total{reason=\"called_ae_title\"}"), 2.0);
    assert_eq!(daemon.metric("darnet_association_rejects_total{reason=\"calling_ae_title\"}"), 1.0);
}

// ---- completion

#[test]
fn only_a_trusted_senders_count_completes_a_series() {
    let dir = tempfile::tempdir().unwrap();
    let spec = PhantomSpec::random(PhantomClass::Healthy, 171).with_shape(40, 128, 128);
    let declaring = DicomOptions { declare_count: true, ..DicomOptions::default() };
    let files = write_dicom(&generate(&spec), dir.path(), &declaring).unwrap();
    for (title, cause) in [("SCANNER1", "declared"), ("STRANGER", "released")] {
        let daemon = Daemon::start("[peers]\ntrust_series_count = [\"SCANNER1\"]\n\n[assembly]\ngrace_ms = 5000\n");
        let options = SendOptions { calling_ae_title: title.to_owned(), ..options(&daemon) };
        assert_eq!(send(&files, &options, &mut |_| {}).unwrap().stored, 40);
        let result = daemon.wait_results(1, 60).remove(0);
        assert_eq!(result["completion"]["cause"], cause, "{title}: {result}");
        let wait_ms = result["latency"]["completion_wait_ms"].as_f64().unwrap();
        if cause == "declared" {
            assert!(wait_ms < 4000.0, "{title}: {wait_ms} ms");
        } else {
            assert!(wait_ms >= 5000.0, "{title}: {wait_ms} ms");
        }
        assert_eq!(daemon.metric(&format!("darnet_series_completed_total{{cause=\"{cause}\"}}")), 1.0);
        expect_no_more(&daemon, 1);
    }
}

// ---- reload

#[test]
fn a_changed_configuration_is_taken_and_a_faulty_one_is_not() {
    let short = phantom_series(181, 5, 64);
    let shorter = phantom_series(182, 4, 64);
    let shortest = phantom_series(183, 3, 64);
    let daemon = Daemon::start("[dicom]\nbind = \"127.0.0.1:0\"\nae_title = \"FIRST\"\n\n[assembly]\ngrace_ms = 100\n");
    let as_title = |title: &str| SendOptions { called_ae_title: title.to_owned(), ..options(&daemon) };
    assert_eq!(send(&short.files, &as_title("FIRST"), &mut |_| {}).unwrap().stored, 5);
    assert_eq!(daemon.wait_results(1, 60)[0]["alert"]["level"], "none");

    // Another title and another alert policy; the ports, chosen by the system, stay.
    daemon.reload(|text| text.replace("FIRST", "SECOND") + "\n[alert]\nno_result = \"routine\"\n");
    let echo = |title: &str| darnet::dicom::scu::echo(&as_title(title)).is_ok();
    daemon.wait_until("the new title answers", 30, |_| echo("SECOND"));
    assert!(!echo("FIRST"));
    daemon.wait_until("the web port answers", 30, |d| std::net::TcpStream::connect(&d.web).is_ok());
    assert_eq!(send(&shorter.files, &as_title("SECOND"), &mut |_| {}).unwrap().stored, 4);
    let results = daemon.wait_results(2, 60);
    let new = results.iter().find(|r| r["slices"] == 4).unwrap();
    assert_eq!(new["alert"]["level"], "routine", "{new}");

    // A fault: the old configuration stays, and so does the service.
    let good = std::fs::read_to_string(&daemon.config).unwrap();
    let faults = || daemon.metric("darnet_config_faults_total");
    let before = faults();
    daemon.reload(|text| text.replace("SECOND", "THIRD").replace("grace_ms = 100", "grace_ms = \"soon\""));
    daemon.wait_until("the fault is counted", 30, |_| faults() > before);
    assert!(echo("SECOND") && !echo("THIRD"));
    daemon.reload(|_| good.replace("grace_ms = 100", "grace_ms = 100\nmax_open_series = 0"));
    daemon.wait_until("the second fault is counted", 30, |_| faults() > before + 1.0);

    // What a check does not find (the port of the web page is taken) goes back to the old one, on the old ports.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let at = good.find("[web]\nbind = ").unwrap();
    let (head, tail) = good.split_at(at);
    let elsewhere = head.to_owned() + &tail.replacen("127.0.0.1:0", &address, 1);
    daemon.reload(|_| elsewhere.replace("SECOND", "FOURTH"));
    daemon.wait_until("the fall back is logged", 30, |d| d.log().contains("went back to the old configuration"));
    daemon.wait_until("the old title answers", 30, |_| echo("SECOND"));

    // And once more a good one: the ports still stay.
    daemon.reload(|_| good.replace("SECOND", "FIFTH"));
    daemon.wait_until("the fifth title answers on the same port", 30, |_| echo("FIFTH"));
    daemon.wait_until("the web port answers", 30, |d| std::net::TcpStream::connect(&d.web).is_ok());
    assert_eq!(send(&shortest.files, &as_title("FIFTH"), &mut |_| {}).unwrap().stored, 3);
    let results = daemon.wait_results(3, 60);
    assert_eq!(results.len(), 3, "nothing was judged twice: {results:?}");
}

// ---- real data

#[test]
fn a_real_head_is_refused_and_a_real_chest_is_judged() {
    let Some(head) = real_data("tilt-ge-18.5deg.tar.xz") else { return };
    let head_files = files_below(head.path(), |p| p.extension().is_some_and(|e| e == "dcm"));
    let chest = chest_series();
    let daemon = Daemon::start("[assembly]\ngrace_ms = 300\n");
    assert!(head_files.len() >= 28, "{}", head_files.len());
    push(&daemon, &head_files);
    push(&daemon, &chest.files);
    let results = daemon.wait_results(2, 120);
    let chest_result = results.iter().find(|r| r["slices"] == 123).unwrap();
    assert_eq!(chest_result["outcome"], "result", "{chest_result}");
    assert!(chest_result["quality"].is_array(), "{chest_result}");
    println!("notes of the chest: {}", chest_result["quality"]);
    for refused in results.iter().filter(|r| r["slices"] != 123) {
        println!("the head: {} {}", refused["reason"], refused["detail"]);
        assert_eq!(refused["outcome"], "no_result", "{refused}");
        assert!(["no_lung", "gap"].contains(&refused["reason"].as_str().unwrap()), "{refused}");
        assert!(!refused["detail"].as_str().unwrap().is_empty());
    }
}

#[test]
fn enhanced_ct_and_lossy_12_bit_jpeg_end_as_no_result_with_a_reason() {
    let Some(dir) = real_data("encodings.tar.xz") else { return };
    let named = |name: &str| files_below(dir.path(), |p| p.ends_with(name));
    let (enhanced, lossy) = (named("eCT_Supplemental.dcm"), named("lidc0350.jpegext12.dcm"));
    assert_eq!((enhanced.len(), lossy.len()), (1, 1));
    let inbox = tempfile::tempdir().unwrap();
    let daemon = watching(inbox.path(), "leave");
    push(&daemon, &enhanced);
    // No association takes lossy JPEG of 12 bits: a sender converts it or says so. A file may still hold it.
    assert_eq!(try_push(&daemon, &lossy).statuses, [SendStatus::NotAccepted]);
    copy_in(&lossy, inbox.path());
    let results = daemon.wait_results(2, 60);
    for result in &results {
        println!("{} {}", result["reason"], result["detail"]);
        assert_eq!(result["outcome"], "no_result", "{result}");
        assert_eq!(result["reason"], "undecodable", "{result}");
        assert!(!result["detail"].as_str().unwrap().is_empty(), "{result}");
    }
    assert_eq!(daemon.get("/healthz").0, 200);
}

// ---- out of space

#[test]
fn beyond_the_bound_of_all_journals_slices_are_refused_and_a_resend_after_raising_it_is_judged() {
    // 60 slices of 128 x 128 are 60 x 33 KiB = 2 MiB.
    let series = phantom_series(191, 60, 128);
    let daemon = Daemon::start("[assembly]\nmax_journal_bytes = 1048576\ngrace_ms = 200\n");
    let report = try_push(&daemon, &series.files);
    assert!((25..=35).contains(&report.stored), "{}", report.stored);
    let refused = report.statuses.iter().filter(|s| **s == SendStatus::Refused(0xA700)).count();
    assert_eq!(refused + report.stored, 60, "{:?}", report.statuses);
    assert_eq!(daemon.metric("darnet_slices_total{outcome=\"refused\"}"), refused as f64);
    assert_eq!(daemon.get("/healthz").0, 200);
    daemon.wait_results(1, 60);
    daemon.reload(|text| text.replace("max_journal_bytes = 1048576", "max_journal_bytes = 104857600"));
    let mut again = None;
    daemon.wait_until("everything is taken", 30, |d| {
        again = send(&series.files, &options(d), &mut |_| {}).ok();
        again.as_ref().is_some_and(|r| r.stored == 60)
    });
    daemon.wait_until("the whole series is judged", 60, |d| {
        std::net::TcpStream::connect(&d.web).is_ok()
            && d.results().iter().any(|r| r["slices"] == 60 && r["outcome"] == "result")
    });
}

#[test]
fn on_a_full_disk_slices_are_refused_and_a_resend_after_freeing_it_is_judged() {
    if Command::new("unshare").args(["-rm", "true"]).status().map_or(true, |s| !s.success()) {
        println!("NOT RUN: user and mount namespaces are not allowed here");
        return;
    }
    let series = phantom_series(192, 60, 256);
    let daemon = Daemon::start_through("[assembly]\ngrace_ms = 300\n", |data, config| {
        let script = "mount -t tmpfs -o size=64m tmpfs \"$1\" && head -c 62000000 /dev/zero > \"$1/ballast\" \
                      && exec \"$2\" serve --config \"$3\"";
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", script, "sh"]).arg(data).arg(DARNET).arg(config);
        command
    });
    // 60 slices of 256 x 256 are 60 x 129 KiB = 7.6 MiB in the journal and as much again in the volume: 5 MB are free.
    let report = try_push(&daemon, &series.files);
    let refused = report.statuses.iter().filter(|s| **s == SendStatus::Refused(0xA700)).count();
    println!("full disk: {} stored, {refused} refused", report.stored);
    assert_eq!(refused + report.stored, 60, "{:?}", report.statuses);
    assert!(report.stored < 60, "the disk was meant to be full");
    assert_eq!(daemon.get("/healthz").0, 200);
    assert_eq!(daemon.get("/readyz").0, 503, "little space is said");
    std::thread::sleep(Duration::from_secs(1));
    let ballast = format!("/proc/{}/root{}/ballast", daemon.pid(), daemon.data.display());
    std::fs::remove_file(ballast).unwrap();
    push(&daemon, &series.files);
    let since = Instant::now();
    daemon.wait_until("the whole series is judged", 60, |d| {
        d.results().iter().any(|r| r["slices"] == 60 && r["outcome"] == "result")
    });
    println!("judged {:.1} s after the resend", since.elapsed().as_secs_f64());
}
