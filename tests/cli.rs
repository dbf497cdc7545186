//! Bad input gets one line that says what, where and what would be right, ends the program with 1,
//! and creates or changes nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

use backends::file::{FileDisk, OpenOptions};
use tempfile::TempDir;

fn partita(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_partita")).args(arguments).output().unwrap()
}

/// The one line on standard error.
fn refusal(arguments: &[&str]) -> String {
    let output = partita(arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(output.stdout.is_empty());
    let line = text.trim_end();
    line.strip_prefix("partita: ").unwrap_or_else(|| panic!("{line}")).to_owned()
}

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        fs::write(files.at("good.img"), vec![0; 1 << 20]).unwrap();
        fs::write(files.at("empty.img"), []).unwrap();
        fs::write(files.at("odd.img"), [0; 1000]).unwrap();
        fs::write(files.at("text"), "this is no kernel\n".repeat(1000)).unwrap();
        files
    }

    fn at(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// Runs with this disk and a kernel that is none, which is not looked at before the disk.
    fn refused_disk(&self, disk: &str) -> String {
        refusal(&["run", "--kernel", &self.at("text"), "--disk", disk])
    }
}

#[test]
fn a_kernel_or_the_builtin_guest() {
    let line = refusal(&["run", "--kernel", "k", "--builtin", "identify"]);
    assert!(line.starts_with("the argument '--kernel <FILE>' cannot be used with"), "{line}");
    assert!(line.contains("--builtin"), "{line}");
    assert_eq!(refusal(&["run"]), "nothing to run; say --kernel FILE or --builtin WORK");
    let work = "identify;".repeat(500) + "identify";
    let line = refusal(&["run", "--builtin", &work]);
    assert!(line.contains("takes 4064 bytes of work, not 4508"), "{line}");
}

#[test]
fn work_that_is_none() {
    let files = Files::new();
    let disk = format!("path={}", files.at("good.img"));
    for (work, line) in [
        ("", "there is no work; say identify, verify, checksum, bench, exchange or hostile"),
        ("-d", "'-d' is no work; say identify, verify, checksum, bench, exchange or hostile"),
        (
            "verify; dance",
            "'dance' is no work; say identify, verify, checksum, bench, exchange or hostile",
        ),
        ("bench depth=0", "depth=0 is not possible; depth is 1 to 64"),
        ("bench bs=1G", "bs=1G is not possible; bs is a multiple of 512 up to 128k"),
    ] {
        let builtin = format!("--builtin={work}");
        let serial = format!("file:{}", files.at("console.log"));
        let said = refusal(&["run", &builtin, "--disk", &disk, "--serial", &serial]);
        assert_eq!(said, format!("--builtin: {line}"));
    }
    assert!(!Path::new(&files.at("console.log")).exists(), "nothing is created");
    assert!(fs::read(files.at("good.img")).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn a_full_standard_output_is_one_line() {
    for command in [&["doctor"][..], &["demo", "--partition", "hosted"]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_partita"))
            .args(command)
            .stdout(full)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.starts_with("partita: cannot write to standard output: "), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[test]
fn disks() {
    let files = Files::new();
    let line = |name: &str| files.refused_disk(&format!("path={}", files.at(name)));
    assert!(line("none.img").ends_with("none.img does not exist"), "{}", line("none.img"));
    assert!(line("empty.img").contains("is empty; give it a size"), "{}", line("empty.img"));
    assert!(line("odd.img").ends_with("1000 bytes long, which is not a multiple of 512"));
    assert!(line(".").contains("is a directory"), "{}", line("."));
    let twice = format!("path={0},lun=3", files.at("good.img"));
    let other = format!("path={},lun=3,readonly=on", files.at("text"));
    let line = refusal(&["run", "--kernel", "k", "--disk", &twice, "--disk", &other]);
    assert!(line.contains("text") && line.contains("multiple of 512"), "{line}");
}

#[test]
fn block_sizes_and_what_they_do_not_fit() {
    let files = Files::new();
    let path = files.at("good.img");
    let refused = |rest: &str| files.refused_disk(&format!("path={path},{rest}"));
    assert_eq!(
        refused("attach=ide,block-size=4096"),
        "--disk: an IDE disk has sectors of 512 bytes, and this one has blocks of 4096; say \
         attach=scsi, or block-size=512 if what is on it was made for that"
    );
    assert!(refused("block-size=1k").contains("block-size is 512 or 4096"));
    assert!(refused("discard=on").contains("discard is unmap or off"));
    fs::write(files.at("good.img"), [0; 512 * 9]).unwrap();
    let line = refused("block-size=4096");
    assert!(line.ends_with("4608 bytes long, which is not a multiple of 4096"), "{line}");
}

#[test]
fn two_disks_in_one_place() {
    let files = Files::new();
    fs::write(files.at("second.img"), vec![0; 4096]).unwrap();
    let one = format!("path={},lun=3", files.at("good.img"));
    let two = format!("path={},lun=3", files.at("second.img"));
    let line = refusal(&["run", "--kernel", "k", "--disk", &one, "--disk", &two]);
    assert_eq!(line, "--disk on controller 0: LUN 3 is taken");
}

#[test]
fn a_locked_disk() {
    let files = Files::new();
    let path = files.at("good.img");
    let holder = FileDisk::open(Path::new(&path), &OpenOptions::default()).unwrap();
    let line = files.refused_disk(&format!("path={path}"));
    assert!(line.ends_with("is in use by another process"), "{line}");
    drop(holder);
}

#[test]
fn a_kernel_that_is_none() {
    let files = Files::new();
    let serial = files.at("console.log");
    let to_file = format!("file:{serial}");
    let line = refusal(&["run", "--kernel", &files.at("text"), "--serial", &to_file]);
    assert!(line.contains("a 64-bit Linux bzImage or ELF vmlinux is needed"), "{line}");
    let line = refusal(&["run", "--kernel", &files.at("nowhere"), "--serial", &to_file]);
    assert!(line.contains("cannot read") && line.contains("nowhere"), "{line}");
    // Nothing is created, and a disk that is all right is as it was.
    assert!(!Path::new(&serial).exists());
    let disk = files.at("good.img");
    let before = fs::metadata(&disk).unwrap();
    files.refused_disk(&format!("path={disk}"));
    let after = fs::metadata(&disk).unwrap();
    assert_eq!(after.modified().unwrap(), before.modified().unwrap());
    assert_eq!((after.len(), after.blocks()), (before.len(), before.blocks()));
}

#[test]
fn what_is_no_file_is_no_kernel_and_no_initrd() {
    let files = Files::new();
    let fifo = files.at("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
    for path in [&fifo, &files.at(".")] {
        let line = refusal(&["run", "--kernel", path]);
        assert_eq!(
            line,
            format!("{path} is no regular file, as a kernel and an initrd have to be")
        );
    }
}

#[test]
fn options() {
    assert!(refusal(&["run", "--kernel", "k", "--memory", "1M"]).contains("too little"));
    assert!(refusal(&["run", "--kernel", "k", "--memory", "lots"]).contains("not a size"));
    assert!(refusal(&["run", "--kernel", "k", "--frobnicate"]).contains("--frobnicate"));
    let line = refusal(&["run", "--kernel", "k", "--disk", "/nonexistent/a.img"]);
    assert_eq!(line, "disk image /nonexistent/a.img does not exist");
    assert!(refusal(&["run", "--kernel", "k", "--disk", "a=b.img"]).contains("path=VALUE"));
    assert!(refusal(&["run"]).contains("--kernel"));
    assert!(refusal(&["fly"]).contains("fly"));
    assert!(refusal(&["run", "--kernel", "k", "--serial", "tty"]).contains("stdio, null or file:"));
    assert!(refusal(&["run", "--kernel", "k", "--synic", "both"]).contains("auto, kernel or user"));
    assert!(refusal(&["run", "--kernel", "k", "--on-reset", "halt"]).contains("restart or exit"));
    let line = refusal(&["run", "--builtin", "identify", "--on-reset", "exit"]);
    assert!(line.contains("--builtin") && line.contains("--on-reset"), "{line}");
}

#[test]
fn help_has_examples() {
    for arguments in
        [&["--help"][..], &["run", "--help"], &["demo", "--help"], &["doctor", "--help"]]
    {
        let output = partita(arguments);
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("Example"), "{text}");
    }
}

#[test]
fn switches() {
    let files = Files::new();
    let refused = |switches: &[&str]| {
        let serial = format!("file:{}", files.at("console.log"));
        let kernel = files.at("text");
        let mut arguments = vec!["run", "--kernel", &kernel, "--serial", &serial];
        arguments.extend(["--nic", "backend=switch:lan"]);
        switches.iter().for_each(|switch| arguments.extend(["--switch", switch]));
        refusal(&arguments)
    };
    assert_eq!(refused(&["name=lan", "name=lan"]), "--switch lan: it is given twice");
    assert_eq!(
        refused(&["name=wan"]),
        "--switch wan: no NIC is on it; one is with --nic backend=switch:wan"
    );
    let path = files.at("text");
    assert_eq!(
        refused(&[&format!("name=lan,uplink=socket:{path}")]),
        format!(
            "--switch lan: {path} is there and is no socket; name one that does not exist, or \
             another machine's"
        )
    );
    let line = refused(&[&format!("name=lan,uplink=socket:{}", files.at("none/lan"))]);
    assert!(line.starts_with("--switch lan: cannot use the socket "), "{line}");
    // What was made before something else was refused is gone.
    let path = files.at("lan.sock");
    let line = refused(&[&format!("name=lan,uplink=socket:{path}")]);
    assert!(line.contains("a 64-bit Linux bzImage or ELF vmlinux is needed"), "{line}");
    assert!(!Path::new(&path).exists());
    assert!(!Path::new(&files.at("console.log")).exists());
}
