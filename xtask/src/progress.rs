//! Progress of long steps on stderr: a spinner on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A step under way. Dropping it takes its spinner away.
pub(crate) struct Step {
    spinner: Option<ProgressBar>,
}

/// Announces a step that may take a while.
pub(crate) fn step(what: impl Into<String>) -> Step {
    let what = what.into();
    let spinner = if std::io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        let spinner = ProgressBar::new_spinner().with_style(style).with_message(what);
        spinner.enable_steady_tick(Duration::from_millis(120));
        Some(spinner)
    } else {
        eprintln!("{what}");
        None
    };
    Step { spinner }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }
}
