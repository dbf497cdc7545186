//! Writes cpio archives in the "newc" format, the one Linux unpacks as its initramfs.
//!
//! The kernel accepts several archives one after the other, so an initramfs can be put together from layers
//! that are made once and layers that are made for one call; a later layer's file replaces an earlier one's.
//! Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

/// File types of `st_mode`, from stat(2).
const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// Archives end on a multiple of this, so that the next one starts aligned.
const BLOCK: u64 = 512;

/// An archive under construction. Paths in it are relative to the root and have no leading slash;
/// the folders above an entry are made on the way.
pub(crate) struct Archive {
    out: BufWriter<File>,
    written: u64,
    next_inode: u32,
    folders: BTreeSet<String>,
}

impl Archive {
    /// Begins an archive in a new file.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file =
            File::create(path).with_context(|| format!("could not create {}", path.display()))?;
        Ok(Self {
            out: BufWriter::with_capacity(1 << 20, file),
            written: 0,
            next_inode: 1,
            folders: BTreeSet::new(),
        })
    }

    /// Adds a folder and those above it, each once.
    pub(crate) fn folder(&mut self, path: &str) -> Result<()> {
        if path.is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        self.folder_above(path)?;
        self.folders.insert(path.to_owned());
        Ok(self.entry(path, DIRECTORY | 0o755, (0, 0), &[])?)
    }

    /// Adds a file with this content.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.folder_above(path)?;
        self.entry(path, REGULAR | mode, (0, 0), content)
            .with_context(|| format!("could not archive {path}"))
    }

    /// Adds a copy of a file of the host, with its mode; a symbolic link is followed.
    pub(crate) fn copy(&mut self, source: &Path, path: &str) -> Result<()> {
        let read = || -> io::Result<(u32, Vec<u8>)> {
            Ok((source.metadata()?.permissions().mode() & 0o7777, std::fs::read(source)?))
        };
        let (mode, content) =
            read().with_context(|| format!("could not read {}", source.display()))?;
        self.file(path, mode, &content)
    }

    /// Adds a symbolic link.
    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.folder_above(path)?;
        Ok(self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes())?)
    }

    /// Adds a character device.
    pub(crate) fn character_device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.folder_above(path)?;
        Ok(self.entry(path, CHARACTER_DEVICE | 0o600, (major, minor), &[])?)
    }

    /// Ends the archive and returns its size in bytes.
    pub(crate) fn finish(mut self) -> Result<u64> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.pad(BLOCK)?;
        self.out.flush()?;
        Ok(self.written)
    }

    fn folder_above(&mut self, path: &str) -> Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.folder(parent),
            None => Ok(()),
        }
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(|_| {
            io::Error::new(io::ErrorKind::FileTooLarge, "a cpio entry holds less than 4 GiB")
        })?;
        let name_size = path.len() + 1;
        // Magic, inode, mode, uid, gid, links, mtime, size, device, device node, name size, checksum.
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{size:08x}{:08x}{:08x}{major:08x}{minor:08x}{name_size:08x}{:08x}",
            self.next_inode, 0, 0, 1, 0, 0, 0, 0,
        );
        self.next_inode += 1;
        self.write(header.as_bytes())?;
        self.write(path.as_bytes())?;
        self.write(&[0])?;
        self.pad(4)?;
        self.write(content)?;
        self.pad(4)
    }

    fn pad(&mut self, alignment: u64) -> io::Result<()> {
        let missing = self.written.next_multiple_of(alignment) - self.written;
        self.write(&[0; BLOCK as usize][..missing as usize])
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads (name, mode, content) of each entry, as the kernel would.
    fn entries(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        let mut at = 0;
        loop {
            let field = |index: usize| {
                let start = at + 6 + index * 8;
                u32::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16)
                    .unwrap()
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name =
                std::str::from_utf8(&bytes[at + 110..at + 110 + name_size - 1]).unwrap().to_owned();
            let content = (at + 110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return found;
            }
            found.push((name, mode, bytes[content..content + size].to_vec()));
            at = (content + size).next_multiple_of(4);
        }
    }

    #[test]
    fn an_archive_reads_back_with_each_folder_once_and_before_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.cpio");
        let mut archive = Archive::create(&path).unwrap();
        archive.file("etc/lab/one", 0o755, b"12345").unwrap();
        archive.file("etc/lab/two", 0o644, b"").unwrap();
        archive.symlink("bin/sh", "busybox").unwrap();
        let size = archive.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(size, bytes.len() as u64);
        assert_eq!(size % BLOCK, 0);
        let names: Vec<_> = entries(&bytes)
            .into_iter()
            .map(|(name, mode, content)| (name, mode, content.len()))
            .collect();
        let expected = [
            ("etc", 0o040_755, 0),
            ("etc/lab", 0o040_755, 0),
            ("etc/lab/one", 0o100_755, 5),
            ("etc/lab/two", 0o100_644, 0),
            ("bin", 0o040_755, 0),
            ("bin/sh", 0o120_777, 7),
        ];
        assert_eq!(names, expected.map(|(name, mode, size)| (name.to_owned(), mode, size)));
    }
}
