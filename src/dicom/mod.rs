//! dicom (to be written)
