//! Why a series gets no result: the reasons, as data.
//!
//! "No result, because …" is a first-class outcome: it is stored, shown and counted like a diagnosis.

use serde::{Deserialize, Serialize};

/// The closed set of reasons for which a series is not judged.
///
/// The text form (`as_str`, serde) is what JSON, metrics labels and the database hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The objects are not CT images (Modality or SOP class).
    NotCt,
    /// ImageType value 3 is LOCALIZER (a scout view).
    Localizer,
    /// ImageType says DERIVED/SECONDARY in a way that is no axial reconstruction (MPR, MIP, screen save).
    Derived,
    /// The planes are not axial within the tilt limit, or have no orientation or position, or an impossible one.
    NotAxial,
    /// Fewer slices than the limit.
    TooFewSlices,
    /// More slices than the limit.
    TooManySlices,
    /// A slice is missing between two neighbours.
    Gap,
    /// Two different images claim one SOPInstanceUID or one position.
    DuplicateConflict,
    /// Slices of different size, spacing or orientation in one series, or an impossible spacing.
    InconsistentGeometry,
    /// No lung found in the volume.
    NoLung,
    /// The pixels cannot be decoded, or there are none or too many of them (Rows, Columns).
    Undecodable,
    /// Unlike the data the model was made for, where the site has set that such scans get no result.
    OutOfDistribution,
    /// A fault of this program; never to be read as a negative finding.
    Internal,
}

impl Reason {
    /// Every reason, in the order of declaration.
    pub const ALL: [Reason; 13] = [
        Reason::NotCt,
        Reason::Localizer,
        Reason::Derived,
        Reason::NotAxial,
        Reason::TooFewSlices,
        Reason::TooManySlices,
        Reason::Gap,
        Reason::DuplicateConflict,
        Reason::InconsistentGeometry,
        Reason::NoLung,
        Reason::Undecodable,
        Reason::OutOfDistribution,
        Reason::Internal,
    ];

    /// The text form, snake case.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::NotCt => "not_ct",
            Reason::Localizer => "localizer",
            Reason::Derived => "derived",
            Reason::NotAxial => "not_axial",
            Reason::TooFewSlices => "too_few_slices",
            Reason::TooManySlices => "too_many_slices",
            Reason::Gap => "gap",
            Reason::DuplicateConflict => "duplicate_conflict",
            Reason::InconsistentGeometry => "inconsistent_geometry",
            Reason::NoLung => "no_lung",
            Reason::Undecodable => "undecodable",
            Reason::OutOfDistribution => "out_of_distribution",
            Reason::Internal => "internal",
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A reason with what was expected, what was got and what to do.
///
/// `detail` names attributes and counts, never a value that identifies a patient.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Refusal {
    /// The closed reason.
    pub reason: Reason,
    /// One lowercase sentence fragment for people.
    pub detail: String,
}

impl Refusal {
    /// A refusal for `reason`, explained by `detail`.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}
