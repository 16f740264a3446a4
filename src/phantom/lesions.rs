//! What the disease adds: patches of ground-glass and consolidation, and pleural fluid.

use super::anatomy::{Anatomy, Ellipsoid, Lobe};
use super::math::{Draw, V3, add, scale, smoothstep};
use super::tree::Branch;
use super::{PhantomClass, PhantomSpec, Stage, Variation};

/// Free fluid in one pleural space: the lung is pushed up and to the front by a thickness that falls with height.
#[derive(Clone, Copy, Debug)]
struct Effusion {
    /// -1 right, +1 left.
    side: f64,
    thickness: f64,
    top_t: f64,
    /// +1 lies back (supine), -1 front (prone).
    gravity: f64,
}

/// The lesions of one patient, anatomy coordinates.
pub(super) struct Lesions {
    ground_glass: Vec<Ellipsoid>,
    consolidation: Vec<Ellipsoid>,
    /// Consolidation that stops at the fissures of one lobe.
    lobar: Vec<(Lobe, Ellipsoid)>,
    effusions: Vec<Effusion>,
    /// HU that full ground-glass adds to the parenchyma, and that a septum adds on top.
    pub(super) ground_glass_hu: f32,
    pub(super) septa_hu: f32,
    /// Share of the parenchymal texture that breaks up the patches.
    pub(super) ragged: f32,
}

impl Lesions {
    /// `points` are random places in the lungs, `branches` the airways of each lobe.
    pub(super) fn new(
        spec: &PhantomSpec,
        an: &Anatomy,
        points: &[V3],
        branches: &[(Lobe, Vec<Branch>)],
        prone: bool,
    ) -> Self {
        let mut d = Draw::new(spec.seed, 40);
        let mut this = Self {
            ground_glass: Vec::new(),
            consolidation: Vec::new(),
            lobar: Vec::new(),
            effusions: Vec::new(),
            ground_glass_hu: 250.0,
            septa_hu: 0.0,
            ragged: 0.25,
        };
        let severity = spec.severity.clamp(0.05, 1.0);
        match spec.class {
            PhantomClass::Healthy => {}
            PhantomClass::Covid => this.covid(&mut d, spec.stage, severity, an, points),
            PhantomClass::Cp => this.common_pneumonia(&mut d, severity, an, points, branches, prone),
        }
        this
    }

    /// Bilateral, peripheral, lower-lobe-weighted, multifocal.
    fn covid(&mut self, d: &mut Draw, stage: Stage, severity: f64, an: &Anatomy, points: &[V3]) {
        let (base, size, crazy, solid) = match stage {
            Stage::Early => (5.0, 0.75, 0.25, 0.0),
            Stage::Progressive => (10.0, 1.0, 0.9, 0.2),
            Stage::Peak => (13.0, 1.15, 0.7, 0.65),
            Stage::Absorption => (11.0, 0.95, 0.15, 0.5),
        };
        self.ground_glass_hu = match stage {
            Stage::Early => d.range(190.0, 260.0),
            Stage::Absorption => d.range(170.0, 240.0),
            _ => d.range(225.0, 320.0),
        } as f32;
        if d.chance(crazy) {
            self.septa_hu = d.range(150.0, 240.0) as f32;
        }
        let count = (base * (0.45 + 1.3 * severity)) as usize + 2;
        // Weighted choice: subpleural, low and dorsal places win.
        let weight = |p: V3| {
            let depth = -an.cage(p);
            let peripheral = smoothstep(34.0, 8.0, depth);
            let low = smoothstep(0.95, 0.15, an.t(p[2]));
            let dorsal = smoothstep(0.1, 0.9, (p[1] - an.front_y(p[2])) / (an.back_y(p[2]) - an.front_y(p[2])));
            0.02 + peripheral * (0.12 + 0.88 * low) * (0.25 + 0.75 * dorsal)
        };
        for k in 0..count {
            // Alternate sides so that the disease is bilateral, then as it comes.
            let side = if k < 4 { Some(if k % 2 == 0 { -1.0 } else { 1.0 }) } else { None };
            let Some(c) = pick(d, points, |p| side.is_none_or(|s: f64| p[0] * s > 0.0), weight) else { continue };
            let across = d.range(15.0, 40.0) * size * (0.75 + 0.5 * severity);
            let deep = across * d.range(0.42, 0.72);
            let normal = an.cage_normal(c);
            let patch = Ellipsoid::along(
                c,
                add(normal, scale(d.direction(), 0.25)),
                [deep, across, across * d.range(0.7, 1.2)],
            );
            self.ground_glass.push(patch);
            if d.chance(solid) {
                let inner = if stage == Stage::Absorption {
                    // Bands parallel to the pleura.
                    [d.range(3.0, 5.0), across * 0.8, d.range(4.0, 8.0)]
                } else {
                    [deep * 0.55, across * d.range(0.35, 0.7), across * d.range(0.3, 0.6)]
                };
                let at = add(c, scale(normal, deep * 0.2));
                self.consolidation.push(Ellipsoid::along(at, add(normal, scale(d.direction(), 0.3)), inner));
            }
        }
    }

    /// Lobar or patchy consolidation, now and then with fluid beside it.
    fn common_pneumonia(
        &mut self,
        d: &mut Draw,
        severity: f64,
        an: &Anatomy,
        points: &[V3],
        branches: &[(Lobe, Vec<Branch>)],
        prone: bool,
    ) {
        self.ground_glass_hu = d.range(230.0, 360.0) as f32;
        self.ragged = 0.27;
        let lobes = [
            Lobe::RightLower,
            Lobe::LeftLower,
            Lobe::RightLower,
            Lobe::RightMiddle,
            Lobe::RightUpper,
            Lobe::LeftUpper,
            Lobe::LeftLower,
        ];
        let main = lobes[d.below(lobes.len())];
        let lobar = d.chance(0.5);
        if lobar {
            let inside = |p: V3| an.inside_lobe(main, p) > 8.0;
            let Some(c) = pick(d, points, inside, |p| smoothstep(60.0, 5.0, -an.cage(p)) + 0.1) else { return };
            let r = d.range(42.0, 70.0) * (0.65 + 0.55 * severity);
            let core = Ellipsoid::along(c, d.direction(), [r, r * d.range(0.7, 1.0), r * d.range(0.7, 1.0)]);
            self.lobar.push((main, core));
            let mut halo = core;
            halo.radii = halo.radii.map(|v| v * 1.25 + 4.0);
            self.ground_glass.push(halo);
        }
        // Patches along the airways.
        let count = if lobar { d.below(4) } else { 5 + (12.0 * severity) as usize };
        let second = lobes[d.below(lobes.len())];
        for k in 0..count {
            let lobe = if k % 3 == 2 { second } else { main };
            let Some((_, tree)) = branches.iter().find(|(l, _)| *l == lobe) else { continue };
            let usable: Vec<&Branch> = tree.iter().filter(|b| (6..90).contains(&b.leaves)).collect();
            if usable.is_empty() {
                continue;
            }
            let b = usable[d.below(usable.len())];
            let r = d.range(9.0, 22.0) * (0.7 + 0.6 * severity);
            let along = [0, 1, 2].map(|i| b.b[i] - b.a[i]);
            let patch = Ellipsoid::along(b.b, along, [r * d.range(1.0, 1.4), r, r * d.range(0.7, 1.0)]);
            self.lobar.push((lobe, patch));
            let mut halo = patch;
            halo.radii = halo.radii.map(|v| v * 1.35 + 3.0);
            self.ground_glass.push(halo);
        }
        if d.chance(0.45) {
            let side = match main {
                Lobe::LeftLower | Lobe::LeftUpper => 1.0,
                _ => -1.0,
            };
            let gravity = if prone { -1.0 } else { 1.0 };
            let thickness = d.range(12.0, 40.0) * (0.6 + 0.6 * severity);
            self.effusions.push(Effusion { side, thickness, top_t: d.range(0.45, 0.85), gravity });
            if d.chance(0.25) {
                self.effusions.push(Effusion { side: -side, thickness: thickness * 0.5, top_t: 0.45, gravity });
            }
        }
    }

    /// Whether there is anything.
    pub(super) fn any(&self) -> bool {
        !(self.ground_glass.is_empty()
            && self.consolidation.is_empty()
            && self.lobar.is_empty()
            && self.effusions.is_empty())
    }

    /// Makes the textbook pattern less so. Its draws are its own: a variation that departs in nothing changes nothing.
    pub(super) fn vary(&mut self, spec: &PhantomSpec, an: &Anatomy, points: &[V3], prone: bool, v: &Variation) {
        let mut d = Draw::new(spec.seed, 41);
        let gravity = if prone { -1.0 } else { 1.0 };
        if v.atypical {
            match spec.class {
                PhantomClass::Covid => self.like_pneumonia(&mut d, an, points, gravity),
                PhantomClass::Cp => {
                    // Ground-glass alone, spread out.
                    self.lobar.clear();
                    self.effusions.clear();
                    for _ in 0..3 + d.below(4) {
                        let Some(c) = pick(&mut d, points, |_| true, |p| smoothstep(40.0, 8.0, -an.cage(p))) else {
                            continue;
                        };
                        let r = d.range(12.0, 28.0);
                        self.ground_glass.push(Ellipsoid::along(c, d.direction(), [r, r * d.range(0.7, 1.0), r]));
                    }
                }
                PhantomClass::Healthy => {}
            }
        }
        if v.one_sided {
            let side = if d.chance(0.5) { 1.0 } else { -1.0 };
            let on = |e: &Ellipsoid| e.centre[0] * side > 0.0;
            if self.ground_glass.iter().any(on) {
                self.ground_glass.retain(on);
                self.consolidation.retain(on);
                self.lobar.retain(|(_, e)| on(e));
            }
        }
        if v.lesion_share < 1.0 {
            let kept = |n: usize| ((v.lesion_share * n as f64) as usize).max(n.min(1));
            self.ground_glass.truncate(kept(self.ground_glass.len()));
            self.consolidation.truncate(kept(self.consolidation.len()));
            self.lobar.truncate(kept(self.lobar.len()));
        }
        if v.lesion_size != 1.0 {
            let all = self.ground_glass.iter_mut().chain(&mut self.consolidation);
            for e in all.chain(self.lobar.iter_mut().map(|(_, e)| e)) {
                e.radii = e.radii.map(|r| r * v.lesion_size);
            }
            for e in &mut self.effusions {
                e.thickness *= v.lesion_size;
            }
        }
        if v.lesion_density != 1.0 {
            self.ground_glass_hu *= v.lesion_density as f32;
            self.septa_hu *= v.lesion_density as f32;
        }
        self.ragged = (self.ragged + v.ragged as f32).max(0.0);
        if v.findings > 0 {
            if spec.class == PhantomClass::Healthy {
                self.ground_glass_hu = d.range(90.0, 220.0) as f32;
            }
            for _ in 0..v.findings {
                self.finding(&mut d, an, points, gravity);
            }
        }
    }

    /// What common pneumonia has and COVID-19 seldom.
    fn like_pneumonia(&mut self, d: &mut Draw, an: &Anatomy, points: &[V3], gravity: f64) {
        if d.chance(0.5) {
            let side = if d.chance(0.5) { 1.0 } else { -1.0 };
            self.effusions.push(Effusion { side, thickness: d.range(10.0, 28.0), top_t: d.range(0.4, 0.7), gravity });
        }
        if d.chance(0.6) {
            let lobe = Lobe::ALL[d.below(Lobe::ALL.len())];
            let inside = |p: V3| an.inside_lobe(lobe, p) > 8.0;
            if let Some(c) = pick(d, points, inside, |p| smoothstep(60.0, 5.0, -an.cage(p)) + 0.1) {
                let r = d.range(22.0, 45.0);
                self.lobar.push((lobe, Ellipsoid::along(c, d.direction(), [r, r * d.range(0.7, 1.0), r])));
            }
        }
    }

    /// Dependent density, a band or a nodule.
    fn finding(&mut self, d: &mut Draw, an: &Anatomy, points: &[V3], gravity: f64) {
        let dependent = |p: V3| {
            let forward = (p[1] - an.front_y(p[2])) / (an.back_y(p[2]) - an.front_y(p[2]));
            let low = if gravity > 0.0 { forward } else { 1.0 - forward };
            smoothstep(0.7, 0.95, low) * smoothstep(0.8, 0.1, an.t(p[2])) * smoothstep(25.0, 6.0, -an.cage(p))
        };
        match d.below(3) {
            0 => {
                if let Some(c) = pick(d, points, |_| true, dependent) {
                    let radii = [d.range(5.0, 10.0), d.range(22.0, 45.0), d.range(18.0, 40.0)];
                    self.ground_glass.push(Ellipsoid::along(c, an.cage_normal(c), radii));
                }
            }
            1 => {
                if let Some(c) = pick(d, points, |_| true, |p| smoothstep(60.0, 10.0, -an.cage(p))) {
                    let radii = [d.range(2.5, 4.0), d.range(12.0, 30.0), d.range(4.0, 8.0)];
                    self.consolidation.push(Ellipsoid::along(c, d.direction(), radii));
                }
            }
            _ => {
                if let Some(c) = pick(d, points, |_| true, |_| 0.5) {
                    let r = d.range(4.0, 8.0);
                    self.consolidation.push(Ellipsoid::along(c, d.direction(), [r, r, r]));
                }
            }
        }
    }

    /// `[effusion (distance), ground-glass (level), consolidation (level)]` at a point of the pleural cavity.
    pub(super) fn at(&self, an: &Anatomy, p: V3, lung: f64) -> [f64; 3] {
        let mut fluid = 50.0f64;
        let mut solid = -1.0f64;
        for e in &self.effusions {
            if p[0] * e.side <= 0.0 {
                continue;
            }
            let t = an.t(p[2]);
            // Fluid gathers in the dependent half.
            let forward = (p[1] - an.front_y(p[2])) / (an.back_y(p[2]) - an.front_y(p[2]));
            let dependent = if e.gravity > 0.0 { forward } else { 1.0 - forward };
            let low = smoothstep(0.32, 0.72, dependent) * smoothstep(14.0, 40.0, p[0].abs());
            let thick = e.thickness * low * smoothstep(e.top_t, 0.05, t);
            if thick > 0.5 {
                let moved = an.lung([p[0], p[1] + e.gravity * thick, p[2] - 0.1 * thick]);
                fluid = fluid.min(lung.max(-moved));
                // Lung pressed airless along the fluid.
                let rim = 0.25 * e.thickness.min(24.0) * smoothstep(e.top_t - 0.15, 0.1, t) * low;
                if rim > 0.5 {
                    solid = solid.max(((moved + rim) / rim).clamp(-1.0, 1.0) * 0.6);
                }
            }
        }
        let mut glass = -1.0f64;
        for e in &self.ground_glass {
            glass = glass.max(1.0 - e.level(p));
        }
        for e in &self.consolidation {
            solid = solid.max(1.0 - e.level(p));
        }
        for (lobe, e) in &self.lobar {
            let level = 1.0 - e.level(p);
            if level > solid {
                // The fissure is a sharp border.
                solid = solid.max(level.min(an.inside_lobe(*lobe, p) / 6.0));
            }
        }
        [fluid, glass, solid]
    }
}

/// A point chosen with a weight, among those allowed, by rejection (bounded) and then the best of the tried.
fn pick(d: &mut Draw, points: &[V3], allowed: impl Fn(V3) -> bool, weight: impl Fn(V3) -> f64) -> Option<V3> {
    const TRIES: usize = 400;
    if points.is_empty() {
        return None;
    }
    let mut best = None;
    let mut best_weight = 0.0;
    for _ in 0..TRIES {
        let p = points[d.below(points.len())];
        if !allowed(p) {
            continue;
        }
        let w = weight(p);
        if d.unit() < w {
            return Some(p);
        }
        if w > best_weight {
            best_weight = w;
            best = Some(p);
        }
    }
    best
}
