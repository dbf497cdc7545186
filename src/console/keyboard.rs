//! What is typed for the guest: a thread that reads standard input, and a bounded buffer between it
//! and the serial port. The escape is found before anything waits for the guest, which may never read.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read};
use rustix::stdio::stdin;

use super::escape::{Escape, Key};
use super::terminal;

/// Bytes that wait for the guest to read them.
const LIMIT: usize = 64 << 10;

/// How often the program looks whether it has come to the foreground.
const BACKGROUND: Duration = Duration::from_millis(200);

/// What waits for the guest. It outlives a restart, as what is typed meanwhile does on a real machine.
#[derive(Default)]
pub struct Input {
    waiting: Mutex<VecDeque<u8>>,
    taken: Condvar,
}

impl Input {
    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills `room` from the front, and says how much that was.
    pub fn take(&self, room: &mut [u8]) -> usize {
        let mut waiting = self.lock();
        let count = waiting.len().min(room.len());
        for (to, byte) in room.iter_mut().zip(waiting.drain(..count)) {
            *to = byte;
        }
        drop(waiting);
        if count > 0 {
            self.taken.notify_one();
        }
        count
    }

    /// Adds what there is room for, and loses the rest, as a keyboard does.
    fn type_keys(&self, keys: impl Iterator<Item = u8>) {
        let mut waiting = self.lock();
        let room = LIMIT.saturating_sub(waiting.len());
        waiting.extend(keys.take(room));
    }

    /// Waits until there is room for `bytes`, and adds them.
    fn pour(&self, bytes: &[u8]) {
        let mut waiting = self.lock();
        while waiting.len() + bytes.len() > LIMIT {
            waiting = self.taken.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        waiting.extend(bytes);
    }
}

/// Reads until there is nothing more to come. `pass` is called when the guest has something to read,
/// and `act` with what the user wants of the program. A pipe or a file is the guest's as it is.
pub fn run(input: &Input, pass: impl Fn(), act: impl Fn(Key)) {
    let mut buffer = [0; 256];
    let mut escape = terminal::is_there().then(Escape::default);
    let mut background = false;
    loop {
        let mut descriptors = [PollFd::from_borrowed_fd(stdin(), PollFlags::IN)];
        // Whatever cannot be polled is read.
        if poll(&mut descriptors, None) == Err(Errno::INTR) {
            continue;
        }
        if escape.is_some() {
            if !terminal::is_ours() {
                background = true;
                thread::sleep(BACKGROUND);
                continue;
            }
            if std::mem::take(&mut background) {
                terminal::resume();
            }
        }
        let read = match read(stdin(), &mut buffer) {
            Ok(0) => return,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(Errno::INTR | Errno::AGAIN) => continue,
            Err(_) => return,
        };
        match &mut escape {
            None => input.pour(read),
            Some(escape) => {
                let keys: Vec<_> = read.iter().map(|&key| escape.key(key)).collect();
                keys.iter()
                    .filter(|key| matches!(key, Key::End | Key::Help))
                    .for_each(|&key| act(key));
                input.type_keys(keys.into_iter().flat_map(Key::bytes));
            }
        }
        pass();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_nobody_reads_are_bounded_and_the_first_are_kept() {
        let input = Input::default();
        input.type_keys(b"abc".iter().copied());
        for _ in 0..3 {
            input.type_keys(std::iter::repeat_n(b'k', LIMIT));
        }
        assert_eq!(input.lock().len(), LIMIT);
        let mut room = [0; 4];
        assert_eq!(input.take(&mut room), 4);
        assert_eq!(room, *b"abck");
    }

    #[test]
    fn what_is_poured_waits_for_room_and_arrives_whole() {
        let input = Input::default();
        let all: Vec<u8> = (0..LIMIT * 3).map(|n| (n % 251) as u8).collect();
        thread::scope(|scope| {
            scope.spawn(|| all.chunks(200).for_each(|chunk| input.pour(chunk)));
            let (mut came, mut room) = (Vec::<u8>::new(), [0; 16]);
            while came.len() < all.len() {
                let count = input.take(&mut room);
                came.extend(&room[..count]);
                thread::yield_now();
            }
            assert!(came == all);
        });
    }
}
