//! User-mode networking: the guest behind the host's own addresses, with no rights needed.
//!
//! The work is passt's, a process of its own that turns the guest's frames into sockets of the host
//! and back. It answers ARP, DHCP, NDP, DHCPv6 and DNS, and leads ports of the host to the guest.
//! It is started with one end of a [`Stream`] and ends with it, however its machine ends. Signals to
//! the machine's process group, a terminal's Ctrl-C or what `timeout` sends, do not reach it: a guest
//! that shuts down has its network until it is off.
//!
//! `unsafe` runs a system call between fork and exec: no other way hands a descriptor to one child alone.
#![allow(unsafe_code)]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::io::FdFlags;

use super::stream::Stream;
use super::{Link, Network, Offloads, Queue, QueueConfig};
use crate::uring::Uring;

/// How long passt may take to answer for the first time.
const PATIENCE: Duration = Duration::from_secs(10);

/// A protocol of which ports can be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Which protocol.
    pub protocol: Protocol,
    /// The host's address.
    pub address: IpAddr,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

impl Forward {
    /// As passt's options `-t` and `-u` take it.
    fn to_argument(self) -> String {
        format!("{}/{}:{}", self.address, self.host, self.guest)
    }
}

/// Why there is no user-mode network.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's message says it")]
pub enum StartError {
    #[error(
        "user-mode networking takes the program passt, which is not there; as root, run: apt install passt"
    )]
    Missing,
    #[error("cannot start {program}")]
    Start { program: String, source: io::Error },
    #[error("cannot make what passt is started with")]
    Prepare { source: io::Error },
    #[error("passt ended: {said}")]
    Ended { said: String },
    #[error("passt does not answer")]
    Silent { source: io::Error },
}

/// The first descriptor that is not one of a program's standard ones.
const FIRST_DESCRIPTOR: i32 = 3;

/// See the module's documentation.
#[derive(Debug)]
pub struct User {
    stream: Stream,
    passt: Child,
}

impl User {
    /// Starts passt for a guest with packets of up to `mtu` bytes, and waits until it answers.
    pub fn start(mtu: u16, forwards: &[Forward]) -> Result<Self, StartError> {
        Self::start_program("passt", mtu, forwards)
    }

    fn start_program(program: &str, mtu: u16, forwards: &[Forward]) -> Result<Self, StartError> {
        let failed = |source: io::Error| StartError::Prepare { source };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let inherited = rustix::io::fcntl_dupfd_cloexec(&theirs, FIRST_DESCRIPTOR)
            .map_err(|errno| failed(errno.into()))?;
        let number = inherited.as_raw_fd();
        let said = rustix::fs::memfd_create("passt", MemfdFlags::CLOEXEC);
        let said = File::from(said.map_err(|errno| failed(errno.into()))?);
        let mut command = Command::new(program);
        command.args(["--foreground", "--quiet", "--stderr"]);
        command.arg("--fd").arg(number.to_string());
        let keep = move || {
            // SAFETY: the parent has the descriptor open until the program runs, and so has its child.
            let inherited = unsafe { BorrowedFd::borrow_raw(number) };
            Ok(rustix::io::fcntl_setfd(inherited, FdFlags::empty())?)
        };
        // Only passt keeps this one: another child would keep the stream open when passt has ended.
        // SAFETY: the call is one that a signal handler may make.
        unsafe { command.pre_exec(keep) };
        command.arg("--mtu").arg(mtu.to_string());
        for (protocol, option) in [(Protocol::Tcp, "-t"), (Protocol::Udp, "-u")] {
            let mut any = false;
            for forward in forwards.iter().filter(|forward| forward.protocol == protocol) {
                command.arg(option).arg(forward.to_argument());
                any = true;
            }
            if !any {
                command.args([option, "none"]);
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(said.try_clone().map_err(failed)?);
        command.process_group(0);
        let passt = command.spawn().map_err(|source| {
            // What the host says of a program that is nowhere is about the last folder it looked in.
            match find(program, std::env::var_os("PATH").as_deref()) {
                None => StartError::Missing,
                Some(path) => StartError::Start { program: path.display().to_string(), source },
            }
        })?;
        drop((theirs, inherited));
        let mut user = Self { stream: Stream::new(ours, "user", mtu).map_err(failed)?, passt };
        match user.stream.probe() {
            Ok(()) => Ok(user),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(StartError::Silent { source: error })
            }
            Err(_) => {
                let _ = user.passt.wait();
                Err(StartError::Ended { said: reason(said) })
            }
        }
    }

    /// The process's number, for those who look after processes.
    pub fn pid(&self) -> u32 {
        self.passt.id()
    }
}

impl Stream {
    /// Asks who has an address that only a gateway answers for, and waits for any frame.
    fn probe(&self) -> io::Result<()> {
        let mut socket = self.socket();
        let sender = [0x52, 0x54, 0, 0, 0, 1];
        let mut frame = vec![0, 0, 0, 42];
        frame.extend([0xff; 6]);
        frame.extend(sender);
        // ARP over Ethernet for IPv4: a request, whose sender has no address yet (RFC 5227).
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(sender);
        frame.extend([0; 10]);
        frame.extend([192, 0, 2, 99]);
        socket.write_all(&frame)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut len = [0; 4];
        socket.read_exact(&mut len)?;
        let mut answer = vec![0; u32::from_be_bytes(len).min(1 << 16) as usize];
        socket.read_exact(&mut answer)?;
        socket.set_read_timeout(None)
    }
}

/// Where the program passt is, if it is there.
pub fn installed() -> Option<PathBuf> {
    find("passt", std::env::var_os("PATH").as_deref())
}

/// The first file with the program's name in the folders of `path`; a name with a slash is a file's
/// itself. Folders that cannot be looked into have nothing.
fn find(program: &str, path: Option<&OsStr>) -> Option<PathBuf> {
    let is_file = |file: &PathBuf| file.metadata().is_ok_and(|metadata| metadata.is_file());
    if program.contains('/') {
        return Some(PathBuf::from(program)).filter(is_file);
    }
    std::env::split_paths(path?).map(|folder| folder.join(program)).find(is_file)
}

/// What the program said last.
fn reason(mut said: File) -> String {
    let mut text = String::new();
    let read = said.rewind().and_then(|()| said.read_to_string(&mut text));
    let last = text.lines().rfind(|line| !line.trim().is_empty() && !line.contains("syslog"));
    match (read, last) {
        (Ok(_), Some(line)) => line.trim().to_owned(),
        _ => "it did not say why".to_owned(),
    }
}

impl Network for User {
    fn link(&self) -> Link {
        self.stream.link()
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.stream.set_receive_offloads(offloads)
    }

    fn queue(&self, config: QueueConfig, uring: &mut Uring) -> io::Result<Box<dyn Queue>> {
        self.stream.queue(config, uring)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // It would end by itself with its socket, which a queue may still hold.
        let _ = self.passt.kill();
        let _ = self.passt.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use rustix::process::{Pid, getpgid};

    use super::*;

    #[test]
    fn a_missing_program_is_named_with_what_helps() {
        let error = User::start_program("/nonexistent/passt", 1500, &[]).unwrap_err();
        assert!(matches!(error, StartError::Missing));
        assert!(error.to_string().ends_with("apt install passt"));
    }

    #[test]
    fn signals_to_the_machines_process_group_do_not_reach_it() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("passt");
        // Sends a frame, and lives as long as the socket.
        let script = "#!/bin/bash\n\
            while [ \"$1\" != --fd ]; do shift; done\n\
            printf '\\0\\0\\0\\16..............' >&$2\n\
            exec cat <&$2 >/dev/null\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        // As long as another test's child is about to exec, the script may be open in it for writing.
        let user = loop {
            match User::start_program(program.to_str().unwrap(), 1500, &[]) {
                Err(StartError::Start { source, .. })
                    if source.kind() == io::ErrorKind::ExecutableFileBusy => {}
                user => break user.unwrap(),
            }
        };
        let pid = Pid::from_raw(user.pid().cast_signed()).unwrap();
        assert_eq!(getpgid(Some(pid)), Ok(pid));
        assert_ne!(getpgid(None), Ok(pid));
    }

    #[test]
    fn a_program_is_looked_for_where_files_are() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("a/passt")).unwrap();
        std::fs::create_dir(at("b")).unwrap();
        std::fs::write(at("c"), "").unwrap();
        let path = std::env::join_paths([at("none"), at("a"), at("c"), at("b")]).unwrap();
        // To start what is a folder is not permitted, and it is no program.
        assert_eq!(find("passt", Some(&path)), None);
        assert_eq!(find("passt", None), None);
        std::fs::write(at("b/passt"), "").unwrap();
        assert_eq!(find("passt", Some(&path)), Some(at("b/passt")));
        let named = at("b/passt").display().to_string();
        assert_eq!(find(&named, None), Some(at("b/passt")));
        // It is there and is none.
        let error = User::start_program(&named, 1500, &[]).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot start {named}"));
    }

    #[test]
    fn a_program_that_ends_is_quoted() {
        let error = User::start_program("/bin/false", 1500, &[]).unwrap_err();
        assert_eq!(error.to_string(), "passt ended: it did not say why");
        let error = User::start_program("/bin/ls", 1500, &[]).unwrap_err();
        assert!(matches!(&error, StartError::Ended { said } if said.contains("ls")), "{error}");
    }

    /// If they did, the stream would stay open though its program has ended.
    #[test]
    fn other_children_do_not_keep_the_programs_end() {
        let children = std::thread::spawn(|| -> Vec<Child> {
            (0..40).map(|_| Command::new("sleep").arg("60").spawn().unwrap()).collect()
        });
        let mut said = Vec::new();
        while !children.is_finished() || said.is_empty() {
            said.push(User::start_program("/bin/false", 1500, &[]).unwrap_err().to_string());
        }
        for mut child in children.join().unwrap() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(said.iter().all(|said| said == "passt ended: it did not say why"), "{said:?}");
    }

    #[test]
    fn forwards_are_written_as_passt_wants_them() {
        let address = "127.0.0.1".parse().unwrap();
        let forward = Forward { protocol: Protocol::Tcp, address, host: 2222, guest: 22 };
        assert_eq!(forward.to_argument(), "127.0.0.1/2222:22");
    }
}
