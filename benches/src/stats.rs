//! Several runs, one figure.

/// Figures of repeated runs.
#[derive(Clone, Debug, Default)]
pub struct Runs(Vec<f64>);

impl Runs {
    /// None yet.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds a run.
    pub fn push(&mut self, figure: f64) {
        self.0.push(figure);
    }

    /// The middle one; 0 if there was none.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match (sorted.len() / 2, sorted.len() % 2) {
            (0, 0) => 0.0,
            (middle, 0) => f64::midpoint(sorted[middle - 1], sorted[middle]),
            (middle, _) => sorted[middle],
        }
    }

    /// The least.
    pub fn least(&self) -> f64 {
        self.0.iter().copied().min_by(f64::total_cmp).unwrap_or_default()
    }

    /// The most.
    pub fn most(&self) -> f64 {
        self.0.iter().copied().max_by(f64::total_cmp).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::Runs;

    #[test]
    fn the_middle_of_an_even_number_is_between() {
        let mut runs = Runs::default();
        assert!(runs.median().abs() < f64::EPSILON);
        for figure in [5.0, 1.0, 3.0] {
            runs.push(figure);
        }
        assert!((runs.median() - 3.0).abs() < f64::EPSILON);
        runs.push(4.0);
        assert!((runs.median() - 3.5).abs() < f64::EPSILON);
        assert!((runs.least() - 1.0).abs() < f64::EPSILON);
        assert!((runs.most() - 5.0).abs() < f64::EPSILON);
    }
}
