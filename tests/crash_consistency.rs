//! What an acknowledged slice survives: the end of the process at any moment, and a full disk.
//!
//! The test binary starts itself again as a writer (`DARNET_CRASH_DIR` set), which appends to a journal and publishes
//! slots and tells on stdout what it acknowledged after each sync; the parent kills it at seeded moments and opens what it left.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use darnet::volume::journal::{JournalError, JournalWriter, RecordHead, RecordKind};
use darnet::volume::store::{SlotMeta, VolumeError, VolumeFile};

const DIR_VARIABLE: &str = "DARNET_CRASH_DIR";
const ROWS: u32 = 64;
const COLUMNS: u32 = 96;
/// More than the parent waits for in all rounds together.
const MAX_SLOTS: u32 = 2000;

/// Counter-based bytes: the payload of record `k` is known to both sides.
fn payload(k: u64) -> Vec<u8> {
    let len = 2000 + (k.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48) as usize;
    (0..len as u64).map(|i| (i.wrapping_mul(k + 3) >> 3) as u8).collect()
}

fn pixel(k: u64, i: usize) -> i16 {
    (k as i16).wrapping_mul(31).wrapping_add(i as i16)
}

fn uid(k: u64) -> String {
    format!("2.25.{k}")
}

fn append(journal: &mut JournalWriter, k: u64) -> Result<u64, JournalError> {
    let uid = uid(k);
    let head = RecordHead {
        kind: RecordKind::Dataset,
        transfer_syntax_uid: "1.2.840.10008.1.2.1",
        sop_class_uid: "1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid: &uid,
        received_unix_ns: k,
    };
    let record = journal.append(&head, &payload(k))?;
    journal.sync()?;
    Ok(record.offset)
}

/// The child's part. Without the variable it is an empty test.
#[test]
fn writer_that_is_killed() {
    let Some(dir) = std::env::var_os(DIR_VARIABLE) else { return };
    let dir = Path::new(&dir);
    let (journal_path, volume_path) = (dir.join("journal"), dir.join("volume"));
    let (mut journal, records) = if journal_path.exists() {
        JournalWriter::open(&journal_path).expect("open the journal")
    } else {
        (JournalWriter::create(&journal_path).expect("create the journal"), Vec::new())
    };
    let volume = if volume_path.exists() {
        VolumeFile::open(&volume_path).expect("open the volume")
    } else {
        VolumeFile::create(&volume_path, ROWS, COLUMNS, MAX_SLOTS).expect("create the volume")
    };
    let mut out = std::io::stdout().lock();
    for k in records.len() as u64.. {
        match append(&mut journal, k) {
            Ok(journal_offset) => {
                writeln!(out, "ack {k}").and_then(|()| out.flush()).expect("tell");
                match volume.claim() {
                    Ok(mut slot) => {
                        slot.pixels_mut().iter_mut().enumerate().for_each(|(i, p)| *p = pixel(k, i));
                        slot.publish(&SlotMeta { position_mm: [0.0, 0.0, k as f64], journal_offset });
                    }
                    Err(VolumeError::Full { .. } | VolumeError::NoSpace { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            Err(error) => {
                assert!(error.is_no_space(), "{error}");
                writeln!(out, "full {k}").and_then(|()| out.flush()).expect("tell");
                return;
            }
        }
    }
}

fn child(dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command
        .args(["--exact", "writer_that_is_killed", "--nocapture", "--test-threads=1"])
        .env(DIR_VARIABLE, dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}

/// Opens what a writer left: records 0.. in order, at least `acknowledged` of them, every one whole.
fn check(dir: &Path, acknowledged: u64) -> u64 {
    let (journal, records) = JournalWriter::open(&dir.join("journal")).expect("open the journal");
    assert!(records.len() as u64 >= acknowledged, "{acknowledged} acknowledged, {} kept", records.len());
    assert!(journal.recovery().damage.is_empty());
    let reader = journal.reader().expect("reader");
    let mut bytes = Vec::new();
    for (k, (record, _)) in records.iter().enumerate() {
        let head = reader.read(*record, &mut bytes).expect("read");
        assert_eq!(head.sop_instance_uid, uid(k as u64));
        assert_eq!(bytes, payload(k as u64));
    }
    match VolumeFile::open(&dir.join("volume")) {
        Ok(volume) => {
            for index in 0..volume.max_slots() {
                if let (Some(slot), Some(meta)) = (volume.slot(index), volume.meta(index)) {
                    let k = meta.position_mm[2] as u64;
                    assert!(slot.iter().enumerate().all(|(i, &p)| p == pixel(k, i)), "slot {index}");
                    assert_eq!(meta.journal_offset, records[k as usize].0.offset);
                }
            }
        }
        // Killed while it was made.
        Err(VolumeError::Damaged { .. } | VolumeError::NotAVolume) => {
            std::fs::remove_file(dir.join("volume")).expect("remove");
        }
        Err(VolumeError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => panic!("{error}"),
    }
    records.len() as u64
}

#[test]
fn what_was_acknowledged_survives_kill_9_at_any_moment() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut acknowledged = 0;
    for round in 0u64..12 {
        let mut writer = child(dir.path()).spawn().expect("spawn");
        let lines = BufReader::new(writer.stdout.take().expect("stdout")).lines();
        let mut seen = 0;
        // A seeded number of acknowledgements, then a seeded pause of up to 3 ms, so that the kill meets any step.
        let wanted = round * 5 % 17;
        for line in lines {
            let line = line.expect("line");
            // The test harness writes the start of this line.
            let Some((_, k)) = line.split_once("ack ") else { continue };
            acknowledged = k.parse::<u64>().expect("number") + 1;
            seen += 1;
            if seen == wanted.max(1) {
                std::thread::sleep(Duration::from_micros(round * 7919 % 3000));
                writer.kill().expect("kill");
            }
        }
        writer.wait().expect("wait");
        let kept = check(dir.path(), acknowledged);
        assert!(kept >= acknowledged);
    }
    assert!(acknowledged > 12);
}

#[test]
fn a_full_disk_refuses_and_loses_nothing() {
    // A file system of 20 MiB of one's own, in a name space of one's own.
    let dir = tempfile::tempdir().expect("tempdir");
    let script = format!(
        "mount -t tmpfs -o size=20m tmpfs {0} && \"$@\" && cp --sparse=never {0}/journal {0}.journal && \
         cp {0}/volume {0}.volume && df -B1 --output=avail {0} | tail -1",
        dir.path().display()
    );
    let own = std::env::current_exe().expect("own path");
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-c", &script, "sh"])
        .arg(own)
        .args(["--exact", "writer_that_is_killed", "--nocapture", "--test-threads=1"])
        .env(DIR_VARIABLE, dir.path())
        .output()
        .expect("unshare must be there: apt-get install util-linux");
    let stderr = String::from_utf8_lossy(&output.stderr);
    if ["unshare: ", "permission denied", "not permitted"].iter().any(|m| stderr.contains(m)) {
        println!("not run: this machine allows no name spaces, so no small disk can be made");
        return;
    }
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    let full: u64 = stdout
        .lines()
        .find_map(|l| l.split_once("full "))
        .and_then(|(_, k)| k.parse().ok())
        .expect("the disk must fill");
    let journal = dir.path().with_extension("journal");
    let volume = dir.path().with_extension("volume");
    std::fs::rename(&journal, dir.path().join("journal")).expect("move");
    std::fs::rename(&volume, dir.path().join("volume")).expect("move");
    assert!(full > 100, "the second 16 MiB do not fit, single records still do: {full}");
    assert_eq!(check(dir.path(), full), full, "all that was acknowledged, and not the refused one");
}
