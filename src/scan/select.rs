//! What a set of received objects amounts to: the pure decisions between arrival and inference.
//!
//! Input: the headers of one series and what decoding said of each. Output: the slices that make the volume, in depth
//! order, with notes, or the one [`Refusal`] of the series. Nothing here depends on the order of arrival: every
//! decision is taken over the slices sorted by SOPInstanceUID.
//!
//! Deliberately absent: files, clocks, threads. The daemon and `darnet infer` both decide here.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::dicom::header::{self, SliceHeader};
use crate::volume::geometry::{GeometryLimits, Stack, build_stack};
use crate::volume::refusal::{Reason, Refusal};

/// Largest share of well-formed slices that may be left out because they lie on another grid than the rest.
/// One stray slice in a 20-slice series is 5 %; a second reconstruction mixed in is far above.
pub const MAX_STRAY_SHARE: f64 = 0.10;

/// Different grids (size and orientation) one series may hold. A series has one; a scout makes two.
pub const MAX_GRIDS: usize = 4;

/// What is known of one distinct object of a series.
#[derive(Clone, Debug)]
pub struct SliceFacts {
    /// The parsed header.
    pub header: Arc<SliceHeader>,
    /// Why this object alone cannot be part of a volume, if so.
    pub refusal: Option<Refusal>,
}

/// What the header alone says of an object; decoding may add a refusal.
pub fn facts(header: &Arc<SliceHeader>, limits: &GeometryLimits) -> SliceFacts {
    let judged = header::judge(header).and_then(|()| {
        let geometry = header.geometry.as_ref().map_err(Clone::clone)?;
        geometry.validate()?;
        geometry.in_plane_orientation(limits).map(drop)
    });
    SliceFacts { header: Arc::clone(header), refusal: judged.err() }
}

/// The slices that make the volume.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// Indices into the facts given, in the order of `stack.order` (feet first).
    pub ordered: Vec<usize>,
    /// Ordering and geometry; `stack.order` indexes the selection before ordering and is of no use to callers.
    pub stack: Stack,
    /// What a reader of the result should know, one lowercase sentence each.
    pub notes: Vec<String>,
}

/// Chooses the volume of a series, or says why there is none.
///
/// # Errors
/// The refusal of the series: the commonest per-object refusal when no object is fit; `undecodable` or `internal`
/// when a CT slice was lost to decoding (its absence would be a hole); `inconsistent_geometry` when more than
/// [`MAX_STRAY_SHARE`] of the CT slices lie on another grid or have no usable geometry, or when there are more than
/// [`MAX_GRIDS`] grids; and whatever [`build_stack`] finds.
pub fn select(facts: &[SliceFacts], limits: &GeometryLimits) -> Result<Selection, Refusal> {
    if facts.is_empty() {
        return Err(Refusal::new(
            Reason::TooFewSlices,
            format!("expected at least {} slices, got 0", limits.min_slices),
        ));
    }
    let mut canonical: Vec<usize> = (0..facts.len()).collect();
    canonical.sort_by(|&a, &b| facts[a].header.sop_instance_uid.cmp(&facts[b].header.sop_instance_uid));

    let mut refused: BTreeMap<Reason, (usize, &str)> = BTreeMap::new();
    let mut fit = Vec::with_capacity(facts.len());
    for &i in &canonical {
        match &facts[i].refusal {
            Some(r) => {
                let entry = refused.entry(r.reason).or_insert((0, &r.detail));
                entry.0 += 1;
                entry.1 = entry.1.min(&r.detail);
            }
            None => fit.push(i),
        }
    }
    let total = facts.len();
    for lost in [Reason::Internal, Reason::Undecodable] {
        if let Some((n, detail)) = refused.get(&lost) {
            return Err(Refusal::new(lost, format!("{n} of {total} objects: {detail}")));
        }
    }
    if fit.is_empty() {
        let (reason, (n, detail)) = refused
            .iter()
            .max_by_key(|(reason, (n, _))| (*n, std::cmp::Reverse(**reason)))
            .expect("facts is not empty");
        return Err(Refusal::new(*reason, format!("{n} of {total} objects: {detail}")));
    }
    let mut notes: Vec<String> =
        refused.iter().map(|(reason, (n, _))| format!("{n} of {total} objects left out ({reason})")).collect();

    let geometry =
        |i: usize| facts[i].header.geometry.as_ref().expect("a slice without geometry is refused by facts()");
    let mut grids = Vec::new();
    for &i in &fit {
        let g = geometry(i);
        let grid = (g.rows, g.columns, g.in_plane_orientation(limits)?);
        if !grids.contains(&grid) {
            grids.push(grid);
        }
    }
    if grids.len() > MAX_GRIDS {
        let detail = format!("expected one grid, got {} sizes or orientations", grids.len());
        return Err(Refusal::new(Reason::InconsistentGeometry, detail));
    }
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for &i in &fit {
        match groups.iter_mut().find(|g| geometry(g[0]).same_stack(geometry(i))) {
            Some(group) => group.push(i),
            None => groups.push(vec![i]),
        }
    }
    let largest =
        groups.iter().enumerate().max_by_key(|(at, g)| (g.len(), std::cmp::Reverse(*at))).expect("fit is not empty").0;
    let members = groups.swap_remove(largest);
    let strays = fit.len() - members.len();
    // A CT slice without usable geometry may be a missing part of the volume just as well.
    let unplaced: usize =
        [Reason::NotAxial, Reason::InconsistentGeometry].iter().filter_map(|r| refused.get(r)).map(|(n, _)| n).sum();
    let slices = fit.len() + unplaced;
    if (strays + unplaced) as f64 > MAX_STRAY_SHARE * slices as f64 {
        return Err(Refusal::new(
            Reason::InconsistentGeometry,
            format!(
                "expected one grid (Rows, Columns, PixelSpacing, ImageOrientationPatient), got {} among {slices} slices, \
                 and {unplaced} without a usable one",
                groups.len() + 1,
            ),
        ));
    }
    if strays > 0 {
        notes.push(format!("{strays} of {} slices left out (another size, spacing or orientation)", fit.len()));
    }
    let stack_input: Vec<_> = members.iter().map(|&i| geometry(i).clone()).collect();
    let stack = build_stack(&stack_input, limits)?;
    let ordered = stack.order.iter().map(|&k| members[k as usize]).collect();
    if !stack.uniform {
        notes.push("slice spacing is not uniform: resampled by true position".to_owned());
    }
    if stack.shear_px.is_some() {
        notes.push(format!("gantry tilt of {:.1} degrees sheared out", stack.tilt_deg));
    }
    Ok(Selection { ordered, stack, notes })
}
