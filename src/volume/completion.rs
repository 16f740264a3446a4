//! When a series is complete. Pure: the caller gives the time, in nanoseconds since any fixed start.
//!
//! Input: slices, releases, declared counts, each with its time. Output: [`Progress`], and when to ask again.
//!
//! A series is complete when
//! - the sender declared how many slices it has and that many are in ([`Cause::Declared`]); a slice beyond a declared
//!   count voids the count, since it was wrong;
//! - every association that brought one of its slices is released or gone, and nothing came for the grace time
//!   ([`Cause::Released`]);
//! - nothing came for the idle bound, whatever the associations do ([`Cause::Idle`]);
//! - the operator or the shut-down says so ([`Cause::Flushed`]).
//!
//! Without a further event the answer never goes back from complete to open and never changes its cause. A further
//! slice re-opens the series: it waits for its rules anew, and its result supersedes the earlier one. Counts seen in
//! headers are hints: they feed [`Completion::looks_complete`], which starts work, and never publish.
//!
//! Deliberately absent: what a slice is. The caller reports a slice once, however often it was sent.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// After this long without a slice a series looks complete. Scanners send 13 to 36 slices a second (77 to 28 ms
/// apart), so this is six of the slowest.
pub const LULL_MS: u64 = 500;

const NS_PER_MS: u64 = 1_000_000;

/// How long to wait for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompletionRules {
    /// Time without a slice after the last association is released, milliseconds.
    pub grace_ms: u64,
    /// Time without a slice in any case, milliseconds.
    pub idle_ms: u64,
}

impl Default for CompletionRules {
    fn default() -> Self {
        Self { grace_ms: 2_000, idle_ms: 20_000 }
    }
}

/// Longest time any rule may wait: an hour. A result later than that helps nobody.
pub const MAX_WAIT_MS: u64 = 3_600_000;

impl CompletionRules {
    /// Every rule out of its range, as a fragment for people; empty when all are sound.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.idle_ms == 0 || self.idle_ms > MAX_WAIT_MS {
            faults.push(format!("idle_ms: expected 1 to {MAX_WAIT_MS}, got {}", self.idle_ms));
        }
        if self.grace_ms > self.idle_ms {
            faults.push(format!("grace_ms: expected at most idle_ms ({}), got {}", self.idle_ms, self.grace_ms));
        }
        faults
    }
}

/// Why a series is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The count the sender declared is reached.
    Declared,
    /// Every association is released and the grace time is over.
    Released,
    /// Nothing came for the idle bound.
    Idle,
    /// An explicit order.
    Flushed,
}

impl Cause {
    /// The text form, as in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::Declared => "declared",
            Cause::Released => "released",
            Cause::Idle => "idle",
            Cause::Flushed => "flushed",
        }
    }
}

/// Whether to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More may come.
    Open,
    /// The series is complete until a further slice comes.
    Complete(Cause),
}

/// The state of one series.
///
/// Bounded: it holds the ids of open associations that brought a slice, at most as many as may be open at once.
#[derive(Clone, Debug)]
pub struct Completion {
    rules: CompletionRules,
    open: BTreeSet<u64>,
    slices: u64,
    declared: Option<u64>,
    flushed: bool,
    /// The latest time seen; earlier ones are taken as this, so that a clock read late cannot go back.
    now_ns: u64,
    last_slice_ns: u64,
    last_release_ns: u64,
}

impl Completion {
    /// A series without slices.
    pub fn new(rules: CompletionRules, now_ns: u64) -> Self {
        Self {
            rules,
            open: BTreeSet::new(),
            slices: 0,
            declared: None,
            flushed: false,
            now_ns,
            last_slice_ns: now_ns,
            last_release_ns: now_ns,
        }
    }

    fn advance(&mut self, now_ns: u64) -> u64 {
        self.now_ns = self.now_ns.max(now_ns);
        self.now_ns
    }

    /// A slice not seen before came over `association`. Re-opens a complete series.
    pub fn slice(&mut self, association: u64, now_ns: u64) {
        self.last_slice_ns = self.advance(now_ns);
        self.slices = self.slices.saturating_add(1);
        self.open.insert(association);
        self.flushed = false;
        if self.declared.is_some_and(|count| self.slices > count) {
            self.declared = None;
        }
    }

    /// A slice that is there already came again over `association`: the sender is still at work, so what waits for
    /// it waits on. Does not count.
    pub fn touch(&mut self, association: u64, now_ns: u64) {
        self.last_slice_ns = self.advance(now_ns);
        self.open.insert(association);
    }

    /// `association` was released, aborted or lost. Of no effect when it brought no slice of this series.
    pub fn released(&mut self, association: u64, now_ns: u64) {
        let now_ns = self.advance(now_ns);
        if self.open.remove(&association) {
            self.last_release_ns = now_ns;
        }
    }

    /// The sender stated that the series has `count` slices. A count of zero, or one already passed, is ignored.
    pub fn declare(&mut self, count: u64, now_ns: u64) {
        self.advance(now_ns);
        if count > 0 && count >= self.slices {
            self.declared = Some(count);
        }
    }

    /// The series is complete by order, until a further slice comes.
    pub fn flush(&mut self) {
        self.flushed = true;
    }

    /// What holds at `now_ns` if nothing has come since the last event.
    pub fn progress(&self, now_ns: u64) -> Progress {
        match self.due() {
            Some((at_ns, cause)) if at_ns <= self.now_ns.max(now_ns) => Progress::Complete(cause),
            _ => Progress::Open,
        }
    }

    /// When the series becomes complete if nothing comes: the time to ask again. Not after the last event when it is
    /// complete already; `None` while there is no slice.
    pub fn deadline_ns(&self) -> Option<u64> {
        self.due().map(|(at_ns, _)| at_ns)
    }

    /// Distinct slices so far.
    pub fn slices(&self) -> u64 {
        self.slices
    }

    /// Whether starting to compute is worth while: complete, or the hint is reached, or all associations are released,
    /// or nothing came for [`LULL_MS`]. Never a reason to publish.
    pub fn looks_complete(&self, hint: Option<u64>, now_ns: u64) -> bool {
        self.looks_complete_at_ns(hint).is_some_and(|at_ns| at_ns <= self.now_ns.max(now_ns))
    }

    /// When [`looks_complete`](Self::looks_complete) becomes true if nothing comes; `None` while there is no slice.
    pub fn looks_complete_at_ns(&self, hint: Option<u64>) -> Option<u64> {
        let due = self.deadline_ns();
        if self.slices == 0 {
            return due;
        }
        let reached = hint.is_some_and(|h| h > 0 && self.slices >= h);
        let at_ns = if reached {
            self.last_slice_ns
        } else if self.open.is_empty() {
            self.last_slice_ns.max(self.last_release_ns)
        } else {
            self.last_slice_ns.saturating_add(LULL_MS * NS_PER_MS)
        };
        Some(due.map_or(at_ns, |d| d.min(at_ns)))
    }

    /// When and why the series becomes, or became, complete.
    fn due(&self) -> Option<(u64, Cause)> {
        if self.flushed {
            return Some((0, Cause::Flushed));
        }
        if self.slices == 0 {
            return None;
        }
        if self.declared.is_some_and(|count| self.slices >= count) {
            return Some((self.last_slice_ns, Cause::Declared));
        }
        let after = |from_ns: u64, ms: u64| from_ns.saturating_add(ms.saturating_mul(NS_PER_MS));
        let idle = (after(self.last_slice_ns, self.rules.idle_ms), Cause::Idle);
        if !self.open.is_empty() {
            return Some(idle);
        }
        let quiet_since = self.last_slice_ns.max(self.last_release_ns);
        let released = (after(quiet_since, self.rules.grace_ms), Cause::Released);
        // The earlier one is the cause, so that the cause does not change as time passes.
        Some(if idle.0 < released.0 { idle } else { released })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = NS_PER_MS;

    fn new() -> Completion {
        Completion::new(CompletionRules::default(), 0)
    }

    #[test]
    fn released_and_quiet_for_the_grace_time_is_complete() {
        let mut c = new();
        assert_eq!((c.progress(u64::MAX), c.deadline_ns()), (Progress::Open, None));
        c.slice(1, 100 * MS);
        c.slice(1, 200 * MS);
        assert_eq!(c.deadline_ns(), Some(20_200 * MS));
        c.released(1, 300 * MS);
        assert_eq!(c.deadline_ns(), Some(2_300 * MS));
        assert_eq!(c.progress(2_300 * MS - 1), Progress::Open);
        assert_eq!(c.progress(2_300 * MS), Progress::Complete(Cause::Released));
        assert_eq!(c.progress(100_000 * MS), Progress::Complete(Cause::Released), "the cause stays");
    }

    #[test]
    fn a_new_slice_in_the_grace_time_starts_it_anew() {
        let mut c = new();
        c.slice(1, 0);
        c.released(1, 0);
        c.slice(2, 1_900 * MS);
        assert_eq!(c.progress(2_500 * MS), Progress::Open);
        c.released(2, 2_000 * MS);
        assert_eq!(c.progress(3_999 * MS), Progress::Open);
        assert_eq!(c.progress(4_000 * MS), Progress::Complete(Cause::Released));
    }

    #[test]
    fn interleaved_associations_must_all_be_released() {
        let mut c = new();
        for k in 0..40 {
            c.slice(k % 4, k * 10 * MS);
        }
        for a in 0..3 {
            c.released(a, 400 * MS);
        }
        assert_eq!(c.progress(10_000 * MS), Progress::Open);
        c.released(99, 500 * MS);
        assert_eq!(c.progress(10_000 * MS), Progress::Open, "another series' association");
        c.released(3, 600 * MS);
        c.released(3, 900 * MS);
        assert_eq!(c.deadline_ns(), Some(2_600 * MS), "a second release changes nothing");
    }

    #[test]
    fn an_association_that_never_ends_is_bounded_by_idle() {
        let mut c = new();
        c.slice(1, 5 * MS);
        assert_eq!(c.progress(20_004 * MS), Progress::Open);
        assert_eq!(c.progress(20_005 * MS), Progress::Complete(Cause::Idle));
        c.released(1, 30_000 * MS);
        assert_eq!(c.progress(30_000 * MS), Progress::Complete(Cause::Idle), "a late release does not re-open");
    }

    #[test]
    fn a_declared_count_completes_at_once_on_its_last_slice() {
        let mut c = new();
        c.declare(3, 0);
        c.slice(1, MS);
        c.slice(1, 2 * MS);
        assert_eq!(c.progress(3 * MS), Progress::Open);
        c.slice(1, 4 * MS);
        assert_eq!(c.progress(4 * MS), Progress::Complete(Cause::Declared));
        assert_eq!(c.deadline_ns(), Some(4 * MS));

        let mut c = new();
        c.slice(1, MS);
        c.slice(1, MS);
        c.declare(2, 5 * MS);
        assert_eq!(c.progress(5 * MS), Progress::Complete(Cause::Declared), "declared after the last slice");
        c.declare(0, 5 * MS);
        c.declare(1, 5 * MS);
        assert_eq!(c.progress(5 * MS), Progress::Complete(Cause::Declared), "impossible counts are ignored");
    }

    #[test]
    fn a_slice_beyond_the_declared_count_waits_for_the_other_rules() {
        let mut c = new();
        c.declare(1, 0);
        c.slice(1, MS);
        c.slice(1, 2 * MS);
        assert_eq!(c.progress(3 * MS), Progress::Open);
        c.released(1, 10 * MS);
        assert_eq!(c.progress(2_010 * MS), Progress::Complete(Cause::Released));
    }

    #[test]
    fn a_declared_count_never_reached_does_not_wait_for_ever() {
        let mut c = new();
        c.declare(300, 0);
        c.slice(1, 0);
        c.released(1, 0);
        assert_eq!(c.progress(2_000 * MS), Progress::Complete(Cause::Released));
    }

    #[test]
    fn a_late_slice_re_opens_a_complete_series_each_time() {
        let mut c = new();
        c.slice(1, 0);
        c.released(1, 0);
        for k in 1..5u64 {
            let at = k * 60_000 * MS;
            assert_eq!(c.progress(at), Progress::Complete(Cause::Released));
            c.slice(k + 1, at);
            assert_eq!(c.progress(at + 1), Progress::Open);
            c.released(k + 1, at + MS);
            assert_eq!(c.deadline_ns(), Some(at + 2_001 * MS));
            assert_eq!(c.slices(), k + 1);
        }
        c.flush();
        assert_eq!(c.progress(0), Progress::Complete(Cause::Flushed));
        c.slice(9, 400_000 * MS);
        assert_eq!(c.progress(400_001 * MS), Progress::Open, "a flush holds until the next slice");
    }

    #[test]
    fn hints_start_work_and_never_publish() {
        let mut c = new();
        assert!(!c.looks_complete(Some(0), u64::MAX) && !c.looks_complete(None, u64::MAX));
        c.slice(1, 10 * MS);
        c.slice(1, 20 * MS);
        assert!(!c.looks_complete(Some(3), 21 * MS));
        assert!(c.looks_complete(Some(2), 21 * MS), "hint reached");
        assert_eq!(c.progress(21 * MS), Progress::Open);
        assert!(!c.looks_complete(None, 519 * MS));
        assert!(c.looks_complete(None, 520 * MS), "a lull");
        assert_eq!(c.looks_complete_at_ns(None), Some(520 * MS));
        c.released(1, 30 * MS);
        assert!(c.looks_complete(None, 30 * MS), "released");
        assert_eq!(c.progress(30 * MS), Progress::Open);
    }

    #[test]
    fn rules_out_of_range_are_found() {
        assert_eq!(CompletionRules::default().faults(), Vec::<String>::new());
        assert_eq!(CompletionRules { grace_ms: 1, idle_ms: 0 }.faults().len(), 2);
        assert_eq!(CompletionRules { grace_ms: 0, idle_ms: u64::MAX }.faults().len(), 1);
        let mut c = Completion::new(CompletionRules { grace_ms: u64::MAX, idle_ms: u64::MAX }, 0);
        c.slice(1, 5);
        c.released(1, 6);
        assert_eq!(c.progress(u64::MAX - 1), Progress::Open, "no overflow");
    }

    #[test]
    fn a_clock_that_goes_back_does_no_harm() {
        let mut c = new();
        c.slice(1, 1_000 * MS);
        c.slice(1, 10 * MS);
        c.released(1, 20 * MS);
        assert_eq!(c.deadline_ns(), Some(3_000 * MS));
    }

    proptest! {
        #[test]
        fn without_an_event_complete_stays_complete_with_its_cause(
            events in proptest::collection::vec((0u8..6, 0u64..4, 0u64..30_000), 1..40), later in 0u64..100_000) {
            let mut c = new();
            let mut now = 0;
            for (kind, association, ms) in events {
                now += ms * MS;
                match kind {
                    0..=2 => c.slice(association, now),
                    3 => c.released(association, now),
                    4 => c.declare(association * 3, now),
                    _ => c.flush(),
                }
                let first = c.progress(now);
                if kind <= 2 && !matches!(first, Progress::Complete(Cause::Declared)) {
                    prop_assert_eq!(first, Progress::Open);
                }
                let then = c.progress(now + later * MS);
                if let Progress::Complete(_) = first {
                    prop_assert_eq!(first, then);
                }
                if let Some(at) = c.deadline_ns() {
                    let due = c.progress(at.max(now));
                    prop_assert!(matches!(due, Progress::Complete(_)));
                    prop_assert!(at <= now || c.progress(at - 1) == Progress::Open);
                    prop_assert!(c.looks_complete(None, at));
                } else {
                    prop_assert_eq!(c.slices(), 0);
                }
            }
        }
    }
}
