//! `prepare` and `split` from the outside: every layout, made here from phantoms; bad data; kills; full disks.
#![cfg(feature = "train-data")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{files_below, real_data};
use darnet::engine::{CancelToken, EngineError, Inference, Session};
use darnet::model::manifest::SourceWindow;
use darnet::model::{CLASS_KEYS, Preprocessing};
use darnet::phantom::{
    DicomOptions, PatientPosition, Phantom, PhantomClass, PhantomSpec, Ranges, Subject, generate, write_dicom,
    write_nifti, write_nifti_mask, write_png,
};
use darnet::pipeline::offline::judge_paths;
use darnet::pipeline::workers::Judge;
use darnet::scan::Loaded;
use darnet::telemetry::StudyHasher;
use darnet::train::cache::{Cache, CacheSpec};
use darnet::train::error::TrainDataError;
use darnet::train::prepare::{PrepareOptions, Prepared, prepare};
use darnet::train::sources::{PhantomOptions, SourceFormat, SourceOptions};
use darnet::train::split::Split;
use darnet::volume::geometry::GeometryLimits;

fn spec() -> CacheSpec {
    CacheSpec {
        input_dhw: [8, 24, 24],
        preprocessing: Preprocessing::default(),
        class_keys: CLASS_KEYS.map(str::to_owned).to_vec(),
    }
}

fn options(sources: SourceOptions, out: &Path) -> PrepareOptions {
    PrepareOptions { out: out.to_path_buf(), spec: spec(), sources, workers: 2, retry_refused: false, sheets: false }
}

fn phantoms(count: usize, out: &Path) -> PrepareOptions {
    let mut sources = SourceOptions::new(SourceFormat::Phantom, "");
    sources.phantom = PhantomOptions { count, seed: 3, ranges: Ranges::Train, side: 64 };
    options(sources, out)
}

fn run(options: &PrepareOptions) -> Prepared {
    prepare(options, &|_| {}).unwrap()
}

fn small(class: PhantomClass, seed: u64) -> Phantom {
    generate(&PhantomSpec::random(class, seed).with_shape(36, 72, 72))
}

/// Reasons by scan, `kept` for those that were.
fn outcomes(prepared: &Prepared) -> Vec<(&str, &str)> {
    prepared.outcomes.iter().map(|o| (o.scan.as_str(), o.reason.as_deref().unwrap_or("kept"))).collect()
}

/// What the network is given for a phantom.
fn input_of(phantom: &Phantom) -> Vec<f32> {
    let hu = phantom.hu.chunks_exact(phantom.spec.slice_len()).map(<[i16]>::to_vec).collect();
    let loaded = Loaded { geometry: phantom.geometry(), hu, notes: Vec::new() };
    let scan = loaded.into_scan(&GeometryLimits::default()).unwrap();
    scan.network_input(&spec().preprocessing, spec().input_dhw).unwrap().values
}

fn largest_difference(cache: &Cache, index: usize, expected: &[f32]) -> f32 {
    let pairs = cache.volume(index).iter().zip(expected);
    pairs.map(|(a, b)| (a.to_f32() - b).abs()).fold(0.0, f32::max)
}

/// Half of the spacing of f16 just below 1.
const ROUNDING: f32 = 0.000_25;

#[test]
fn phantoms_become_a_cache_whatever_the_number_of_workers() {
    let (one, three) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = run(&PrepareOptions { workers: 1, sheets: true, ..phantoms(6, one.path()) });
    let second = run(&PrepareOptions { workers: 3, ..phantoms(6, three.path()) });
    assert_eq!(first.outcomes, second.outcomes);
    assert_eq!(first.cache.cases(), second.cache.cases());
    assert_eq!(first.cache.cases().len(), 6);
    for (i, case) in first.cache.cases().iter().enumerate() {
        assert_eq!(first.cache.volume(i), second.cache.volume(i), "{}", case.scan);
        assert_eq!(first.cache.mask(i), second.cache.mask(i));
        let class = PhantomClass::ALL.iter().find(|c| c.class_key() == CLASS_KEYS[case.class]).unwrap();
        let subject = Subject::numbered(*class, i, 3, Ranges::Train, 64).unwrap();
        assert!(largest_difference(&first.cache, i, &input_of(&subject.generate())) <= ROUNDING);
        assert_eq!(first.cache.mask(i).is_some(), case.has_mask);
        assert!(case.has_mask || CLASS_KEYS[case.class] == "healthy");
        if let Some(mask) = first.cache.mask(i) {
            let lesion = mask.iter().filter(|m| **m == 1).count();
            assert!(lesion > 0 && lesion < mask.len() / 2, "{lesion} of {} voxels", mask.len());
        }
    }
    first.cache.verify().unwrap();
    let report = std::fs::read_to_string(one.path().join("report.csv")).unwrap();
    assert_eq!(report.lines().count(), 7);
    let sheet = image::open(one.path().join("sheets/000.png")).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (4 * 74, 2 * 37));
    // Another run has nothing to do.
    let again = run(&phantoms(6, one.path()));
    assert_eq!((again.reused, &again.outcomes), (6, &first.outcomes));
    // More of the same population are added to what is there.
    let more = run(&phantoms(9, one.path()));
    assert_eq!((more.reused, more.cache.cases().len()), (6, 9));
}

#[test]
fn cc_ccii_in_a_known_window_is_the_scan_it_was_exported_from() {
    let dir = tempfile::tempdir().unwrap();
    let (root, out) = (dir.path().join("data"), dir.path().join("cache"));
    let mut inputs = Vec::new();
    for (class, name, patient) in
        [(PhantomClass::Cp, "CP", "11"), (PhantomClass::Covid, "NCP", "12"), (PhantomClass::Healthy, "Normal", "13")]
    {
        let phantom = small(class, 5);
        write_png(&phantom, &root.join(name).join(patient).join("900"), -600.0, 1500.0).unwrap();
        inputs.push(input_of(&phantom));
    }
    let mut sources = SourceOptions::new(SourceFormat::CcCcii, &root);
    sources.source_window = SourceWindow::Window { center_hu: -600.0, width_hu: 1500.0 };
    let cache = run(&options(sources.clone(), &out)).cache;
    let cases: Vec<_> = cache.cases().iter().map(|c| (c.scan.as_str(), c.patient.as_str(), c.class)).collect();
    assert_eq!(cases, [("CP/11/900", "11", 0), ("NCP/12/900", "12", 1), ("Normal/13/900", "13", 2)]);
    for (i, input) in inputs.iter().enumerate() {
        let difference = largest_difference(&cache, i, input);
        assert!(difference < 0.003, "8 bits of 1500 HU: {difference}");
    }
    assert_eq!(cache.source_window(), sources.source_window);
    // Other reading options make the records anew: nothing of the earlier ones is reused.
    sources.source_window = SourceWindow::Unknown;
    let again = run(&options(sources, &out));
    assert_eq!((again.reused, again.cache.source_window()), (0, SourceWindow::Unknown));
}

fn write_mha(phantom: &Phantom, path: &Path) {
    let [d, h, w] = [phantom.spec.slices, phantom.spec.rows, phantom.spec.columns];
    let geometry = phantom.geometry();
    let [x, y, z] = geometry[0].position_mm;
    let pitch = phantom.spec.pixel_spacing_mm;
    let mut file = format!(
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n\
         TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = {x} {y} {z}\nElementSpacing = {pitch} {pitch} {}\n\
         DimSize = {w} {h} {d}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n",
        phantom.spec.spacing_mm
    )
    .into_bytes();
    file.extend(phantom.hu.iter().flat_map(|v| v.to_le_bytes()));
    std::fs::write(path, file).unwrap();
}

#[test]
fn every_other_layout_gives_the_same_input_and_its_mask() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let phantom = small(PhantomClass::Covid, 8);
    let input = input_of(&phantom);
    write_dicom(&phantom, &root.join("dicom/COVID-19/dicom"), &DicomOptions::default()).unwrap();
    write_nifti_mask(&phantom, &phantom.lesion, &root.join("dicom/COVID-19/lesion.nii.gz")).unwrap();
    write_dicom(&phantom, &root.join("md/COVID-19 Cases/P007"), &DicomOptions::default()).unwrap();
    for folder in ["nifti/CT-2", "nifti/masks", "mha"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
    }
    write_nifti(&phantom, &root.join("nifti/CT-2/study_0007.nii.gz")).unwrap();
    write_nifti_mask(&phantom, &phantom.lesion, &root.join("nifti/masks/study_0007_mask.nii.gz")).unwrap();
    write_mha(&phantom, &root.join("mha/1234.mha"));
    std::fs::write(root.join("reference.csv"), "PatientID,probCOVID,probSevere\n1234,1,0\n").unwrap();
    let tiff = root.join("tiff/covid/P1/S1");
    std::fs::create_dir_all(&tiff).unwrap();
    let [h, w] = [phantom.spec.rows as u32, phantom.spec.columns as u32];
    for k in 0..phantom.spec.slices {
        let grey = phantom.slice(k).iter().map(|v| ((i32::from(*v) + 2000) * 4) as u16).collect();
        let picture = image::ImageBuffer::<image::Luma<u16>, _>::from_raw(w, h, grey).unwrap();
        image::DynamicImage::ImageLuma16(picture).save(tiff.join(format!("{k}.tif"))).unwrap();
    }
    for (format, folder, patient, masked, tolerance) in [
        (SourceFormat::Dicom, "dicom", "", true, ROUNDING),
        (SourceFormat::CovidCtMd, "md", "P007", false, ROUNDING),
        (SourceFormat::Nifti, "nifti", "study_0007", true, 0.001),
        (SourceFormat::Mha, "mha", "1234", false, ROUNDING),
        (SourceFormat::Tiff16, "tiff", "P1", false, 0.001),
    ] {
        let mut sources = SourceOptions::new(format, root.join(folder));
        if format == SourceFormat::Mha {
            sources.labels = Some(root.join("reference.csv"));
        }
        (sources.slope, sources.offset_hu) = (0.25, -2000.0);
        let prepared = run(&options(sources, &root.join(format!("cache-{format}"))));
        let cache = &prepared.cache;
        assert_eq!(cache.cases().len(), 1, "{format}: {:?}", outcomes(&prepared));
        let case = &cache.cases()[0];
        assert_eq!((case.class, case.has_mask, case.source_window), (1, masked, SourceWindow::Hu), "{format}");
        if patient.is_empty() {
            assert!(case.patient.starts_with("id-") && !case.patient.contains("PHANTOM"), "{}", case.patient);
        } else {
            assert_eq!(case.patient, patient, "{format}");
        }
        let difference = largest_difference(cache, 0, &input);
        assert!(difference <= tolerance, "{format}: {difference}");
    }
}

/// A session that keeps what it is given.
struct Keep(Arc<Mutex<Vec<f32>>>);

impl Session for Keep {
    fn run(&mut self, input: &[f32], _: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        *self.0.lock().unwrap() = input.to_vec();
        *out = Inference {
            logits: vec![0.0; 3],
            scores: vec![1.0 / 3.0; 3],
            pooled: vec![0.0; 2],
            feature_map: vec![0.0; 2],
            feature_shape_cdhw: [2, 1, 1, 1],
        };
        Ok(())
    }
}

/// The input that `darnet infer` gives to the network.
fn inferred(path: &Path) -> Vec<f32> {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let head: Arc<[f32]> = Arc::from(vec![0.0; 6]);
    let mut judge = Judge::new(&spec().preprocessing, spec().input_dhw, head, Box::new(Keep(Arc::clone(&kept))));
    let hasher = StudyHasher::new([7; 32]);
    let paths = [path.to_path_buf()];
    let judged = judge_paths(&paths, &mut judge, &GeometryLimits::default(), &hasher, &mut |_, _, _| {}).unwrap();
    assert!(judged.iter().any(|j| j.result.is_ok()));
    let input = kept.lock().unwrap();
    input.clone()
}

fn same_as_inferred(folder: &Path, out: &Path, keep: usize) {
    let mut sources = SourceOptions::new(SourceFormat::Dicom, folder);
    sources.class = Some("healthy".to_owned());
    let prepared = run(&options(sources, out));
    assert_eq!(prepared.cache.cases().len(), keep, "{:?}", outcomes(&prepared));
    let expected: Vec<half::f16> = inferred(folder).into_iter().map(half::f16::from_f32).collect();
    assert_eq!(prepared.cache.volume(0), expected, "to the bit");
}

#[test]
fn a_tilted_series_is_cached_to_the_bit_as_it_is_judged() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("series");
    let subject = Subject {
        spec: PhantomSpec::random(PhantomClass::Cp, 4).with_shape(36, 72, 72),
        acquisition: darnet::phantom::Acquisition { tilt_deg: 9.0, prone: true },
        variation: Default::default(),
    };
    let options = DicomOptions { tilt_deg: 9.0, patient_position: PatientPosition::Hfp, ..DicomOptions::default() };
    write_dicom(&subject.generate(), &folder, &options).unwrap();
    same_as_inferred(&folder, &dir.path().join("cache"), 1);
}

#[test]
fn a_real_chest_is_cached_to_the_bit_as_it_is_judged() {
    let Some(data) = real_data("lidc-idri-0306.tar.xz") else { return };
    let out = tempfile::tempdir().unwrap();
    let slice = files_below(data.path(), |p| p.extension().is_some_and(|e| e == "dcm")).remove(0);
    same_as_inferred(slice.parent().unwrap(), &out.path().join("cache"), 1);
}

#[test]
fn a_real_head_is_refused_as_at_the_scanner() {
    let Some(data) = real_data("tilt-ge-18.5deg.tar.xz") else { return };
    let out = tempfile::tempdir().unwrap();
    let mut sources = SourceOptions::new(SourceFormat::Dicom, data.path());
    sources.class = Some("healthy".to_owned());
    let prepared = run(&options(sources, out.path()));
    let reasons: Vec<&str> = outcomes(&prepared).into_iter().map(|o| o.1).collect();
    assert!(!reasons.is_empty() && reasons.iter().all(|r| *r != "kept"), "{reasons:?}");
    assert!(reasons.contains(&"no_lung"), "{reasons:?}");
}

#[test]
fn bad_scans_are_refused_with_their_reasons_and_the_others_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("data");
    let good = small(PhantomClass::Cp, 21);
    write_png(&good, &root.join("CP/1/10"), -600.0, 1500.0).unwrap();
    // One slice.
    let one = root.join("CP/2/20");
    std::fs::create_dir_all(&one).unwrap();
    std::fs::copy(root.join("CP/1/10/0015.png"), one.join("0015.png")).unwrap();
    // An image that is cut short, and one that is none.
    for (scan, bytes) in [("30", 100), ("31", 0)] {
        let folder = root.join("CP/3").join(scan);
        write_png(&good, &folder, -600.0, 1500.0).unwrap();
        let whole = std::fs::read(folder.join("0007.png")).unwrap();
        std::fs::write(folder.join("0007.png"), &whole[..bytes]).unwrap();
    }
    // Two sizes in one scan.
    let mixed = root.join("CP/4/40");
    write_png(&good, &mixed, -600.0, 1500.0).unwrap();
    let other = generate(&PhantomSpec::random(PhantomClass::Cp, 21).with_shape(36, 64, 64));
    write_png(&other, &dir.path().join("other"), -600.0, 1500.0).unwrap();
    std::fs::copy(dir.path().join("other/0003.png"), mixed.join("0003.png")).unwrap();
    // A patient in two classes.
    write_png(&small(PhantomClass::Covid, 22), &root.join("NCP/5/50"), -600.0, 1500.0).unwrap();
    write_png(&small(PhantomClass::Healthy, 22), &root.join("Normal/5/51"), -600.0, 1500.0).unwrap();
    // No chest at all.
    let mut empty = small(PhantomClass::Healthy, 23);
    empty.hu.fill(0);
    write_png(&empty, &root.join("Normal/6/60"), -600.0, 1500.0).unwrap();
    // Nobody says what it is.
    write_png(&good, &root.join("somewhere/7/70"), -600.0, 1500.0).unwrap();

    let mut sources = SourceOptions::new(SourceFormat::CcCcii, &root);
    sources.source_window = SourceWindow::Window { center_hu: -600.0, width_hu: 1500.0 };
    let out = dir.path().join("cache");
    let prepared = run(&options(sources, &out));
    assert_eq!(
        outcomes(&prepared),
        [
            ("CP/1/10", "kept"),
            ("CP/2/20", "too_few_slices"),
            ("CP/3/30", "undecodable"),
            ("CP/3/31", "undecodable"),
            ("CP/4/40", "inconsistent_geometry"),
            ("NCP/5/50", "patient_in_two_classes"),
            ("Normal/5/51", "patient_in_two_classes"),
            ("Normal/6/60", "no_lung"),
            ("somewhere/7/70", "unlabelled"),
        ]
    );
    assert_eq!(prepared.cache.cases().len(), 1);
    let report: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("report.json")).unwrap()).unwrap();
    assert_eq!((&report["kept"], &report["refused"]), (&1.into(), &8.into()));
    assert_eq!(report["reasons"]["undecodable"], 2);
    assert!(report["scans"][1]["detail"].as_str().is_some_and(|d| d.contains("got 1")));
}

#[test]
fn a_dicom_folder_of_several_series_is_resumed_whole() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("NCP/folder");
    write_dicom(&small(PhantomClass::Covid, 31), &root, &DicomOptions::default()).unwrap();
    let mut short = small(PhantomClass::Covid, 32);
    (short.spec.slices, short.hu) = (3, short.hu[..3 * 72 * 72].to_vec());
    write_dicom(&short, &dir.path().join("short"), &DicomOptions::default()).unwrap();
    for (n, file) in files_below(&dir.path().join("short"), |_| true).into_iter().enumerate() {
        std::fs::rename(file, root.join(format!("other-{n}.dcm"))).unwrap();
    }
    std::fs::write(root.join("junk"), b"no dicom").unwrap();
    let sources = SourceOptions::new(SourceFormat::Dicom, dir.path());
    // A cache below the root is no source.
    let options = options(sources, &dir.path().join("cache"));
    let first = run(&options);
    let mut reasons: Vec<&str> = outcomes(&first).into_iter().map(|o| o.1).collect();
    reasons.sort_unstable();
    assert_eq!(reasons, ["kept", "too_few_slices", "undecodable"]);
    let again = run(&options);
    assert_eq!((again.reused, &again.outcomes), (3, &first.outcomes));
    let retried = run(&PrepareOptions { retry_refused: true, ..options });
    assert_eq!((retried.reused, &retried.outcomes), (0, &first.outcomes));
}

#[test]
fn a_cache_of_another_manifest_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    run(&phantoms(1, dir.path()));
    let mut other = phantoms(1, dir.path());
    other.spec.input_dhw = [8, 24, 20];
    let error = prepare(&other, &|_| {}).unwrap_err();
    assert!(error.to_string().contains("input [8, 24, 24] instead of [8, 24, 20]"), "{error}");
    assert_eq!(Cache::open(dir.path()).unwrap().cases().len(), 1);
}

/// Not a test of its own: what the tests below start, kill and starve.
#[test]
fn child_prepares() {
    let Some(dir) = std::env::var_os("DARNET_PREPARE_CHILD") else { return };
    match prepare(&phantoms(8, Path::new(&dir)), &|_| {}) {
        Ok(prepared) => println!("child kept {}", prepared.cache.cases().len()),
        Err(error) => {
            println!("child failed: {error}");
            assert!(matches!(error, TrainDataError::NoSpace { .. }));
        }
    }
}

fn child(dir: &Path, before: &str) -> Command {
    let mut command = Command::new("sh");
    let program = std::env::current_exe().unwrap();
    let script = format!("{before} exec \"$0\" --exact child_prepares --nocapture");
    command.arg("-c").arg(script).arg(program).env("DARNET_PREPARE_CHILD", dir).stdout(Stdio::piped());
    command
}

#[test]
fn a_run_killed_at_any_time_is_completed_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let scans = dir.path().join("scans");
    let records = || -> Vec<PathBuf> {
        if scans.is_dir() { files_below(&scans, |p| p.extension().is_some_and(|e| e == "scan")) } else { Vec::new() }
    };
    let mut kills = 0;
    for wanted in [1, 3, 5] {
        let mut running = child(dir.path(), "").spawn().unwrap();
        let started = Instant::now();
        while records().len() < wanted && running.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(120), "the child makes no progress");
            std::thread::sleep(Duration::from_millis(1));
        }
        kills += usize::from(running.kill().is_ok());
        running.wait().unwrap();
        let opened = Cache::open(dir.path());
        assert!(matches!(opened, Err(TrainDataError::Unfinished)) || records().len() == 8, "{opened:?}");
    }
    assert!(kills > 0);
    let clean = tempfile::tempdir().unwrap();
    let expected = run(&phantoms(8, clean.path()));
    let finished = run(&phantoms(8, dir.path()));
    assert!(finished.reused > 0, "what was whole is not done again");
    assert_eq!(finished.outcomes, expected.outcomes);
    finished.cache.verify().unwrap();
    for i in 0..8 {
        assert_eq!(finished.cache.volume(i), expected.cache.volume(i));
    }
}

#[test]
fn a_full_disk_is_an_error_that_says_so_and_spoils_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // A record has 4096 + 2 * 8 * 24 * 24 bytes and a mask: the limit of 8 blocks of 512 bytes lets none be written.
    let output = child(dir.path(), "trap '' XFSZ; ulimit -f 8;").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("child failed: write a cache record: no space left on the disk"), "{text}");
    assert!(matches!(Cache::open(dir.path()), Err(TrainDataError::Unfinished)));
    assert_eq!(run(&phantoms(2, dir.path())).cache.cases().len(), 2);
}

#[test]
fn a_cache_is_split_by_patient_and_an_unsound_csv_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cache = run(&phantoms(12, dir.path())).cache;
    let split = Split::stratified(cache.cases(), 0.25, 3, 1).unwrap();
    assert_eq!((split.test().len(), split.folds()), (3, 3));
    let path = dir.path().join("split.csv");
    split.write_csv(&path).unwrap();
    Split::read_csv(&path).unwrap().verify(cache.cases()).unwrap();
    let text = std::fs::read_to_string(&path).unwrap().replace(",2\n", ",1\n");
    std::fs::write(&path, text.replacen(",1\n", ",3\n", 1)).unwrap();
    let error = Split::read_csv(&path).unwrap().verify(cache.cases()).unwrap_err().to_string();
    assert!(error.contains("fold 2 has no scan"), "{error}");
    assert!(matches!(Split::stratified(cache.cases(), 0.25, 9, 1), Err(TrainDataError::Table { .. })));
}
