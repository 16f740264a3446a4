//! Who is alerted: a pure decision over calibrated probabilities.
//!
//! Deliberately absent: anything that calls a scan healthy. No alert means only that no threshold was reached.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::calibration::Calibration;
use super::outcome::{DEMO, Outcome, SeriesReport};
use crate::model::manifest::CLASS_KEYS;
use crate::volume::refusal::{Reason, Refusal};

/// How much of a hurry there is. Ordered: none < routine < urgent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// No alert.
    #[default]
    None,
    /// To be looked at in its turn.
    Routine,
    /// To be looked at next.
    Urgent,
}

impl Level {
    /// The text form.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Routine => "routine",
            Self::Urgent => "urgent",
        }
    }
}

/// What is done about a scan that is flagged as unlike the data the model was made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OodAction {
    /// The flag is shown with the result, which stands and alerts as any other.
    #[default]
    Flag,
    /// The result stands, with its flag, and alerts nobody.
    Suppress,
    /// There is no result, because of `out_of_distribution`.
    Refuse,
}

/// When to alert. The `[alert]` table of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AlertPolicy {
    /// Classes that alert, each with its level.
    pub classes: BTreeMap<String, Level>,
    /// Thresholds that replace the calibration's, by class.
    pub thresholds: BTreeMap<String, f64>,
    /// Level of the alert that there is no result.
    pub no_result: Level,
    /// Only the live result of a study alerts.
    pub only_live: bool,
    /// What is done about a scan unlike the training data.
    pub ood_action: OodAction,
}

impl Default for AlertPolicy {
    fn default() -> Self {
        Self {
            classes: BTreeMap::from([("covid19".into(), Level::Urgent), ("cp".into(), Level::Routine)]),
            thresholds: BTreeMap::new(),
            no_result: Level::None,
            only_live: true,
            ood_action: OodAction::Flag,
        }
    }
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Whether somebody is alerted.
    pub alert: bool,
    /// How much of a hurry there is.
    pub level: Level,
    /// The class that decided.
    pub class: Option<String>,
    /// Its probability.
    pub probability: Option<f64>,
    /// Its threshold; null if it has none and the prediction decided.
    pub threshold: Option<f64>,
    /// For people.
    pub why: String,
}

impl Decision {
    fn none(why: impl Into<String>) -> Self {
        Self { alert: false, level: Level::None, class: None, probability: None, threshold: None, why: why.into() }
    }
}

impl AlertPolicy {
    /// Every fault of the values.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for class in self.classes.keys() {
            if !CLASS_KEYS.contains(&class.as_str()) {
                faults.push(format!("classes.{class}: no such class, expected one of {CLASS_KEYS:?}"));
            }
        }
        for (class, value) in &self.thresholds {
            if !self.classes.contains_key(class) {
                faults.push(format!("thresholds.{class}: the class does not alert, add it to classes"));
            }
            if !(0.0..=1.0).contains(value) {
                faults.push(format!("thresholds.{class}: expected 0 to 1, got {value}"));
            }
        }
        faults
    }

    /// The threshold of a class: the configuration's, else the calibration's.
    pub fn threshold(&self, class: &str, calibration: &Calibration) -> Option<f64> {
        self.thresholds.get(class).copied().or_else(|| calibration.thresholds.get(class).map(|t| t.alert))
    }

    /// Decides about one report. `live`: whether it will be the live result of its study.
    ///
    /// A class alerts when its calibrated probability reaches its threshold; one without a threshold, when it is the
    /// predicted class. Of several the highest level decides, then the highest probability, then the order of
    /// [`CLASS_KEYS`].
    pub fn decide(&self, report: &SeriesReport, calibration: &Calibration, live: bool) -> Decision {
        if self.only_live && !live {
            return Decision::none("not the live result of its study");
        }
        let (Outcome::Result, Some(logits)) = (report.outcome, report.logits.as_deref()) else {
            let reason = report.reason.map_or("unknown", |r| r.as_str());
            return Decision {
                alert: self.no_result > Level::None,
                level: self.no_result,
                ..Decision::none(format!("no result: {reason}"))
            };
        };
        if self.ood_action == OodAction::Suppress && report.ood.as_ref().is_some_and(|o| o.flag) {
            return Decision::none("flagged as unlike the training data, and alert.ood_action is suppress");
        }
        let mut best: Option<Decision> = None;
        let mut considered = 0;
        for (class, probability) in CLASS_KEYS.iter().zip(calibration.probabilities(logits)) {
            let level = self.classes.get(*class).copied().unwrap_or_default();
            if level == Level::None {
                continue;
            }
            considered += 1;
            let threshold = self.threshold(class, calibration);
            let (alert, why) = match threshold {
                Some(t) => (probability >= t, "the probability reaches the threshold"),
                None => (report.predicted.as_deref() == Some(*class), "the predicted class, which has no threshold"),
            };
            let rank = |d: &Decision| (d.level, d.probability.unwrap_or(0.0));
            let candidate = Decision {
                alert: true,
                level,
                class: Some((*class).to_owned()),
                probability: Some(probability),
                threshold,
                why: why.to_owned(),
            };
            if alert && best.as_ref().is_none_or(|b| rank(&candidate) > rank(b)) {
                best = Some(candidate);
            }
        }
        best.unwrap_or_else(|| {
            Decision::none(if considered == 0 { "no class alerts" } else { "no class reaches its threshold" })
        })
    }
}

impl AlertPolicy {
    /// The report that goes out instead of `report`: one without a result where the scan is flagged and that is not
    /// taken. The score and its reason stay in it.
    ///
    /// # Errors
    /// The report that goes out instead, and the refusal in it.
    pub fn admit(&self, report: SeriesReport) -> Result<SeriesReport, Box<(SeriesReport, Refusal)>> {
        match &report.ood {
            Some(ood) if ood.flag && self.ood_action == OodAction::Refuse => {
                let why = ood.why.as_deref().unwrap_or("it is flagged");
                let refusal = Refusal::new(Reason::OutOfDistribution, format!("{why}; alert.ood_action is refuse"));
                let mut refused = SeriesReport::no_result(report.series.clone(), &refusal, report.slices);
                refused.ood.clone_from(&report.ood);
                refused.quality = report.quality;
                refused.latency_ms = report.latency_ms;
                Err(Box::new((refused, refusal)))
            }
            _ => Ok(report),
        }
    }
}

/// What kind of receiver a sink speaks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SinkKind {
    /// A program of the site's own.
    Webhook,
    /// DICOM result objects.
    Dicom,
    /// HL7 messages.
    Hl7,
    /// FHIR resources.
    Fhir,
    /// E-mail.
    Email,
}

impl SinkKind {
    /// Whether people read it as a finding, without the words that say what a demo model is.
    pub const fn is_clinical(self) -> bool {
        !matches!(self, Self::Webhook)
    }
}

/// Whether a model's results may go to a sink: a demo model's reach no clinical sink unless `allow_demo_model` is set.
pub fn may_send(intended_use: &str, sink: SinkKind, allow_demo_model: bool) -> bool {
    intended_use != DEMO || !sink.is_clinical() || allow_demo_model
}

#[cfg(test)]
mod tests {
    use super::super::outcome::Ood;
    use super::*;

    /// A report whose uncalibrated scores are `p` (CP, COVID-19, healthy).
    fn report(p: [f32; 3]) -> SeriesReport {
        SeriesReport::result("ab", &p.map(f32::ln), 100).unwrap()
    }

    fn calibration(covid19: f64, cp: f64) -> Calibration {
        let t = |alert| super::super::calibration::Threshold { alert, ..Default::default() };
        Calibration {
            thresholds: BTreeMap::from([("covid19".into(), t(covid19)), ("cp".into(), t(cp))]),
            ..Calibration::none()
        }
    }

    #[test]
    fn decisions_follow_the_table() {
        let default = AlertPolicy::default();
        let with = |f: fn(&mut AlertPolicy)| {
            let mut p = AlertPolicy::default();
            f(&mut p);
            p
        };
        let c = calibration(0.3, 0.5);
        let none = Calibration::none();
        type Row<'a> = (&'a str, AlertPolicy, &'a Calibration, [f32; 3], bool, Level, Option<&'a str>, Option<f64>);
        #[rustfmt::skip]
        let table: Vec<Row> = vec![
            // name  policy  calibration  CP COVID healthy  live  level  class  threshold
            ("covid over threshold",      default.clone(),  &c,    [0.1, 0.8, 0.1],   true,  Level::Urgent,  Some("covid19"), Some(0.3)),
            ("sensitive threshold",       default.clone(),  &c,    [0.05, 0.35, 0.6], true,  Level::Urgent,  Some("covid19"), Some(0.3)),
            ("cp over threshold",         default.clone(),  &c,    [0.8, 0.1, 0.1],   true,  Level::Routine, Some("cp"),      Some(0.5)),
            ("both over: level first",    default.clone(),  &c,    [0.6, 0.35, 0.05], true,  Level::Urgent,  Some("covid19"), Some(0.3)),
            ("healthy",                   default.clone(),  &c,    [0.1, 0.1, 0.8],   true,  Level::None,    None,            None),
            ("not live",                  default.clone(),  &c,    [0.1, 0.8, 0.1],   false, Level::None,    None,            None),
            ("not live but asked for",    with(|p| p.only_live = false),
                &c, [0.1, 0.8, 0.1], false, Level::Urgent, Some("covid19"), Some(0.3)),
            ("config overrides",          with(|p| { p.thresholds.insert("covid19".into(), 0.9); }),
                &c, [0.1, 0.8, 0.1], true, Level::None, None, None),
            ("class switched off",        with(|p| { p.classes.remove("covid19"); }), &c, [0.1, 0.8, 0.1], true, Level::None, None, None),
            ("class at level none",       with(|p| { p.classes.insert("covid19".into(), Level::None); }),
                &c, [0.1, 0.8, 0.1], true, Level::None, None, None),
            ("no class alerts",           with(|p| p.classes.clear()), &c, [0.1, 0.8, 0.1], true, Level::None, None, None),
            ("no threshold: predicted",   default.clone(),  &none, [0.3, 0.4, 0.3],   true,  Level::Urgent,  Some("covid19"), None),
            ("no threshold: not",         default.clone(),  &none, [0.3, 0.3, 0.4],   true,  Level::None,    None,            None),
        ];
        for (name, policy, calibration, p, live, level, class, threshold) in table {
            let d = policy.decide(&report(p), calibration, live);
            assert_eq!((d.alert, d.level), (level > Level::None, level), "{name}: {d:?}");
            assert_eq!(d.class.as_deref(), class, "{name}");
            assert_eq!(d.threshold, threshold, "{name}");
            assert_eq!(d.probability.is_some(), d.alert, "{name}");
            assert!(!d.why.is_empty(), "{name}");
        }
    }

    #[test]
    fn threshold_itself_alerts() {
        let logits = [0.3, 1.2, -0.4];
        let r = SeriesReport::result("ab", &logits, 9).unwrap();
        let c = Calibration::none();
        let p = c.probabilities(r.logits.as_deref().unwrap())[1];
        let at = |t| AlertPolicy { thresholds: BTreeMap::from([("covid19".into(), t)]), ..AlertPolicy::default() };
        assert!(at(p).decide(&r, &c, true).alert);
        assert!(!at(p.next_up()).decide(&r, &c, true).alert);
    }

    #[test]
    fn no_result_alerts_only_when_asked() {
        let r = SeriesReport::no_result("ab", &Refusal::new(Reason::Gap, "3 slices missing"), 90);
        let quiet = AlertPolicy::default().decide(&r, &Calibration::none(), true);
        assert!(!quiet.alert && quiet.why.contains("gap"));
        let loud = AlertPolicy { no_result: Level::Routine, ..AlertPolicy::default() };
        let d = loud.decide(&r, &Calibration::none(), true);
        assert_eq!((d.alert, d.level, d.class), (true, Level::Routine, None));
    }

    #[test]
    fn temperature_reaches_the_decision() {
        let r = report([0.1, 0.8, 0.1]);
        let hot = Calibration { temperature: 10.0, ..calibration(0.5, 0.5) };
        assert!(AlertPolicy::default().decide(&r, &calibration(0.5, 0.5), true).alert);
        assert!(!AlertPolicy::default().decide(&r, &hot, true).alert);
    }

    #[test]
    fn configuration_faults_are_named() {
        let text = "thresholds = { healthy = 0.5, cp = 2.0 }\nclasses = { cp = \"routine\", flu = \"urgent\" }";
        let p: AlertPolicy = toml::from_str(text).unwrap();
        assert_eq!(p.validate().len(), 3, "{:?}", p.validate());
        assert!(AlertPolicy::default().validate().is_empty());
        assert!(toml::from_str::<AlertPolicy>("only_alive = true").is_err());
        let back: AlertPolicy = toml::from_str(&toml::to_string(&AlertPolicy::default()).unwrap()).unwrap();
        assert_eq!(back, AlertPolicy::default());
    }

    #[test]
    fn demo_models_reach_no_clinical_sink_unless_allowed() {
        for kind in [SinkKind::Dicom, SinkKind::Hl7, SinkKind::Fhir, SinkKind::Email] {
            assert!(!may_send("demo", kind, false), "{kind:?}");
            assert!(may_send("demo", kind, true), "{kind:?}");
            assert!(may_send("triage", kind, false), "{kind:?}");
        }
        assert!(may_send("demo", SinkKind::Webhook, false));
    }

    #[test]
    fn a_flagged_scan_is_shown_suppressed_or_refused_as_configured() {
        let ood = Ood { score: Some(1.5), features: None, texture: None, flag: true, why: Some("far".into()) };
        let flagged = SeriesReport { ood: Some(ood.clone()), ..report([0.1, 0.8, 0.1]) };
        let usual = SeriesReport {
            ood: Some(Ood { score: Some(0.5), features: None, texture: None, flag: false, why: None }),
            ..flagged.clone()
        };
        let c = calibration(0.5, 0.5);
        let policy = |ood_action| AlertPolicy { ood_action, ..AlertPolicy::default() };
        for (action, alerts, stands) in
            [(OodAction::Flag, true, true), (OodAction::Suppress, false, true), (OodAction::Refuse, true, false)]
        {
            let policy = policy(action);
            assert_eq!(policy.decide(&flagged, &c, true).alert, alerts, "{action:?}");
            assert!(policy.decide(&usual, &c, true).alert);
            assert_eq!(policy.admit(usual.clone()).unwrap(), usual);
            match policy.admit(flagged.clone()) {
                Ok(report) => assert!(stands && report == flagged),
                Err(instead) => {
                    let (report, refusal) = *instead;
                    assert!(!stands && refusal.reason == Reason::OutOfDistribution);
                    assert_eq!((report.outcome, report.ood), (Outcome::NoResult, Some(ood.clone())));
                    assert!(report.logits.is_none() && report.predicted.is_none());
                }
            }
        }
    }
}
