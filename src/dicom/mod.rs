//! DICOM in and out: the association server and client, slice headers, pixel decoding, Part 10 files.
//!
//! ```text
//! peer ──C-STORE──> scp ──data set bytes──> handler (the pipeline: header, journal, answer)
//!                                            └──> header::parse_header, header::judge
//! journal ──data set bytes──> decode::PixelDecoder ──HU i16──> volume
//! files   ──part10::read_part10──> the same bytes
//! ```
//!
//! Invariants: nothing read from outside is trusted (every length is bounded before it is used for an allocation),
//! nothing is re-encoded (a data set is kept as the peer encoded it), no identifying value goes into an error, an
//! event or a `Debug` text. Deliberately absent: query/retrieve, storage commitment, transcoding, a general data set
//! model (`dicom-object` is that, for objects this program writes).

pub mod dataset;
pub mod decode;
pub mod header;
pub mod part10;
pub mod scp;
pub mod scu;
pub mod syntax;
pub mod upper;

#[cfg(test)]
#[path = "../../tests/dicom_support/mod.rs"]
pub(crate) mod testkit;
