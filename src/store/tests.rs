//! The store's promises: what is committed is committed once, what leaves leaves at least once, one result is live.

use std::os::unix::fs::PermissionsExt as _;

use proptest::prelude::*;

use super::*;
use crate::telemetry::StudyHasher;

fn hash(uid: &str) -> StudyHash {
    StudyHasher::new([9; 32]).hash(uid)
}

fn outcome(study: &str, series: &str, revision: u32) -> NewOutcome {
    NewOutcome {
        study: hash(study),
        study_instance_uid: study.into(),
        series: hash(series),
        series_instance_uid: series.into(),
        revision,
        slices: 120,
        reason: None,
        document: serde_json::json!({ "schema": "darnet.result/1", "score": 0.1 }),
        live: true,
        alerted: false,
        created_at_ms: 1_000,
    }
}

fn open() -> (tempfile::TempDir, Store, StoreHandle) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("darnet.sqlite")).unwrap();
    let handle = store.handle().unwrap();
    (dir, store, handle)
}

#[test]
fn file_is_private_durable_and_versioned() {
    let (dir, store, handle) = open();
    for name in ["darnet.sqlite", "darnet.sqlite-wal", "darnet.sqlite-shm"] {
        let mode = std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name}");
    }
    let get =
        |p: &str| handle.connection.pragma_query_value(None, p, |r| r.get::<_, rusqlite::types::Value>(0)).unwrap();
    assert_eq!(get("journal_mode"), rusqlite::types::Value::Text("wal".into()));
    assert_eq!(get("synchronous"), rusqlite::types::Value::Integer(2));
    assert_eq!(get("foreign_keys"), rusqlite::types::Value::Integer(1));
    assert_eq!(get("user_version"), rusqlite::types::Value::Integer(SCHEMA_VERSION));
    assert_eq!(get("application_id"), rusqlite::types::Value::Integer(APPLICATION_ID));
    handle.ping().unwrap();
    assert!(handle.is_sound().unwrap());
    let reader = store.reader().unwrap();
    assert!(reader.connection.execute("DELETE FROM studies", []).is_err());
}

#[test]
fn foreign_files_and_later_versions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    std::fs::write(&text, "not a database, certainly not one of ours".repeat(100)).unwrap();
    assert!(matches!(Store::open(&text), Err(StoreError::NotAStore)), "{:?}", Store::open(&text));

    let other = dir.path().join("other");
    Connection::open(&other).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
    assert!(matches!(Store::open(&other), Err(StoreError::NotAStore)));

    let later = dir.path().join("later");
    drop(Store::open(&later).unwrap());
    Connection::open(&later).unwrap().pragma_update(None, "user_version", 99).unwrap();
    assert!(matches!(Store::open(&later), Err(StoreError::TooNew { found: 99 })));

    assert!(matches!(Store::open(&dir.path().join("no/such/folder")), Err(StoreError::Create(_))));
}

#[test]
fn committing_again_returns_the_first_uids_and_never_doubles() {
    let (_dir, store, mut handle) = open();
    let first = handle.commit_outcome(&outcome("1.1", "1.2", 1), &[OutboxDraft::document("webhook")]).unwrap();
    assert!(first.fresh && first.ids.live);
    assert!(first.ids.result_uid.starts_with("2.25.") && first.ids.result_uid.len() <= 64);
    let mut other = store.handle().unwrap();
    for _ in 0..3 {
        let again = other.commit_outcome(&outcome("1.1", "1.2", 1), &[OutboxDraft::document("webhook")]).unwrap();
        assert_eq!(again, CommittedOutcome { fresh: false, ..first.clone() });
    }
    assert_eq!(handle.outbox_counts().unwrap(), OutboxCounts { pending: 1, ..Default::default() });
    assert_eq!(handle.results(&ListResults::default()).unwrap().len(), 1);

    let stored = handle.latest_result(&hash("1.2")).unwrap().unwrap();
    let document: serde_json::Value = serde_json::from_str(&stored.document).unwrap();
    assert_eq!(document["result_uid"], first.ids.result_uid.as_str());
    assert_eq!(document["revision"], 1);
    assert_eq!(document["live"], true);
    assert!(document["supersedes"].is_null());
    let item = &handle.lease_due(2_000, 10).unwrap()[0];
    assert_eq!(item.payload, stored.document.as_bytes());
    assert_eq!(handle.outbox_payload(item.id).unwrap().unwrap(), item.payload);
}

#[test]
fn revisions_form_a_chain_without_holes() {
    let (_dir, _store, mut handle) = open();
    let a = handle.commit_outcome(&NewOutcome { alerted: true, ..outcome("1.1", "1.2", 1) }, &[]).unwrap();
    assert!(matches!(handle.commit_outcome(&outcome("1.1", "1.2", 3), &[]), Err(StoreError::Invalid { .. })));
    assert!(matches!(handle.commit_outcome(&outcome("1.1", "1.2", 0), &[]), Err(StoreError::Invalid { .. })));
    // Not asked to be live, but the one it supersedes is.
    let b = handle.commit_outcome(&NewOutcome { live: false, ..outcome("1.1", "1.2", 2) }, &[]).unwrap();
    assert_eq!(b.ids.supersedes.as_ref(), Some(&a.ids.result_uid));
    assert!(b.ids.live && b.ids.supersedes_alert);
    assert_eq!(handle.commit_outcome(&outcome("1.1", "1.2", 2), &[]).unwrap().ids, b.ids);
    assert!(!handle.result(&a.ids.result_uid).unwrap().unwrap().live);
    assert_eq!(handle.live_result(&hash("1.1")).unwrap().unwrap().result_uid, b.ids.result_uid);
    assert!(matches!(handle.set_live(&a.ids.result_uid, 5), Err(StoreError::Invalid { .. })), "a is superseded");
    assert!(matches!(handle.set_live("2.25.1", 5), Err(StoreError::NotFound { .. })));
}

#[test]
fn a_study_has_one_live_result_which_can_be_switched() {
    let (_dir, _store, mut handle) = open();
    let thick = handle.commit_outcome(&outcome("1.1", "1.2", 1), &[]).unwrap();
    let scout =
        handle.commit_outcome(&NewOutcome { live: false, reason: Some("localizer"), ..outcome("1.1", "1.3", 1) }, &[]);
    assert!(!scout.unwrap().ids.live);
    let thin = handle.commit_outcome(&outcome("1.1", "1.4", 1), &[]).unwrap();
    let live = |h: &StoreHandle| h.live_result(&hash("1.1")).unwrap().unwrap().result_uid;
    assert_eq!(live(&handle), thin.ids.result_uid);
    handle.set_live(&thick.ids.result_uid, 9_000).unwrap();
    assert_eq!(live(&handle), thick.ids.result_uid);
    let studies = handle.studies(10).unwrap();
    assert_eq!((studies.len(), studies[0].series, studies[0].updated_ms), (1, 3, 9_000));
    assert_eq!(studies[0].live.as_ref().unwrap().result_uid, thick.ids.result_uid);
    assert_eq!(handle.results(&ListResults { only_live: true, ..Default::default() }).unwrap().len(), 1);
    let of = |study: &str| ListResults { study: Some(hash(study)), ..Default::default() };
    assert_eq!(handle.results(&of("1.1")).unwrap().len(), 3);
    assert_eq!(handle.results(&of("1.9")).unwrap().len(), 0);
}

/// Commits a result of rank `rank` that alerts while it is live and `rank` is odd; the highest rank shall be live.
/// Everything is sent to `w`.
fn commit_ranked(handle: &mut StoreHandle, study: &str, series: &str, revision: u32, rank: u64) -> CommittedOutcome {
    let body = |uid: &str, rank: u64, live: bool, edition: u32| DecidedBody {
        alerted: live && rank % 2 == 1,
        body: OutcomeBody {
            document: serde_json::json!({ "uid": uid, "rank": rank, "live": live, "edition": edition }).to_string(),
            outbox: vec![OutboxDraft::document("w")],
        },
    };
    let rank_of =
        |r: &ResultRecord| serde_json::from_str::<serde_json::Value>(&r.document).unwrap()["rank"].as_u64().unwrap();
    let mine = (rank, std::cmp::Reverse(hash(series).as_str().to_owned()));
    handle
        .commit_outcome_ranked(
            &NewOutcome { live: false, ..outcome(study, series, revision) },
            |others| {
                assert!(others.windows(2).all(|w| w[0].series < w[1].series), "one latest result a series, in order");
                let place = |r: &ResultRecord| (rank_of(r), std::cmp::Reverse(r.series.clone()));
                (0..others.len()).filter(|i| place(&others[*i]) > mine).max_by_key(|i| place(&others[*i]))
            },
            |ids| Ok(body(&ids.result_uid, rank, ids.live, 1)),
            |r| Ok(Some(body(&r.result_uid, rank_of(r), r.live, r.edition))),
        )
        .unwrap()
}

/// Every item, oldest first: (edition, live, rank) of its document.
fn told(handle: &StoreHandle) -> Vec<(u64, bool, u64)> {
    let mut entries = handle.outbox_entries("pending", 100).unwrap();
    entries.reverse();
    entries
        .iter()
        .map(|e| {
            let payload = handle.outbox_payload(e.id).unwrap().unwrap();
            let document: serde_json::Value = serde_json::from_slice(&payload).unwrap();
            assert_eq!(document["edition"], e.edition);
            assert_eq!(document["uid"], e.result_uid.as_str());
            (u64::from(e.edition), document["live"].as_bool().unwrap(), document["rank"].as_u64().unwrap())
        })
        .collect()
}

#[test]
fn a_result_that_wins_later_speaks_then() {
    let (_dir, _store, mut handle) = open();
    let a = commit_ranked(&mut handle, "1.1", "1.2", 1, 9);
    let b = commit_ranked(&mut handle, "1.1", "1.3", 1, 7);
    assert!(a.ids.live && !b.ids.live && b.restated.is_empty());
    // The live series becomes worse than the other.
    let a2 = commit_ranked(&mut handle, "1.1", "1.2", 2, 0);
    assert!(!a2.ids.live && a2.ids.supersedes_alert);
    assert_eq!(a2.restated.len(), 1);
    let record = &a2.restated[0].record;
    assert_eq!(
        (record.result_uid.as_str(), record.live, record.alerted, record.edition),
        (b.ids.result_uid.as_str(), true, true, 2)
    );
    assert!(!a2.restated[0].was_alerted);
    assert_eq!(handle.live_result(&hash("1.1")).unwrap().as_ref(), Some(record));
    assert_eq!(told(&handle), [(1, true, 9), (1, false, 7), (1, false, 0), (2, true, 7)]);
    assert!(!handle.result(&a.ids.result_uid).unwrap().unwrap().live, "the superseded one");

    // Repeated after a crash: nothing changes.
    for (series, revision) in [("1.2", 2), ("1.2", 1), ("1.3", 1)] {
        let again = commit_ranked(&mut handle, "1.1", series, revision, 99);
        assert!(!again.fresh && again.restated.is_empty());
    }
    assert_eq!(told(&handle).len(), 4);
    assert_eq!(handle.live_result(&hash("1.1")).unwrap().as_ref(), Some(record));
    let audited = handle.audit_tail(10).unwrap();
    assert_eq!(audited.iter().filter(|a| a.event == "live").count(), 1);
}

#[test]
fn a_result_that_loses_takes_its_alert_back() {
    let (_dir, _store, mut handle) = open();
    let a = commit_ranked(&mut handle, "1.1", "1.2", 1, 7);
    let b = commit_ranked(&mut handle, "1.1", "1.3", 1, 8);
    assert!(b.ids.live);
    let record = handle.result(&a.ids.result_uid).unwrap().unwrap();
    assert_eq!((record.live, record.alerted, record.edition), (false, false, 2));
    assert_eq!(b.restated, [Restated { record, was_alerted: true }]);
    assert_eq!(told(&handle), [(1, true, 7), (1, true, 8), (2, false, 7)]);
    // It wins again with the same words, as edition 3.
    let b2 = commit_ranked(&mut handle, "1.1", "1.3", 2, 1);
    assert_eq!((b2.ids.live, b2.restated[0].record.edition), (false, 3));
    assert_eq!(told(&handle)[3..], [(1, false, 1), (3, true, 7)]);
}

#[test]
fn what_cannot_be_restated_still_changes_places() {
    let (_dir, _store, mut handle) = open();
    let a = commit_ranked(&mut handle, "1.1", "1.2", 1, 7);
    let before = handle.result(&a.ids.result_uid).unwrap().unwrap();
    let body = || Ok(DecidedBody { alerted: false, body: OutcomeBody { document: "{}".into(), outbox: Vec::new() } });
    let refused = handle.commit_outcome_ranked(&outcome("1.1", "1.3", 1), |_| Some(1), |_| body(), |_| Ok(None));
    assert!(matches!(refused, Err(StoreError::Invalid { .. })));
    let failed = handle.commit_outcome_ranked(
        &outcome("1.1", "1.3", 1),
        |_| None,
        |_| body(),
        |_| Err(StoreError::Invalid { operation: "test", fault: "test" }),
    );
    assert!(failed.is_err());
    assert_eq!(handle.result(&a.ids.result_uid).unwrap().as_ref(), Some(&before), "all or nothing");
    assert!(handle.latest_result(&hash("1.3")).unwrap().is_none());
    handle.commit_outcome_ranked(&outcome("1.1", "1.3", 1), |_| None, |_| body(), |_| Ok(None)).unwrap();
    let after = handle.result(&a.ids.result_uid).unwrap().unwrap();
    assert_eq!(after, ResultRecord { live: false, edition: 2, ..before });
}

#[test]
fn a_file_of_version_1_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("old.sqlite");
    let old = Connection::open(&path).unwrap();
    old.execute_batch(schema::MIGRATIONS[0]).unwrap();
    old.pragma_update(None, "application_id", APPLICATION_ID).unwrap();
    old.pragma_update(None, "user_version", 1).unwrap();
    let (study, series) = (hash("1.1"), hash("1.2"));
    old.execute_batch(&format!(
        "INSERT INTO studies VALUES ('{study}', '1.1', 1, 1);
         INSERT INTO series VALUES ('{series}', '{study}', '1.2', 'published', 9, 1, 1);
         INSERT INTO results VALUES ('2.25.7', '{study}', '{series}', 1, 9, 'result', NULL, '{{}}', NULL, 1, 1, 1);
         INSERT INTO outbox (id, result_uid, sink, payload, state, attempts, next_attempt_ms, created_at_ms, delivered_at_ms)
             VALUES (41, '2.25.7', 'gone', x'', 'delivered', 1, 5, 1, 6), (40, '2.25.7', 'w', x'7b7d', 'pending', 3, 5, 1, NULL);
         DELETE FROM outbox WHERE id = 41;"
    ))
    .unwrap();
    drop(old);
    let store = Store::open(&path).unwrap();
    drop(Store::open(&path).unwrap());
    let mut handle = store.handle().unwrap();
    assert!(handle.is_sound().unwrap());
    assert_eq!(handle.latest_result(&series).unwrap().unwrap().edition, 1);
    let item = handle.lease_due(5, 9).unwrap().remove(0);
    assert_eq!((item.id, item.edition, item.attempt, item.payload.as_slice()), (40, 1, 4, &b"{}"[..]));
    handle.commit_outcome(&outcome("1.1", "1.2", 2), &[OutboxDraft::document("w")]).unwrap();
    assert_eq!(handle.outbox_entries("pending", 9).unwrap()[0].id, 42, "numbers are not given twice");
}

#[test]
fn a_failed_build_leaves_nothing_behind() {
    let (_dir, _store, mut handle) = open();
    let failed = handle.commit_outcome_with(&outcome("1.1", "1.2", 1), |_| {
        Err(StoreError::Invalid { operation: "test", fault: "test" })
    });
    assert!(failed.is_err());
    for bad in [
        NewOutcome { document: serde_json::json!([1]), ..outcome("1.1", "1.2", 1) },
        NewOutcome { study_instance_uid: "Doe^Jane".into(), ..outcome("1.1", "1.2", 1) },
        NewOutcome { series_instance_uid: String::new(), ..outcome("1.1", "1.2", 1) },
        NewOutcome { slices: u64::MAX, ..outcome("1.1", "1.2", 1) },
    ] {
        assert!(matches!(handle.commit_outcome(&bad, &[]), Err(StoreError::Invalid { .. })));
    }
    let twice = [OutboxDraft::document("webhook"), OutboxDraft::document("webhook")];
    assert!(handle.commit_outcome(&outcome("1.1", "1.2", 1), &twice).is_err());
    let nameless = [OutboxDraft::bytes("", vec![1])];
    assert!(handle.commit_outcome(&outcome("1.1", "1.2", 1), &nameless).is_err());
    assert_eq!(handle.studies(10).unwrap(), []);
    assert_eq!(handle.audit_tail(10).unwrap(), []);
    assert!(handle.commit_outcome(&outcome("1.1", "1.2", 1), &[]).unwrap().fresh);
    // A series cannot move to another study.
    assert!(matches!(handle.commit_outcome(&outcome("1.9", "1.2", 2), &[]), Err(StoreError::Invalid { .. })));
}

#[test]
fn series_can_be_noted_before_their_outcome() {
    let (_dir, _store, mut handle) = open();
    let (study, series) = (hash("1.1"), hash("1.2"));
    handle.upsert_series((&study, "1.1"), (&series, "1.2"), SeriesState::Open, 1, 10).unwrap();
    handle.upsert_series((&study, "1.1"), (&series, "1.2"), SeriesState::Complete, 90, 20).unwrap();
    assert!(handle.latest_result(&series).unwrap().is_none());
    handle.commit_outcome(&outcome("1.1", "1.2", 1), &[]).unwrap();
    let studies = handle.studies(10).unwrap();
    assert_eq!((studies[0].first_seen_ms, studies[0].updated_ms), (10, 1_000));
}

#[test]
fn leases_end_once_and_run_out() {
    let (_dir, _store, mut handle) = open();
    handle.commit_outcome(&outcome("1.1", "1.2", 1), &[OutboxDraft::bytes("a", vec![1, 2])]).unwrap();
    assert!(handle.lease_due(999, 10).unwrap().is_empty(), "not due yet");
    assert!(handle.lease_due_for("b", 1_000, 10).unwrap().is_empty(), "another sink");
    let first = handle.lease_due_for("a", 1_000, 10).unwrap().remove(0);
    assert_eq!((first.attempt, first.attempt_since_resend, first.payload.as_slice()), (1, 1, &[1u8, 2][..]));
    assert!(handle.lease_due(1_000, 10).unwrap().is_empty(), "leased");
    assert_eq!(handle.next_due_for("a").unwrap(), Some(1_000 + LEASE_MS));

    let second = handle.lease_due(1_000 + LEASE_MS, 10).unwrap().remove(0);
    assert_eq!(second.attempt, 2);
    assert!(!handle.mark_delivered(&first, 5).unwrap(), "the first lease ran out");
    assert!(!handle.mark_dead(&first, 5, "x").unwrap());
    assert!(handle.mark_failed(&second, 7_000_000, "line\nbreak").unwrap());
    assert!(!handle.mark_failed(&second, 1, "again").unwrap(), "a lease ends once");
    assert_eq!(handle.next_due_for("a").unwrap(), Some(7_000_000));
    assert_eq!(handle.outbox_entries("pending", 9).unwrap()[0].last_error.as_deref(), Some("line break"));

    let third = handle.lease_due(7_000_000, 10).unwrap().remove(0);
    assert!(handle.mark_dead(&third, 7_000_000, "gone").unwrap());
    assert_eq!(handle.outbox_counts().unwrap(), OutboxCounts { dead: 1, ..Default::default() });
    assert_eq!(handle.resend_dead(Some(third.id + 1), 8_000_000).unwrap(), 0);
    assert_eq!(handle.resend_dead(None, 8_000_000).unwrap(), 1);
    let fourth = handle.lease_due(8_000_000, 10).unwrap().remove(0);
    assert_eq!((fourth.attempt, fourth.attempt_since_resend), (4, 1));
    assert_eq!(handle.recover_leases(8_000_001).unwrap(), 1);
    assert!(!handle.mark_delivered(&fourth, 8_000_001).unwrap());
    let fifth = handle.lease_due(8_000_001, 10).unwrap().remove(0);
    assert!(handle.mark_delivered(&fifth, 8_000_002).unwrap());
    assert_eq!(handle.outbox_entries("delivered", 9).unwrap()[0].delivered_at_ms, Some(8_000_002));
    assert_eq!(handle.next_due_for("a").unwrap(), None);
}

#[test]
fn items_of_unknown_sinks_are_shown_as_dead() {
    let (_dir, _store, mut handle) = open();
    let drafts = [OutboxDraft::document("old"), OutboxDraft::document("new")];
    handle.commit_outcome(&outcome("1.1", "1.2", 1), &drafts).unwrap();
    assert_eq!(handle.bury_unknown_sinks(&["new"], 5).unwrap(), 1);
    assert_eq!(handle.bury_unknown_sinks(&["new"], 5).unwrap(), 0);
    assert_eq!(handle.outbox_entries("dead", 9).unwrap()[0].sink, "old");
    assert_eq!(handle.outbox_counts().unwrap(), OutboxCounts { pending: 1, dead: 1, ..Default::default() });
}

#[test]
fn retention_deletes_old_studies_but_nothing_undelivered() {
    let (_dir, _store, mut handle) = open();
    handle.commit_outcome(&outcome("1.1", "1.2", 1), &[OutboxDraft::document("w")]).unwrap();
    handle.commit_outcome(&outcome("1.1", "1.2", 2), &[]).unwrap();
    handle.commit_outcome(&outcome("2.1", "2.2", 1), &[]).unwrap();
    handle.commit_outcome(&NewOutcome { created_at_ms: 9_000, ..outcome("3.1", "3.2", 1) }, &[]).unwrap();

    let report = handle.delete_older_than(5_000, 10_000).unwrap();
    assert_eq!((report.studies, report.results, report.kept_for_outbox), (1, 1, 1));
    assert_eq!(report.series, [hash("2.2")]);
    let item = handle.lease_due(10_000, 1).unwrap().remove(0);
    handle.mark_delivered(&item, 10_000).unwrap();
    let report = handle.delete_older_than(5_000, 10_000).unwrap();
    assert_eq!((report.studies, report.results, report.kept_for_outbox), (1, 2, 0));
    assert_eq!(handle.studies(10).unwrap().len(), 1);
    assert_eq!(handle.outbox_counts().unwrap(), OutboxCounts::default());
    assert!(handle.is_sound().unwrap());
    assert!(handle.audit_tail(100).unwrap().iter().any(|a| a.event == "outcome"), "the audit trail stays");
    assert_eq!(handle.delete_older_than(5_000, 10_000).unwrap(), RetentionReport::default());
}

#[test]
fn audit_trail_is_append_only() {
    let (_dir, _store, mut handle) = open();
    handle.audit(1, "login", Some(&hash("1.1")), None, "{}").unwrap();
    assert!(handle.connection.execute("DELETE FROM audit", []).is_err());
    assert!(handle.connection.execute("UPDATE audit SET event = 'x'", []).is_err());
    let tail = handle.audit_tail(5).unwrap();
    assert_eq!(
        (tail.len(), tail[0].event.as_str(), tail[0].study.as_deref()),
        (1, "login", Some(hash("1.1").as_str()))
    );
}

#[test]
fn errors_repeat_no_values() {
    let (_dir, _store, mut handle) = open();
    let bad = NewOutcome { study_instance_uid: "1.2.Doe^Jane".into(), ..outcome("1.1", "1.2", 1) };
    let text = format!("{0} {0:?}", handle.commit_outcome(&bad, &[]).unwrap_err());
    assert!(!text.contains("Doe"), "{text}");
    handle.commit_outcome(&outcome("1.1", "1.2", 1), &[OutboxDraft::bytes("s", b"Doe^Jane".to_vec())]).unwrap();
    let item = handle.lease_due(9_000, 1).unwrap().remove(0);
    assert!(!format!("{item:?}").contains(&item.result_uid));
}

#[test]
fn threads_commit_at_once_without_a_lost_or_doubled_outcome() {
    let (_dir, store, handle) = open();
    std::thread::scope(|s| {
        for t in 0..4 {
            let store = store.clone();
            s.spawn(move || {
                let mut handle = store.handle().unwrap();
                for i in 0..10 {
                    // Two threads commit the same outcomes.
                    let uid = format!("1.{}.{i}", t / 2);
                    handle
                        .commit_outcome(&outcome(&uid, &format!("{uid}.1"), 1), &[OutboxDraft::document("w")])
                        .unwrap();
                }
            });
        }
    });
    assert_eq!(handle.outbox_counts().unwrap().pending, 20);
    assert_eq!(handle.results(&ListResults::default()).unwrap().len(), 20);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever the order of commits, also of revisions against one another: the best latest result is live, every
    /// result's document and alert say what the table says, and a receiver that keeps the highest edition knows it.
    #[test]
    fn the_live_result_follows_from_the_latest_results(
        ranks in prop::collection::vec(prop::collection::vec(0u64..6, 1..4), 1..5),
        seed: u64,
    ) {
        let (_dir, _store, mut handle) = open();
        let mut next = vec![0usize; ranks.len()];
        let mut x = seed | 1;
        loop {
            let left: Vec<usize> = (0..ranks.len()).filter(|s| next[*s] < ranks[*s].len()).collect();
            if left.is_empty() {
                break;
            }
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let s = left[(x >> 33) as usize % left.len()];
            next[s] += 1;
            commit_ranked(&mut handle, "1.1", &format!("1.1.{s}"), next[s] as u32, ranks[s][next[s] - 1]);
        }
        let best = (0..ranks.len())
            .max_by_key(|s| (ranks[*s].last().copied(), std::cmp::Reverse(hash(&format!("1.1.{s}")).as_str().to_owned())))
            .unwrap();
        let live = handle.live_result(&hash("1.1")).unwrap().unwrap();
        let expected = hash(&format!("1.1.{best}"));
        prop_assert_eq!(live.series.as_str(), expected.as_str());
        prop_assert_eq!(live.revision as usize, ranks[best].len());
        let mut known = std::collections::HashMap::new();
        let entries = handle.outbox_entries("pending", 100).unwrap().into_iter().rev();
        for ((edition, live, _), entry) in told(&handle).into_iter().zip(entries) {
            let newest = known.entry(entry.result_uid).or_insert((0, false));
            prop_assert!(newest.0 < edition, "each edition leaves once");
            *newest = (edition, live);
        }
        for record in handle.results(&ListResults::default()).unwrap() {
            let document: serde_json::Value = serde_json::from_str(&record.document).unwrap();
            let superseded = handle.latest_result(&StudyHash::parse(&record.series).unwrap()).unwrap().unwrap() != record;
            prop_assert_eq!(document["edition"].as_u64().unwrap(), u64::from(record.edition));
            if !superseded {
                prop_assert_eq!(document["live"].as_bool().unwrap(), record.live);
                prop_assert_eq!(known[&record.result_uid].1, record.live);
                prop_assert_eq!(record.alerted, record.live && document["rank"].as_u64().unwrap() % 2 == 1);
            }
        }
    }

    /// Whatever the order of commits over studies and series: one live result a study, never a superseded one.
    #[test]
    fn live_results_are_unique_and_not_superseded(steps in prop::collection::vec((0u8..3, 0u8..3, any::<bool>()), 1..25)) {
        let (_dir, _store, mut handle) = open();
        let mut revisions = std::collections::HashMap::new();
        for (study, series, live) in steps {
            let (study, series) = (format!("1.{study}"), format!("1.{study}.{series}"));
            let revision = revisions.entry(series.clone()).and_modify(|r| *r += 1).or_insert(1u32);
            handle.commit_outcome(&NewOutcome { live, ..outcome(&study, &series, *revision) }, &[]).unwrap();
        }
        let all = handle.results(&ListResults::default()).unwrap();
        prop_assert_eq!(all.len() as u32, revisions.values().sum::<u32>());
        for study in handle.studies(10).unwrap() {
            let live: Vec<_> = all.iter().filter(|r| r.study == study.study && r.live).collect();
            prop_assert!(live.len() <= 1);
            for result in live {
                prop_assert!(all.iter().all(|r| r.supersedes.as_deref() != Some(&result.result_uid)));
            }
        }
    }
}
