//! What the network looked at: class activation maps over the source slices, as pictures and a page.
//!
//! - Input: an [`Inference`](crate::engine::Inference), the head's weights, the plans that made the network's input, the
//!   HU slices.
//! - Output: the raw map (`cam.safetensors`), PNGs of the top slices, an overview, a self-contained summary page.
//!
//! [`class_activation_map`] and [`top_slices`] take well under a millisecond and come before the alert;
//! [`explain_series`] draws and may come after it. The map is a weighted sum of the last feature map: it shows which parts
//! of the scan raised the class's logit, at the resolution of the last layer (about 25 mm in-plane). It is no
//! segmentation and no measurement.
//!
//! Invariants: the map is never rectified or scaled before it is stored, only when it is drawn; one colour scale holds
//! for all pictures of a series; pictures and page carry no identity of a patient, and the banner (demo model, not for
//! diagnosis) is burnt into every picture.

mod cam;
pub(crate) mod font;
mod page;
mod render;

pub use cam::{Cam, CamGeometry, class_activation_map, slice_map, top_slices, write_cam};
pub use page::{Explanation, SeriesToExplain, explain_series};
pub use render::{RenderOptions, encode_png, oriented_size, render_slice, write_png};

/// Why an explanation could not be made. Paths and identities are left out on purpose.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// A file could not be written.
    #[error("write {file} of the explanation: {source}; check space and permissions of the data folder")]
    Write {
        /// Which file, by its role.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The PNG encoder failed.
    #[error("encode a picture of {width} x {height} pixels: {source}")]
    Png {
        /// Width.
        width: u32,
        /// Height.
        height: u32,
        /// What the encoder said.
        source: png::EncodingError,
    },
    /// The map could not be serialised.
    #[error("serialise the class activation map: {0}")]
    Tensor(#[from] safetensors::SafeTensorError),
    /// A slice is not there any more.
    #[error("expected slice {index} of the series, it is gone from the volume")]
    MissingSlice {
        /// Ordered index.
        index: usize,
    },
    /// Lengths that do not fit together.
    #[error("explain: expected {what} to have {expected} entries, got {got}")]
    Shape {
        /// What was measured.
        what: &'static str,
        /// Length that fits.
        expected: usize,
        /// Length found.
        got: usize,
    },
}
