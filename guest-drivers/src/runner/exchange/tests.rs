//! The exchange on a cable that does as it likes.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::format;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

use vmbus::client::HvStatus;

use super::*;
use crate::memory::Pages;
use crate::platform::{Message, PlatformCounters, Ports};

#[test]
fn every_byte_of_a_frame_counts() {
    let (from, to) = (MacAddress([2, 0, 0, 0, 0, 1]), MacAddress([2, 0, 0, 0, 0, 2]));
    for len in [60, 61, 64, 67, 1514] {
        let mut frame = vec![0; len];
        fill(&mut frame, from, to, 7, 5);
        assert_eq!(frame[..HEADER], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
        assert_eq!(difference(&frame[HEADER..], 7, 5), None);
        assert_eq!(difference(&frame[HEADER..], 7, 6), Some(0));
        assert_eq!(difference(&frame[HEADER..], 8, 5), Some(8));
        for byte in HEADER..len {
            frame[byte] ^= 0x10;
            assert_eq!(difference(&frame[HEADER..], 7, 5), Some(byte - HEADER), "{len}");
            frame[byte] ^= 0x10;
        }
    }
}

/// A clock, and nothing else.
#[derive(Default)]
struct Clock(Cell<u64>);

impl Ports for Clock {}

impl Platform for Clock {
    fn memory(&self) -> Pages<'_> {
        unreachable!("an exchange takes no memory")
    }

    fn post_message(&self, _: u32, _: u32, _: &[u8]) -> HvStatus {
        HvStatus::SUCCESS
    }

    fn signal_event(&self, _: u32) {}

    fn take_message(&self) -> Option<Message> {
        None
    }

    fn idle(&self) {
        self.0.set(self.0.get() + 500_000_000);
    }

    fn now(&self) -> u64 {
        self.0.set(self.0.get() + 1000);
        self.0.get()
    }

    fn line(&self, _: &str) {}

    fn counters(&self) -> PlatformCounters {
        PlatformCounters::default()
    }
}

/// What becomes of a frame, given how many its NIC has sent before.
type Mischief = dyn Fn(u64, Vec<u8>) -> Vec<Vec<u8>>;

/// Frames that have been sent and not received yet, to either end.
type Cable = [RefCell<VecDeque<Vec<u8>>>; 2];

struct End<'c> {
    identity: Identity,
    side: usize,
    cable: &'c Cable,
    mischief: &'c Mischief,
    sent: u64,
}

impl NicDriver for End<'_> {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn has_link(&mut self) -> bool {
        true
    }

    fn send(&mut self, frame: &[u8]) -> Result<bool, crate::net::NicError> {
        let mut inbox = self.cable[1 - self.side].borrow_mut();
        inbox.extend((self.mischief)(self.sent, frame.to_vec()));
        self.sent += 1;
        Ok(true)
    }

    fn publish(&mut self) -> Result<(), crate::net::NicError> {
        Ok(())
    }

    fn poll(&mut self, received: &mut dyn FnMut(&[u8])) -> Result<usize, crate::net::NicError> {
        let frames = self.cable[self.side].take();
        frames.iter().for_each(|frame| received(frame));
        Ok(frames.len())
    }

    fn is_ready(&self) -> bool {
        !self.cable[self.side].borrow().is_empty()
    }

    fn rest(&mut self) -> Result<(), crate::net::NicError> {
        Ok(())
    }

    fn wake(&mut self) {}

    fn quiet(&mut self) {}

    fn counters(&self) -> NicCounters {
        NicCounters::default()
    }
}

/// Exchanges 1000 frames each way, the first of which suffer `mischief`.
fn exchange(mischief: &Mischief) -> Result<String, RunError> {
    let identity =
        |last| Identity { driver: "test", mac: MacAddress([2, 0, 0, 0, 0, last]), mtu: 1500 };
    let (cable, honest) = (Cable::default(), |_, frame| vec![frame]);
    let end = |side, mischief| End {
        identity: identity(side as u8),
        side,
        cable: &cable,
        mischief,
        sent: 0,
    };
    let (mut first, mut second) = (end(0, mischief), end(1, &honest));
    let exchange = Exchange {
        nic: 0,
        peer: 1,
        len: 100,
        depth: 8,
        frames: 1000,
        time: u64::MAX,
        spin: 9,
        seed: 1,
    };
    let mut object = exchange.run(&Clock::default(), [&mut first, &mut second])?;
    Ok(object.line().to_string())
}

#[track_caller]
fn expect(line: Result<String, RunError>, fields: &str) {
    let line = line.unwrap();
    assert!(line.contains(fields), "no {fields} in {line}");
}

#[test]
fn a_good_cable() {
    let fields = r#""sent":2000,"frames":2000,"lost":0,"duplicates":0,"reordered":0,"#;
    expect(exchange(&(|_, frame| vec![frame])), fields);
}

#[test]
fn frames_that_are_lost_are_counted_and_do_not_hold_it_up() {
    let lossy = |number, frame| if number % 10 == 3 { vec![] } else { vec![frame] };
    let fields = r#""sent":2000,"frames":1900,"lost":100,"duplicates":0,"reordered":0,"#;
    expect(exchange(&(lossy)), fields);
    // All that are under way at the end.
    let cut = |number, frame| if number >= 990 { vec![] } else { vec![frame] };
    expect(exchange(&(cut)), r#""sent":2000,"frames":1990,"lost":10,"#);
}

#[test]
fn frames_that_come_twice_or_late_are_counted() {
    let twice =
        |number, frame: Vec<u8>| if number < 7 { vec![frame.clone(), frame] } else { vec![frame] };
    expect(exchange(&(twice)), r#""frames":2000,"lost":0,"duplicates":7,"reordered":0,"#);
    let held = RefCell::new(None);
    let late = move |number, frame: Vec<u8>| match number {
        4 => {
            held.replace(Some(frame));
            vec![]
        }
        6 => vec![frame, held.take().unwrap()],
        _ => vec![frame],
    };
    expect(exchange(&(late)), r#""frames":2000,"lost":0,"duplicates":0,"reordered":1,"#);
}

#[test]
fn what_is_not_ours_is_counted_and_what_is_damaged_is_told() {
    let with_others = |number, frame: Vec<u8>| {
        let mut other = frame.clone();
        other[12] = 8;
        if number == 5 { vec![other, frame[..99].to_vec(), vec![1, 2], frame] } else { vec![frame] }
    };
    expect(
        exchange(&(with_others)),
        r#""lost":0,"duplicates":0,"reordered":0,"damaged":0,"foreign":2,"#,
    );
    for byte in [14, 22, 50, 99] {
        let damage = move |number, mut frame: Vec<u8>| {
            if number == 5 {
                frame[byte] ^= 1;
            }
            vec![frame]
        };
        let error = exchange(&(damage)).unwrap_err().to_string();
        let said = format!(
            " has arrived with another byte {} than it was sent with",
            if byte == 14 { 22 } else { byte }
        );
        assert!(error.contains(&said), "{error}");
    }
}

#[test]
fn a_cable_that_is_cut_is_told() {
    let silent = |number, frame| if number < 50 { vec![frame] } else { vec![] };
    assert_eq!(exchange(&(silent)), Err(RunError::Silence { nic: 0, peer: 1 }));
}

#[test]
fn what_does_not_fit_is_not_begun() {
    let exchange =
        |len| Exchange { nic: 0, peer: 1, len, depth: 1, frames: 1, time: 1, spin: 0, seed: 0 };
    let cable = Cable::default();
    let identity = |mtu| Identity { driver: "test", mac: MacAddress([2; 6]), mtu };
    let honest = |_, frame| vec![frame];
    let end = |side, mtu| End {
        identity: identity(mtu),
        side,
        cable: &cable,
        mischief: &honest,
        sent: 0,
    };
    let (mut first, mut second) = (end(0, 1500), end(1, 100));
    let refused = exchange(115).run(&Clock::default(), [&mut first, &mut second]).map(|_| ());
    assert_eq!(refused, Err(RunError::FrameLength { len: 115, longest: 114 }));
    assert_eq!((first.sent, second.sent), (0, 0));
}
