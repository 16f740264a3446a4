//! phantom (to be written)
