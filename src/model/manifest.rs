//! `model.toml`: everything that defines a model besides its weights.
//!
//! The layout carries its version in `schema`. Unknown fields are errors, so that a misspelt one never falls back to a
//! default in silence. File names in a manifest are plain names, never paths.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ModelError;

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

/// What the grey values of a model's training data meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceWindow {
    /// HU, as at the scanner.
    #[default]
    Hu,
    /// Pictures exported with this window, mapped back to HU.
    Window {
        /// Centre, HU.
        center_hu: f32,
        /// Width, HU.
        width_hu: f32,
    },
    /// Pictures exported with a window that nobody published, taken as windowed like the input. HU from a scanner may
    /// look different from anything such a model has seen.
    Unknown,
}

impl SourceWindow {
    /// Whether it is [`SourceWindow::Hu`].
    pub fn is_hu(&self) -> bool {
        *self == Self::Hu
    }
}

/// The only schema this version reads and writes.
pub const MANIFEST_SCHEMA: &str = "darnet.model/1";

/// What a model may be meant for. A closed list: a misspelt "demo" must not pass for something else.
pub const INTENDED_USES: [&str; 3] = ["demo", "research", "clinical"];

/// Longest accepted id, name or description in a manifest, bytes.
pub const MAX_NAME_BYTES: usize = 256;

/// `model.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_SCHEMA`].
    pub schema: String,
    /// Short name of the model, letters, digits, `.`, `_` and `-`.
    pub id: String,
    /// What it was trained on; "nothing" for the embedded one.
    pub trained_on: String,
    /// What the grey values of its training data meant.
    #[serde(default, skip_serializing_if = "SourceWindow::is_hu")]
    pub source_window: SourceWindow,
    /// One of [`INTENDED_USES`].
    pub intended_use: String,
    /// Keys of the classes in the order of the outputs.
    pub class_keys: Vec<String>,
    /// Names of the classes for people, in the same order.
    pub class_names: Vec<String>,
    /// The safetensors file in the model's folder.
    pub weights_file: String,
    /// Its SHA-256, lower-case hex.
    pub weights_sha256: String,
    /// The calibration file, in the model's folder or the shipped `calibration/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<String>,
    /// Shape of the network.
    pub architecture: Architecture,
    /// From HU to network input.
    #[serde(default)]
    pub preprocessing: Preprocessing,
    /// Measured scores by name (`accuracy`, `auc_covid19`, …), empty when none were measured.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub scores: BTreeMap<String, f64>,
}

impl Manifest {
    /// A manifest for the classes of the paper and weights that were trained on nothing.
    pub fn demo(id: &str, architecture: Architecture, weights_sha256: &str) -> Self {
        let (class_keys, class_names) = default_classes(architecture.num_classes);
        Self {
            schema: MANIFEST_SCHEMA.to_owned(),
            id: id.to_owned(),
            trained_on: "nothing".to_owned(),
            source_window: SourceWindow::Hu,
            intended_use: "demo".to_owned(),
            class_keys,
            class_names,
            weights_file: "weights.safetensors".to_owned(),
            weights_sha256: weights_sha256.to_owned(),
            calibration: None,
            architecture,
            preprocessing: Preprocessing::default(),
            scores: BTreeMap::new(),
        }
    }

    /// Reads and validates a manifest.
    ///
    /// # Errors
    /// TOML that does not parse, an unknown field, or a value out of range.
    pub fn parse(text: &str) -> Result<Self, ModelError> {
        let manifest: Self = toml::from_str(text).map_err(|e| ModelError::ManifestSyntax(e.to_string()))?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// The manifest as TOML, with a comment that says what the file is.
    ///
    /// # Errors
    /// A value TOML cannot hold; none that passed [`Manifest::validate`].
    pub fn to_toml(&self) -> Result<String, ModelError> {
        let body = toml::to_string(self).map_err(|e| ModelError::ManifestSyntax(e.to_string()))?;
        Ok(format!("# A DARNet model: what defines it besides its weights. See engines/README.md.\n{body}"))
    }

    /// Whether results of this model must not reach a clinical sink by default.
    pub fn is_demo(&self) -> bool {
        self.intended_use == "demo"
    }

    /// Checks every field's range.
    ///
    /// # Errors
    /// The first field out of range.
    pub fn validate(&self) -> Result<(), ModelError> {
        let check = |ok: bool, field, expected: &str, got: String| {
            if ok { Ok(()) } else { Err(ModelError::Manifest { field, expected: expected.to_owned(), got }) }
        };
        let plain = |name: &str| {
            !name.is_empty()
                && name.len() <= MAX_NAME_BYTES
                && !name.starts_with('.')
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        };
        let name = "a plain name of letters, digits, '.', '_' and '-'";
        check(self.schema == MANIFEST_SCHEMA, "schema", MANIFEST_SCHEMA, self.schema.clone())?;
        check(plain(&self.id), "id", name, format!("{:?}", self.id))?;
        check(
            !self.trained_on.is_empty() && self.trained_on.len() <= MAX_NAME_BYTES,
            "trained_on",
            "1 to 256 bytes",
            format!("{} bytes", self.trained_on.len()),
        )?;
        check(
            INTENDED_USES.contains(&self.intended_use.as_str()),
            "intended_use",
            "demo, research or clinical",
            format!("{:?}", self.intended_use),
        )?;
        check(plain(&self.weights_file), "weights_file", name, format!("{:?}", self.weights_file))?;
        check(
            self.weights_sha256.len() == 64
                && self.weights_sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')),
            "weights_sha256",
            "64 lower-case hex digits",
            format!("{:?}", self.weights_sha256),
        )?;
        if let Some(file) = &self.calibration {
            check(plain(file), "calibration", name, format!("{file:?}"))?;
        }
        self.architecture.validate()?;
        let classes = self.architecture.num_classes;
        check(
            self.class_keys.len() == classes && self.class_keys.iter().all(|k| plain(k)),
            "class_keys",
            "one plain name an output of the architecture",
            format!("{:?}", self.class_keys),
        )?;
        let mut sorted = self.class_keys.clone();
        sorted.sort();
        sorted.dedup();
        check(sorted.len() == classes, "class_keys", "no key twice", format!("{:?}", self.class_keys))?;
        check(
            self.class_names.len() == classes
                && self.class_names.iter().all(|n| !n.is_empty() && n.len() <= MAX_NAME_BYTES),
            "class_names",
            "one name an output of the architecture",
            format!("{:?}", self.class_names),
        )?;
        let p = &self.preprocessing;
        check(
            p.window_center_hu.is_finite() && p.window_center_hu.abs() <= 32_768.0,
            "preprocessing.window_center_hu",
            "-32768 to 32768",
            p.window_center_hu.to_string(),
        )?;
        check(
            p.window_width_hu > 0.0 && p.window_width_hu <= 65_536.0,
            "preprocessing.window_width_hu",
            "more than 0, at most 65536",
            p.window_width_hu.to_string(),
        )?;
        check(
            p.crop_fraction > 0.0 && p.crop_fraction <= 1.0,
            "preprocessing.crop_fraction",
            "more than 0, at most 1",
            p.crop_fraction.to_string(),
        )?;
        if let DepthGrid::FixedMm(pitch) = p.depth_grid {
            check(
                pitch > 0.0 && pitch <= 100.0,
                "preprocessing.depth_grid.fixed_mm",
                "more than 0, at most 100",
                pitch.to_string(),
            )?;
        }
        for (key, value) in &self.scores {
            check(
                value.is_finite() && key.len() <= MAX_NAME_BYTES,
                "scores",
                "finite numbers",
                format!("{key} = {value}"),
            )?;
        }
        Ok(())
    }
}

/// Keys and names of the paper's three classes; numbered ones for another count.
pub fn default_classes(num_classes: usize) -> (Vec<String>, Vec<String>) {
    if num_classes == CLASS_KEYS.len() {
        (
            CLASS_KEYS.map(str::to_owned).to_vec(),
            ["common pneumonia", "COVID-19", "healthy"].map(str::to_owned).to_vec(),
        )
    } else {
        (
            (0..num_classes).map(|i| format!("class{i}")).collect(),
            (0..num_classes).map(|i| format!("class {i}")).collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest::demo("a-1", Architecture::full(), &"0".repeat(64))
    }

    #[test]
    fn a_manifest_survives_toml() {
        let mut m = manifest();
        m.calibration = Some("demo.toml".to_owned());
        m.scores.insert("accuracy".to_owned(), 0.25);
        m.preprocessing.depth_grid = DepthGrid::FixedMm(5.0);
        m.architecture.attention_order = AttentionOrder::ChannelFirst;
        assert_eq!(Manifest::parse(&m.to_toml().unwrap()).unwrap(), m);
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let text = manifest().to_toml().unwrap();
        let error = Manifest::parse(&text.replace("trained_on", "trained_upon")).unwrap_err();
        assert!(error.to_string().contains("trained_upon"), "{error}");
    }

    #[test]
    fn each_field_out_of_range_is_named() {
        type Edit = fn(&mut Manifest);
        let faults: [(&str, Edit); 12] = [
            ("schema", |m| m.schema = "darnet.model/2".into()),
            ("id", |m| m.id = "a/b".into()),
            ("trained_on", |m| m.trained_on.clear()),
            ("intended_use", |m| m.intended_use = "Demo".into()),
            ("weights_file", |m| m.weights_file = "../../etc/passwd".into()),
            ("weights_sha256", |m| m.weights_sha256 = "ABC".into()),
            ("calibration", |m| m.calibration = Some("..".into())),
            ("class_keys", |m| m.class_keys[1] = "cp".into()),
            ("class_names", |m| drop(m.class_names.pop())),
            ("window_width_hu", |m| m.preprocessing.window_width_hu = f32::NAN),
            ("crop_fraction", |m| m.preprocessing.crop_fraction = 0.0),
            ("input_dhw", |m| m.architecture.input_dhw = [0, 1, 1]),
        ];
        for (field, fault) in faults {
            let mut m = manifest();
            fault(&mut m);
            let error = m.validate().unwrap_err().to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
    }
}
