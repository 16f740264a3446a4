//! `model.toml`: everything that defines a model besides its weights.

use serde::{Deserialize, Serialize};

/// The classes of a DARNet in the order of its outputs.
pub const CLASS_KEYS: [&str; 3] = ["cp", "covid19", "healthy"];

/// Order of the two attentions in a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionOrder {
    /// Depth attention, then channel attention (the reference implementation).
    #[default]
    DepthFirst,
    /// Channel attention, then depth attention (the paper's text).
    ChannelFirst,
}

/// Shape of a DARNet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    /// Channels of the stem and of layer1; doubled by each later layer.
    pub base_width: usize,
    /// Input shape, depth, height, width.
    pub input_dhw: [usize; 3],
    /// Outputs of the head.
    pub num_classes: usize,
    /// Whether blocks have channel attention.
    pub channel_attention: bool,
    /// Whether blocks have depth attention.
    pub depth_attention: bool,
    /// Which attention comes first.
    #[serde(default)]
    pub attention_order: AttentionOrder,
}

/// Which end of the patient is plane 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SliceDirection {
    /// Plane 0 is the one nearest the feet.
    #[default]
    FeetToHead,
    /// Plane 0 is the one nearest the head.
    HeadToFeet,
}

/// How the network's planes lie along the scan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DepthGrid {
    /// Fitted to the scan's extent, as in the paper.
    #[default]
    Fit,
    /// A fixed pitch from the plane-0 end.
    FixedMm(f64),
}

/// From HU to network input. The only definition of it, in training and at the scanner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocessing {
    /// Centre of the window, HU.
    pub window_center_hu: f32,
    /// Width of the window, HU.
    pub window_width_hu: f32,
    /// Share of rows and columns kept by the centre crop (416/512 in the paper's data).
    pub crop_fraction: f64,
    /// Planes along the scan.
    #[serde(default)]
    pub depth_grid: DepthGrid,
    /// Which end is plane 0.
    #[serde(default)]
    pub slice_direction: SliceDirection,
}

impl Default for Preprocessing {
    fn default() -> Self {
        Self {
            window_center_hu: -600.0,
            window_width_hu: 1500.0,
            crop_fraction: 416.0 / 512.0,
            depth_grid: DepthGrid::Fit,
            slice_direction: SliceDirection::FeetToHead,
        }
    }
}
