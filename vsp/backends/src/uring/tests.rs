use super::*;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

fn nop(value: u64) -> Entry {
    opcode::Nop::new().build().user_data(Token::new(Tag(7), value).user_data())
}

#[test]
fn a_token_keeps_its_parts() {
    let token = Token::new(Tag(0xabcd), 0x1234_5678_9abc);
    assert_eq!(token.tag(), Tag(0xabcd));
    assert_eq!(token.value(), 0x1234_5678_9abc);
    assert_eq!(Token::new(Tag(1), u64::MAX).tag(), Tag(1));
}

#[test]
fn more_operations_than_the_queue_holds() {
    let mut uring = Uring::new(8).unwrap();
    for value in 0..100 {
        // SAFETY: a nop points to nothing.
        unsafe { uring.push(&nop(value)) }.unwrap();
    }
    uring.submit_and_wait(32).unwrap();
    let mut seen = Vec::new();
    while seen.len() < 100 {
        uring.submit_and_wait(1).unwrap();
        while let Some(cqe) = uring.next() {
            assert_eq!(cqe.token.tag(), Tag(7));
            seen.push(cqe.token.value());
        }
    }
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..100));
    assert_eq!(uring.in_flight(), 0);
    assert_eq!(uring.counters().sqes, 100);
    assert_eq!(uring.counters().cqes, 100);
}

#[test]
fn an_idle_ring_makes_no_system_call() {
    let mut uring = Uring::new(8).unwrap();
    for _ in 0..10 {
        uring.submit().unwrap();
    }
    assert_eq!(uring.counters().enters, 0);
    uring.submit_and_wait_timeout(1, Duration::from_millis(1)).unwrap();
    assert_eq!(uring.counters(), Counters { enters: 1, sqes: 0, cqes: 0 });
}

/// Every ring of the bell is heard though nobody reads the eventfd, and the poll stays armed.
#[test]
fn a_doorbell_is_heard_again_and_again() {
    let mut uring = Uring::new(8).unwrap();
    let bell = Doorbell::new(EventFd::new(0).unwrap(), Token::new(Tag::WORKER, 1));
    bell.arm(&mut uring).unwrap();
    uring.submit().unwrap();
    for _ in 0..50 {
        bell.get_ref().write(1).unwrap();
        let mut heard = 0;
        while heard == 0 {
            uring.submit_and_wait(1).unwrap();
            while let Some(cqe) = uring.next() {
                bell.heard(&cqe, &mut uring).unwrap();
                heard += 1;
            }
        }
    }
    assert_eq!(uring.counters().sqes, 1);
    assert_eq!(bell.get_ref().read().unwrap(), 50);
}

/// A ring from another thread while this one sleeps, and one before the bell was armed.
#[test]
fn a_doorbell_wakes_a_sleeping_worker() {
    let eventfd = Arc::new(EventFd::new(0).unwrap());
    eventfd.write(1).unwrap();
    let bell = Doorbell::new(eventfd.try_clone().unwrap(), Token::new(Tag::WORKER, 1));
    let mut uring = Uring::new(8).unwrap();
    bell.arm(&mut uring).unwrap();
    uring.submit_and_wait(1).unwrap();
    assert_eq!(uring.next().unwrap().token, Token::new(Tag::WORKER, 1));

    let ringer = std::thread::spawn({
        let eventfd = Arc::clone(&eventfd);
        move || {
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(1));
                eventfd.write(1).unwrap();
            }
        }
    });
    let mut heard = 0;
    while !ringer.is_finished() {
        uring.submit_and_wait_timeout(1, Duration::from_millis(100)).unwrap();
        while let Some(cqe) = uring.next() {
            bell.heard(&cqe, &mut uring).unwrap();
            heard += 1;
        }
    }
    ringer.join().unwrap();
    assert!((1..=20).contains(&heard), "heard {heard} times");
    assert_eq!(eventfd.read().unwrap(), 21);
}

/// An overflowing completion queue ends a multishot poll; the doorbell arms itself again.
#[test]
fn a_doorbell_survives_a_full_completion_queue() {
    let mut uring = Uring::new(1).unwrap();
    let bell = Doorbell::new(EventFd::new(0).unwrap(), Token::new(Tag::WORKER, 1));
    bell.arm(&mut uring).unwrap();
    uring.submit().unwrap();
    for value in 0..20 {
        // SAFETY: a nop points to nothing.
        unsafe { uring.push(&nop(value)) }.unwrap();
        uring.submit().unwrap();
        bell.get_ref().write(1).unwrap();
        uring.submit().unwrap();
    }
    let mut nops = 0;
    for _ in 0..100 {
        uring.submit_and_wait_timeout(1, Duration::from_millis(1)).unwrap();
        while let Some(cqe) = uring.next() {
            match cqe.token.tag() {
                Tag::WORKER => bell.heard(&cqe, &mut uring).unwrap(),
                _ => nops += 1,
            }
        }
    }
    assert_eq!(nops, 20);
    bell.get_ref().write(1).unwrap();
    uring.submit_and_wait_timeout(1, Duration::from_secs(10)).unwrap();
    assert_eq!(uring.next().unwrap().token, Token::new(Tag::WORKER, 1));
}

/// The kernel has let go of the buffer once the ring is gone.
#[test]
fn dropping_a_ring_ends_what_is_under_way() {
    let bell = EventFd::new(0).unwrap();
    let mut buffer = Box::new(0u64);
    let mut uring = Uring::new(8).unwrap();
    let fd = types::Fd(bell.as_raw_fd());
    let read = opcode::Read::new(fd, (&raw mut *buffer).cast(), 8).build();
    // SAFETY: the buffer outlives the ring, which is dropped below.
    unsafe { uring.push(&read) }.unwrap();
    uring.submit().unwrap();
    drop(uring);
    bell.write(5).unwrap();
    assert_eq!(*buffer, 0);
    assert_eq!(bell.read().unwrap(), 5);
}

#[test]
fn files_are_registered_while_there_is_room() {
    let bell = EventFd::new(0).unwrap();
    // SAFETY: the eventfd lives until the end of the test.
    let fd = unsafe { BorrowedFd::borrow_raw(bell.as_raw_fd()) };
    let mut uring = Uring::new(8).unwrap();
    let targets: Vec<_> = (0..FILE_SLOTS + 1).map(|_| uring.register_file(fd)).collect();
    assert_eq!(targets.iter().filter(|target| target.is_registered()).count(), 64);
    let mut count = 0u64;
    for target in [targets[5], targets[64]] {
        bell.write(3).unwrap();
        let read = opcode::Read::new(target.fd(), (&raw mut count).cast(), 8).build();
        // SAFETY: `count` is read after the completion only.
        unsafe { uring.push(&read.flags(target.flags())) }.unwrap();
        uring.submit_and_wait(1).unwrap();
        assert_eq!(uring.next().unwrap().result, 8);
        assert_eq!(count, 3);
    }
}

/// Says when it goes.
struct Kept(std::rc::Rc<std::cell::Cell<bool>>);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.set(true);
    }
}

fn kept() -> (Kept, std::rc::Rc<std::cell::Cell<bool>>) {
    let gone = std::rc::Rc::new(std::cell::Cell::new(false));
    (Kept(std::rc::Rc::clone(&gone)), gone)
}

/// A read of an eventfd that nobody writes to.
fn endless(uring: &mut Uring, event: &EventFd, into: &mut u64, tag: Tag) {
    let fd = types::Fd(event.as_raw_fd());
    let read = opcode::Read::new(fd, std::ptr::from_mut(into).cast(), 8).build();
    // SAFETY: the callers' numbers outlive their rings.
    unsafe { uring.push_waiting(read, Token::new(tag, 1)) }.unwrap();
}

#[test]
fn what_a_queue_leaves_behind_goes_with_its_ring() {
    let (event, mut number) = (EventFd::new(0).unwrap(), 0);
    let mut uring = Uring::new(8).unwrap();
    endless(&mut uring, &event, &mut number, Tag(3));
    uring.submit().unwrap();
    let remains = uring.remains();
    let (value, gone) = kept();
    remains.keep(value);
    assert!(!gone.get(), "the kernel may use it");
    assert!(remains.unheard(Tag(3)).is_none());
    drop(uring);
    assert!(gone.get());
    // What comes after the ring is nobody's any more.
    let (value, gone) = kept();
    remains.keep(value);
    assert!(gone.get());
}

#[test]
fn how_operations_ended_that_nobody_heard_of_is_told_to_their_queue() {
    let (event, mut number) = (EventFd::new(0).unwrap(), 0);
    let mut uring = Uring::new(8).unwrap();
    endless(&mut uring, &event, &mut number, Tag(3));
    // SAFETY: a nop points to nothing.
    unsafe { uring.push(&nop(5)) }.unwrap();
    let remains = uring.remains();
    drop(uring);
    let told = |tag| -> Vec<_> {
        let cqes = remains.unheard(tag).unwrap();
        cqes.iter().map(|cqe| (cqe.token.value(), cqe.result)).collect()
    };
    assert_eq!(told(Tag(3)), [(1, -libc::ECANCELED)]);
    assert_eq!(told(Tag(7)), [(5, 0)]);
    assert_eq!(told(Tag(4)), []);
}

/// As on kernels that cannot cancel what they are not told the name of.
#[test]
fn what_may_wait_for_ever_is_cancelled_by_name() {
    let (event, mut number) = (EventFd::new(0).unwrap(), 0);
    let bell = Doorbell::new(EventFd::new(0).unwrap(), Token::new(Tag::WORKER, 1));
    let mut uring = Uring::new(8).unwrap();
    bell.arm(&mut uring).unwrap();
    endless(&mut uring, &event, &mut number, Tag(3));
    uring.submit().unwrap();
    assert_eq!(uring.in_flight(), 2);
    uring.cancel_waits().unwrap();
    while uring.in_flight() > 0 {
        uring.submit_and_wait(1).unwrap();
        while uring.next().is_some() {}
    }
}
