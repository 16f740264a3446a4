//! web (to be written)
