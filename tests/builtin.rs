//! The built-in guest in real partitions: a virtual machine's, where there is a KVM, and a hosted
//! one.

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use common::partitions;
use tempfile::TempDir;

fn partita(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_partita")).args(arguments).output().unwrap()
}

/// What a run that ended well printed.
fn output(arguments: &[&str]) -> String {
    let output = partita(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{:?}\n{text}\n{errors}", output.status);
    let said = errors.lines().all(|line| line.starts_with("partita: the guest runs in "));
    assert!(said, "{errors}");
    text
}

fn image(folder: &TempDir, name: &str, bytes: u64) -> String {
    let path = folder.path().join(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn the_guest_works_on_its_disks() {
    for partition in partitions() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (image(&folder, "a", 2 << 20), image(&folder, "b", 1 << 20));
        let text = output(&[
            "run",
            "--partition",
            partition,
            "--builtin",
            "identify; verify disk=1 bytes=256k bs=4k; bench time=30ms depth=4",
            "--disk",
            &format!("path={first}"),
            "--disk",
            &format!("path={second},controller=2,lun=5"),
            "--memory",
            "64M",
        ]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].contains(r#""event":"connected","bus":"vmbus","version":"5.3","offers":2"#)
        );
        assert!(text.contains(r#""disk":0,"driver":"storvsc","controller":0,"lun":0,"#), "{text}");
        assert!(text.contains(r#""disk":1,"driver":"storvsc","controller":1,"lun":5,"#), "{text}");
        assert!(
            text.contains(r#""result":"verify","disk":1,"driver":"storvsc","bytes":262144,"#),
            "{text}"
        );
        assert!(text.contains(
            r#""result":"bench","disk":0,"driver":"storvsc","pattern":"rand","rw":"read","bs":4096"#
        ));
        let bytes = std::fs::read(&second).unwrap();
        assert_ne!(bytes[..8], [0; 8]);
        assert_eq!(bytes[256 << 10..], [0; 768 << 10]);
        assert!(std::fs::read(&first).unwrap().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn processors_share_the_work() {
    if !partitions().contains(&"kvm") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = format!("path={}", image(&folder, "a", 2 << 20));
    let run = |cpus: &str, work: &str| {
        output(&[
            "run",
            "--partition",
            "kvm",
            "--cpus",
            cpus,
            "--memory",
            "64M",
            "--disk",
            &disk,
            "--builtin",
            work,
        ])
    };
    // Each part is written and read by its own processor, and together they are the whole.
    let sum = |text: &str| {
        let (_, rest) = text.split_once(r#""checksum":""#).unwrap();
        rest[..16].to_owned()
    };
    let (alone, shared) =
        (run("1", "verify bytes=1M bs=4k"), run("3", "verify bytes=1M bs=4k vps=3"));
    assert!(shared.contains(r#""channels":3}"#), "{shared}");
    assert!(shared.contains(r#""bytes":1048576,"bs":4096,"depth":24,"vps":3,"#), "{shared}");
    assert_eq!(sum(&alone), sum(&shared));
    let text = run("8", "bench vps=8 depth=2 time=50ms");
    assert!(text.contains(r#""depth":16,"vps":8,"#), "{text}");
    // A processor that has nothing to do sleeps.
    let text = run("2", "bench time=20ms");
    assert!(text.contains(r#""depth":1,"vps":1,"#), "{text}");

    let refused = partita(&["run", "--builtin", "identify", "--cpus", "9"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(said, "partita: the built-in guest has 1 to 8 virtual processors, not 9\n");
}

#[test]
fn a_hosted_partition_has_one_processor() {
    let run = ["run", "--partition", "hosted", "--builtin", "identify", "--cpus", "2"];
    let refused = partita(&run);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(said, "partita: --cpus 2: a hosted partition has one virtual processor\n");
}

#[test]
fn a_hosted_partition_has_no_interrupt_controllers() {
    let run = ["run", "--partition", "hosted", "--builtin", "identify", "--irqchip", "user"];
    let refused = partita(&run);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(said, "partita: --irqchip user: a hosted partition has no interrupt controllers\n");
}

#[test]
fn interrupt_controllers_may_be_in_user_space() {
    let split =
        hypervisor::kvm::open().is_ok_and(|kvm| hypervisor::kvm::lacking_split(&kvm).is_none());
    if !split || !partitions().contains(&"kvm") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = format!("path={},attach=ide", image(&folder, "a", 1 << 20));
    let work = "verify bytes=256k bs=64k";
    let run = ["run", "--partition", "kvm", "--irqchip", "user", "--stats", "--memory", "64M"];
    let ended = partita(&[&run[..], &["--builtin", work, "--disk", &disk]].concat());
    let (text, counted) =
        (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success(), "{text}{counted}");
    assert!(
        text.contains(r#""result":"verify","disk":0,"driver":"ide-dma","bytes":262144,"#),
        "{text}"
    );
    // Each of the disk's interrupts has gone by the I/O APIC.
    let messages = counted
        .split_once("interrupt controllers: in user space, ")
        .and_then(|(_, rest)| rest.split_once(" messages")?.0.parse().ok());
    assert!(messages.is_some_and(|messages: u32| messages >= 8), "{counted}");
}

#[test]
fn an_ide_disk_is_worked_on_by_dma_and_by_pio() {
    for partition in partitions() {
        let folder = tempfile::tempdir().unwrap();
        let (ide, scsi) = (image(&folder, "a", 2 << 20), image(&folder, "b", 1 << 20));
        let text = output(&[
            "run",
            "--partition",
            partition,
            "--builtin",
            // A pattern by PIO is slow in a virtual machine: an exit for each four bytes.
            "identify; verify disk=1 bytes=1M; checksum disk=1 transfer=pio bytes=1M bs=16k;
             verify disk=1 bytes=16k transfer=pio; bench disk=1 transfer=pio time=30ms",
            "--disk",
            &format!("path={ide},attach=ide,channel=1,device=1"),
            "--disk",
            &format!("path={scsi}"),
            "--memory",
            "64M",
        ]);
        let disk = r#""disk":1,"driver":"ide-dma","controller":1,"lun":1,"vendor":"ATA","#;
        assert!(text.contains(disk), "{text}");
        let sums: Vec<&str> = text
            .lines()
            .filter_map(|line| line.split_once(r#""checksum":"#)?.1.split(',').next())
            .collect();
        assert_eq!(sums.len(), 3, "{text}");
        assert_eq!(sums[0], sums[1], "what was written by DMA is not what PIO reads");
        assert!(text.contains(r#""result":"bench","disk":1,"driver":"ide-pio""#), "{text}");
        let bytes = std::fs::read(&ide).unwrap();
        assert_ne!(bytes[..8], [0; 8]);
        assert_eq!(bytes[1 << 20..], [0; 1 << 20]);
        assert!(std::fs::read(&scsi).unwrap().iter().all(|byte| *byte == 0));
    }
}

/// The number in a field of a line of JSON.
fn number(line: &str, key: &str) -> u64 {
    let (_, rest) = line.split_once(&format!("\"{key}\":")).unwrap();
    rest.split([',', '}']).next().unwrap().parse().unwrap()
}

#[test]
fn nics_exchange_frames() {
    for partition in partitions() {
        let folder = tempfile::tempdir().unwrap();
        let capture = folder.path().join("frames.pcapng");
        let first = format!("backend=switch:a,mac=02:00:00:00:00:01,pcap={}", capture.display());
        let text = output(&[
            "run",
            "--partition",
            partition,
            "--builtin",
            "identify; exchange frames=500; exchange nic=1 peer=0 len=64 depth=1 frames=20;
             exchange nic=2 peer=3 frames=500; exchange nic=2 peer=3 depth=1 spin=0us frames=20;
             exchange nic=3 peer=1 frames=100",
            "--nic",
            &first,
            "--nic",
            "backend=switch:a",
            "--nic",
            "attach=e1000,backend=switch:a,mac=02:00:00:00:00:03",
            "--nic",
            "attach=e1000,backend=switch:a",
            "--memory",
            "64M",
        ]);
        let nic = r#""nic":0,"driver":"netvsc","mac":"02:00:00:00:00:01","mtu":1500,"link":"up""#;
        assert!(text.contains(nic), "{text}");
        let nic = r#""nic":2,"driver":"e1000","mac":"02:00:00:00:00:03","mtu":1500,"link":"up""#;
        assert!(text.contains(nic), "{text}");
        let results: Vec<&str> =
            text.lines().filter(|line| line.contains(r#""result":"exchange""#)).collect();
        assert_eq!(results.len(), 5, "{text}");
        for (line, frames) in results.into_iter().zip([1000, 40, 1000, 40, 200]) {
            assert_eq!((number(line, "frames"), number(line, "lost")), (frames, 0), "{line}");
            assert_eq!((number(line, "duplicates"), number(line, "reordered")), (0, 0), "{line}");
        }
        // Both directions have been where the capture is.
        let captured = std::fs::metadata(&capture).unwrap().len();
        assert!(captured > 1000 * 1500 + 40 * 64, "{captured} bytes");
    }
}

#[test]
fn what_goes_wrong_in_the_guest_is_the_programs_status() {
    for partition in partitions() {
        for (work, status, said) in [
            ("verify disk=7", 1, "there is no disk 7; there are 0, counted from 0"),
            ("checksum disk=0", 1, "there is no disk 0; there are 0, counted from 0"),
            ("exchange", 1, "there is no NIC 0; there are 0, counted from 0"),
        ] {
            let work = format!("--builtin={work}");
            let output = partita(&["run", "--partition", partition, &work, "--memory", "32M"]);
            assert_eq!(output.status.code(), Some(status), "{output:?}");
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(text.contains(&format!(r#"{{"error":"{said}"}}"#)), "{text}");
        }
    }
}

#[test]
fn the_demo_shows_what_happened_and_leaves_nothing() {
    for partition in partitions() {
        let text = output(&["demo", "--partition", partition]);
        for part in [
            "host",
            "VMBus, version 5.3",
            "1 opened: a SCSI controller with 1 disk",
            "compared",
            "an IDE controller on the PCI bus, with 1 disk",
            "the first 4 MiB, read by storvsc, IDE DMA, IDE PIO: checksum ",
            &format!("4 KiB at random, {partition} "),
            "a second  signals  interrupts ",
            "storvsc, 32 at a time",
            "0 and 1 by netvsc, 2 and 3 by e1000, on a virtual switch",
            " frames have arrived, every byte of each compared; none lost",
            &format!("1500 bytes each, {partition} "),
            "netvsc, 32 at a time",
            "e1000, 32 at a time",
            "netvsc/e1000, 32 at a time",
            "the guest switched itself off",
        ] {
            assert!(text.contains(part), "no '{part}' in\n{text}");
        }
        let json = output(&["demo", "--json", "--partition", partition]);
        assert!(json.starts_with('{') && json.ends_with("}\n") && json.contains(r#""ok":true"#));
        assert!(json.contains(&format!(r#""partition":"{partition}""#)), "{json}");
        assert!(json.contains(r#""kept":null"#), "{json}");
        for driver in ["storvsc", "ide-dma", "ide-pio"] {
            let bench = format!(r#""driver":"{driver}","bs":4096,"depth":1,"nanoseconds":"#);
            assert!(json.contains(&bench), "no '{bench}' in {json}");
        }
        for driver in ["netvsc", "e1000"] {
            let exchange = format!(
                r#""driver":"{driver}","peer_driver":"{driver}","len":1500,"depth":1,"nanoseconds":"#
            );
            assert!(json.contains(&exchange), "no '{exchange}' in {json}");
        }
    }
    let json = output(&["demo", "--json", "--keep"]);
    let (_, rest) = json.split_once(r#""kept":""#).unwrap();
    let kept = Path::new(rest.split('"').next().unwrap());
    assert_eq!(std::fs::metadata(kept).unwrap().len(), 64 << 20);
    std::fs::remove_file(kept).unwrap();
}

/// A run in a hosted partition whose guest has begun to work and will not end soon, and the number
/// of its guest's process.
fn long_run(folder: &TempDir) -> (Child, String) {
    let disk = format!("path={}", image(folder, "a", 1 << 20));
    let work = ["run", "--partition", "hosted", "--builtin", "bench time=60s", "--disk", &disk];
    let mut run = Command::new(env!("CARGO_BIN_EXE_partita"))
        .args(work)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(run.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains(r#""begin":"bench"#)), "it never began");
    let children = format!("/proc/{0}/task/{0}/children", run.id());
    let guest = std::fs::read_to_string(children).unwrap();
    let guest: Vec<&str> = guest.split_whitespace().collect();
    assert_eq!(guest.len(), 1, "{guest:?}");
    let guest = guest[0].to_owned();
    (run, guest)
}

#[test]
fn a_killed_guest_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let (run, guest) = long_run(&folder);
    assert!(Command::new("kill").args(["-KILL", &guest]).status().unwrap().success());
    let output = run.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = errors.lines().collect();
    assert_eq!(lines.len(), 2, "{errors}");
    assert!(lines[0].contains("the guest runs in a hosted partition"), "{errors}");
    assert_eq!(lines[1], "partita: the guest's process was ended by signal 9");
}

#[test]
fn a_guest_does_not_outlive_its_root() {
    let folder = tempfile::tempdir().unwrap();
    let (mut run, guest) = long_run(&folder);
    run.kill().unwrap();
    run.wait().unwrap();
    // Whoever inherits it may take a while to bury it.
    let stat = format!("/proc/{guest}/stat");
    while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        std::thread::yield_now();
    }
}

#[test]
fn a_guest_is_no_command_for_people() {
    let output = partita(&["hosted-guest", "identify"]);
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("this command is how partita starts a guest"), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(!String::from_utf8(partita(&["--help"]).stdout).unwrap().contains("hosted-guest"));
}

#[test]
fn a_hosted_partition_has_its_bounds() {
    for (arguments, refusal) in [
        (
            &["run", "--partition", "hosted", "--kernel", "k"][..],
            "--partition hosted: a kernel needs KVM; only --builtin runs without",
        ),
        (
            &["run", "--partition", "hosted", "--builtin", "identify", "--synic", "user"],
            "--synic: a hosted partition has one Hyper-V interface only, its root's",
        ),
        (
            &["run", "--partition", "hosted", "--builtin", "identify", "--cpus", "2"],
            "--cpus 2: a hosted partition has one virtual processor",
        ),
    ] {
        let output = partita(arguments);
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("partita: {refusal}\n"));
    }
}
