//! A wrapper that keeps a value out of logs and errors.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What stands for a redacted value.
const MASK: &str = "<redacted>";

/// A value whose `Debug`, `Display` and serialised forms show nothing of it.
///
/// The value is reached by [`Redacted::expose`] only, so that each use can be found by name. It deserialises like the
/// value itself (a secret in a configuration).
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Redacted<T>(T);

impl<T> Redacted<T> {
    /// Wraps a value.
    pub const fn new(value: T) -> Self {
        Self(value)
    }

    /// The value.
    pub const fn expose(&self) -> &T {
        &self.0
    }

    /// The value, unwrapped.
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> From<T> for Redacted<T> {
    fn from(value: T) -> Self {
        Self(value)
    }
}

impl<T> std::fmt::Debug for Redacted<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(MASK)
    }
}

impl<T> std::fmt::Display for Redacted<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(MASK)
    }
}

impl<T> Serialize for Redacted<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(MASK)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Redacted<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(deserializer).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Serialize, Deserialize)]
    struct Holder {
        name: Redacted<String>,
    }

    #[test]
    fn no_formatting_shows_the_value() {
        let h = Holder { name: Redacted::new("Doe^Jane".into()) };
        for text in [format!("{h:?}"), format!("{h:#?}"), h.name.to_string(), serde_json::to_string(&h).unwrap()] {
            assert!(!text.contains("Doe"), "{text}");
            assert!(text.contains(MASK), "{text}");
        }
        assert_eq!(h.name.expose(), "Doe^Jane");
    }

    #[test]
    fn deserialises_like_the_value() {
        let h: Holder = serde_json::from_str(r#"{"name":"s3cret"}"#).unwrap();
        assert_eq!(h.name.into_inner(), "s3cret");
    }
}
