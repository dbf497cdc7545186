//! Where machines meet: a Unix socket in the file system, at which the first listens, and to which
//! the others connect.
//!
//! A socket's file stays when its listener has died. Nobody answers there then, and whoever comes
//! next takes the place. Two that come at once must not both find it empty, so each looks while it
//! holds a lock on the folder, for a moment.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

/// Why machines cannot meet.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's message says it")]
pub enum MeetError {
    #[error("{} is there and is no socket; name one that does not exist, or another machine's", path.display())]
    NoSocket { path: PathBuf },
    #[error("cannot use the socket {}", path.display())]
    Socket { path: PathBuf, source: io::Error },
}

/// What a machine finds.
#[derive(Debug)]
pub(super) enum Meeting {
    /// It is the first: others will connect.
    First(First),
    /// Another was there.
    Another(UnixStream),
}

/// The first's place. Dropping it leaves it, however early that is: the file goes, and while the
/// listener is still there, so that it is its own.
#[derive(Debug)]
pub(super) struct First {
    /// Does not block.
    pub(super) listener: UnixListener,
    path: PathBuf,
}

impl Drop for First {
    fn drop(&mut self) {
        let _lock = lock(&self.path);
        let _ = fs::remove_file(&self.path);
    }
}

/// Looks whether there is somebody at `path`, and takes the place otherwise.
pub(super) fn meet(path: &Path) -> Result<Meeting, MeetError> {
    let _lock = lock(path);
    let failed = |source| MeetError::Socket { path: path.to_owned(), source };
    match fs::metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(MeetError::NoSocket { path: path.to_owned() });
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(socket) => return Ok(Meeting::Another(socket)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    if let Err(error) = listener.set_nonblocking(true) {
        // Nobody else has the lock yet.
        let _ = fs::remove_file(path);
        return Err(failed(error));
    }
    Ok(Meeting::First(First { listener, path: path.to_owned() }))
}

/// Keeps others from looking as well until it is dropped. Somebody who keeps the folder locked does not
/// keep machines from meeting.
fn lock(path: &Path) -> Option<File> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = File::open(folder.unwrap_or(Path::new("."))).ok()?;
    for _ in 0..100 {
        if flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Some(folder);
        }
        thread::sleep(Duration::from_millis(10));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_first_and_a_dead_ones_place_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lan");
        let Ok(Meeting::First(first)) = meet(&path) else { panic!("nobody was there") };
        assert!(matches!(meet(&path), Ok(Meeting::Another(_))));
        drop(first);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let Ok(Meeting::First(second)) = meet(&path) else { panic!("it was dead") };
        assert!(matches!(meet(&path), Ok(Meeting::Another(_))));
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn of_many_that_come_at_once_one_is_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lan");
        // A dead one's.
        drop(UnixListener::bind(&path).unwrap());
        let met: Vec<_> = thread::scope(|scope| {
            let all: Vec<_> = (0..8).map(|_| scope.spawn(|| meet(&path).unwrap())).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let first = met.iter().filter(|met| matches!(met, Meeting::First(_)));
        assert_eq!(first.count(), 1);
    }

    #[test]
    fn what_is_no_socket_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "mine").unwrap();
        for path in [&path, folder.path()] {
            let error = meet(path).unwrap_err();
            assert!(matches!(error, MeetError::NoSocket { .. }), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        let error = meet(&folder.path().join("none/lan")).unwrap_err();
        assert!(error.to_string().starts_with("cannot use the socket "), "{error}");
    }
}
