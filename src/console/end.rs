//! How the wish that a run shall end becomes its end: a state machine that is told of wishes, of the
//! guest's coming and going and of the time, and says what is to be done.
//!
//! Who asks has the guest's power button pressed, and who asks again has it stopped. What is asked of
//! nobody, as there is no guest yet or no more, is a stop at once. A stop should take no time, but may
//! have to wait for the host: then it is said for what, and who insists does without. Who asked twice
//! has insisted already.

use std::time::{Duration, Instant};

/// How long a stop may take before something is said or done about it.
pub const GRACE: Duration = Duration::from_secs(1);

/// How often a power button is pressed that the guest does not hear.
pub const PRESS: Duration = Duration::from_millis(500);

/// How long a guest that has seen the button has until it is pressed again: a system that is still
/// booting may have nobody yet to tell of it, and one that shuts down does not mind.
pub const PRESS_AGAIN: Duration = Duration::from_secs(15);

/// What somebody wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// That the guest end, by itself if it can.
    Ask,
    /// That the guest be stopped.
    Stop,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Say that the power button is pressed, and what to do if that does not help.
    SayAsked,
    /// Press the power button; or, if the guest has seen it since, say so ([`End::button_seen`]).
    Press,
    /// Stop the guest.
    Stop,
    /// Say what the stop waits for.
    SayWaiting,
    /// End the process as it is.
    Exit,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Wanted,
    Asked,
    Stopping {
        since: Instant,
    },
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct End {
    stage: Stage,
    guest: bool,
    say_asked: bool,
    stop: bool,
    press_at: Option<Instant>,
    say_at: Option<Instant>,
    exit_at: Option<Instant>,
}

impl End {
    /// Somebody wants something.
    pub fn wish(&mut self, wish: Wish, now: Instant) {
        match (self.stage, wish) {
            (Stage::Wanted, Wish::Ask) if self.guest => {
                self.stage = Stage::Asked;
                self.say_asked = true;
                self.press_at = Some(now);
            }
            (Stage::Wanted | Stage::Asked, _) => {
                let insists = (self.stage, wish) == (Stage::Asked, Wish::Ask);
                self.stage = Stage::Stopping { since: now };
                self.stop = self.guest;
                self.press_at = None;
                let at = if insists { &mut self.exit_at } else { &mut self.say_at };
                *at = Some(now + GRACE);
            }
            (Stage::Stopping { since }, _) => {
                // What only takes a moment is waited for.
                self.exit_at =
                    Some(now.max(since + GRACE).min(self.exit_at.unwrap_or(now + GRACE)));
                self.say_at = None;
            }
        }
    }

    /// The guest has seen the power button.
    pub fn button_seen(&mut self, now: Instant) {
        if self.press_at.is_some() {
            self.press_at = Some(now + PRESS_AGAIN);
        }
    }

    /// There is a guest from now on.
    pub fn guest_comes(&mut self) {
        self.guest = true;
        self.stop = matches!(self.stage, Stage::Stopping { .. });
    }

    /// It is gone.
    pub fn guest_goes(&mut self) {
        self.guest = false;
        self.stop = false;
        self.press_at = None;
    }

    /// Whether the run is to end, one way or another.
    pub fn is_wanted(&self) -> bool {
        self.stage != Stage::Wanted
    }

    /// Whether it is to end now.
    pub fn is_stopping(&self) -> bool {
        matches!(self.stage, Stage::Stopping { .. })
    }

    /// What is to be done at this time, one after the other.
    pub fn due(&mut self, now: Instant) -> Option<Act> {
        let is_due = |at: &Option<Instant>| at.is_some_and(|at| at <= now);
        if std::mem::take(&mut self.stop) {
            Some(Act::Stop)
        } else if std::mem::take(&mut self.say_asked) {
            Some(Act::SayAsked)
        } else if is_due(&self.press_at) {
            self.press_at = Some(now + PRESS);
            Some(Act::Press)
        } else if is_due(&self.exit_at) {
            self.exit_at = None;
            Some(Act::Exit)
        } else if is_due(&self.say_at) {
            self.say_at = None;
            Some(Act::SayWaiting)
        } else {
            None
        }
    }

    /// When there is next something to do, if nothing else happens.
    pub fn next(&self) -> Option<Instant> {
        [self.press_at, self.say_at, self.exit_at].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        end: End,
        now: Instant,
    }

    impl Bench {
        fn with_guest() -> Self {
            let mut bench = Self::without_guest();
            bench.end.guest_comes();
            bench
        }

        fn without_guest() -> Self {
            Self { end: End::default(), now: Instant::now() }
        }

        fn wish(&mut self, wish: Wish) -> Vec<Act> {
            self.end.wish(wish, self.now);
            self.acts()
        }

        fn acts(&mut self) -> Vec<Act> {
            std::iter::from_fn(|| self.end.due(self.now)).collect()
        }

        fn pass(&mut self, time: Duration) -> Vec<Act> {
            self.now += time;
            self.acts()
        }
    }

    #[test]
    fn nothing_happens_by_itself() {
        let mut bench = Bench::with_guest();
        assert_eq!(bench.pass(GRACE * 100), []);
        assert_eq!(bench.end.next(), None);
        assert!(!bench.end.is_wanted());
    }

    #[test]
    fn asking_presses_the_button_until_the_guest_has_gone() {
        let mut bench = Bench::with_guest();
        assert_eq!(bench.wish(Wish::Ask), [Act::SayAsked, Act::Press]);
        assert!(bench.end.is_wanted() && !bench.end.is_stopping());
        for _ in 0..3 {
            assert_eq!(bench.end.next(), Some(bench.now + PRESS));
            assert_eq!(bench.pass(PRESS), [Act::Press]);
        }
        bench.end.button_seen(bench.now);
        assert_eq!(bench.pass(PRESS_AGAIN - PRESS), []);
        assert_eq!(bench.pass(PRESS), [Act::Press]);
        bench.end.guest_goes();
        assert_eq!(bench.pass(GRACE * 100), []);
        bench.end.button_seen(bench.now);
        assert_eq!(bench.end.next(), None);
        assert!(bench.end.is_wanted(), "it is not to come again");
    }

    #[test]
    fn asking_twice_stops_and_waits_a_second_for_nobody() {
        let mut bench = Bench::with_guest();
        bench.wish(Wish::Ask);
        assert_eq!(bench.wish(Wish::Ask), [Act::Stop]);
        assert!(bench.end.is_stopping());
        bench.end.guest_goes();
        assert_eq!(bench.pass(GRACE / 2), []);
        assert_eq!(bench.wish(Wish::Ask), [], "a third time makes it neither longer nor shorter");
        assert_eq!(bench.pass(GRACE / 2), [Act::Exit]);
    }

    #[test]
    fn a_stop_says_what_it_waits_for_and_insisting_ends_it() {
        let mut bench = Bench::with_guest();
        assert_eq!(bench.wish(Wish::Stop), [Act::Stop]);
        bench.end.guest_goes();
        assert_eq!(bench.pass(GRACE), [Act::SayWaiting]);
        assert_eq!(bench.pass(GRACE * 100), [], "it waits as long as it takes");
        assert_eq!(bench.wish(Wish::Ask), [Act::Exit]);
    }

    #[test]
    fn insisting_at_once_leaves_a_moment_for_an_orderly_end() {
        let mut bench = Bench::with_guest();
        bench.wish(Wish::Stop);
        assert_eq!(bench.wish(Wish::Stop), []);
        assert_eq!(bench.pass(GRACE), [Act::Exit]);
    }

    #[test]
    fn a_wish_without_a_guest_is_remembered() {
        for wish in [Wish::Ask, Wish::Stop] {
            let mut bench = Bench::without_guest();
            assert_eq!(bench.wish(wish), []);
            assert!(bench.end.is_stopping());
            bench.end.guest_comes();
            assert_eq!(bench.acts(), [Act::Stop]);
            bench.end.guest_goes();
            assert_eq!(bench.pass(GRACE), [Act::SayWaiting]);
            assert_eq!(bench.wish(wish), [Act::Exit]);
        }
    }
}
