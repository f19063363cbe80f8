//! The file system under raft-engine, with a fuse: the first failed write or sync blows it, and from then on nothing
//! reaches the disk any more.
//!
//! raft-engine panics when a sync fails, inside locks, and truncates and syncs again when it is dropped. With the fuse it
//! sees a quiet success instead, and [`super::LogEngine`] asks the fuse after every call, before it believes anything. A
//! sync that failed must never be repeated: the kernel may have dropped the pages and would report success.

use raft_engine::env::{DefaultFileSystem, FileSystem, Handle, Permission, WriteExt};
use std::io::{Error, ErrorKind, Result, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, OnceLock};

type InnerHandle = <DefaultFileSystem as FileSystem>::Handle;
type InnerReader = <DefaultFileSystem as FileSystem>::Reader;
type InnerWriter = <DefaultFileSystem as FileSystem>::Writer;

/// Remembers the first failure.
#[derive(Debug, Default)]
pub(super) struct Fuse {
    reason: OnceLock<String>,
    #[cfg(test)]
    pub(super) faults: super::testing::Faults,
}

impl Fuse {
    /// Why nothing is written any more, if so.
    pub(super) fn blown(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// Stops all further writing. The first reason is kept.
    pub(super) fn blow(&self, reason: impl Into<String>) {
        let _ = self.reason.set(reason.into());
    }

    /// The error of everything that comes after.
    fn refuse(&self) -> Result<()> {
        match self.blown() {
            None => Ok(()),
            Some(why) => Err(Error::other(format!("the log stopped earlier: {why}"))),
        }
    }

    fn watch<T>(&self, what: &str, result: Result<T>) -> Result<T> {
        if let Err(e) = &result {
            self.blow(format!("{what} failed: {e}"));
        }
        result
    }
}

pub(super) struct FusedFs {
    pub(super) fuse: Arc<Fuse>,
}

pub(super) struct FusedHandle {
    inner: Arc<InnerHandle>,
    fuse: Arc<Fuse>,
    /// Opened for reading, hence not the last file of its queue.
    sealed: bool,
}

pub(super) struct FusedWriter {
    inner: InnerWriter,
    fuse: Arc<Fuse>,
}

impl FusedFs {
    fn handle(&self, inner: InnerHandle, sealed: bool) -> FusedHandle {
        FusedHandle { inner: Arc::new(inner), fuse: self.fuse.clone(), sealed }
    }
}

impl FileSystem for FusedFs {
    type Handle = FusedHandle;
    type Reader = InnerReader;
    type Writer = FusedWriter;

    fn create<P: AsRef<Path>>(&self, path: P) -> Result<FusedHandle> {
        self.fuse.refuse()?;
        let inner = self.fuse.watch("creating a log file", DefaultFileSystem.create(path))?;
        Ok(self.handle(inner, false))
    }

    fn open<P: AsRef<Path>>(&self, path: P, perm: Permission) -> Result<FusedHandle> {
        Ok(self.handle(DefaultFileSystem.open(path, perm)?, perm == Permission::ReadOnly))
    }

    fn delete<P: AsRef<Path>>(&self, path: P) -> Result<()> {
        self.fuse.refuse()?;
        DefaultFileSystem.delete(path)
    }

    fn rename<P: AsRef<Path>>(&self, src_path: P, dst_path: P) -> Result<()> {
        self.fuse.refuse()?;
        DefaultFileSystem.rename(src_path, dst_path)
    }

    fn new_reader(&self, handle: Arc<FusedHandle>) -> Result<InnerReader> {
        DefaultFileSystem.new_reader(handle.inner.clone())
    }

    fn new_writer(&self, handle: Arc<FusedHandle>) -> Result<FusedWriter> {
        Ok(FusedWriter { inner: DefaultFileSystem.new_writer(handle.inner.clone())?, fuse: self.fuse.clone() })
    }
}

impl Handle for FusedHandle {
    /// Called by recovery only, to cut off a torn tail.
    fn truncate(&self, offset: usize) -> Result<()> {
        if self.sealed {
            // raft-engine's tolerant recovery would cut the end of a file in the middle of its queue here. Such a file was
            // synced when it was closed, so this is no torn tail.
            return Err(Error::new(ErrorKind::InvalidData, "the end of a finished log file is damaged"));
        }
        self.inner.truncate(offset)
    }

    fn file_size(&self) -> Result<usize> {
        self.inner.file_size()
    }

    fn sync(&self) -> Result<()> {
        if self.fuse.blown().is_some() {
            return Ok(());
        }
        #[cfg(test)]
        let result = self.fuse.faults.sync().and_then(|()| self.inner.sync());
        #[cfg(not(test))]
        let result = self.inner.sync();
        if let Err(e) = result {
            self.fuse.blow(format!("fdatasync of the log failed: {e}"));
        }
        Ok(())
    }
}

impl Seek for FusedWriter {
    fn seek(&mut self, pos: SeekFrom) -> Result<u64> {
        self.inner.seek(pos)
    }
}

impl Write for FusedWriter {
    fn write(&mut self, buf: &[u8]) -> Result<usize> {
        self.fuse.refuse()?;
        #[cfg(test)]
        let result = match self.fuse.faults.write(buf) {
            Ok(()) => self.inner.write(buf),
            // Half of it reaches the disk.
            Err(e) => self.inner.write(&buf[..buf.len() / 2]).and(Err(e)),
        };
        #[cfg(not(test))]
        let result = self.inner.write(buf);
        self.fuse.watch("writing the log", result)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl WriteExt for FusedWriter {
    fn truncate(&mut self, offset: usize) -> Result<()> {
        if self.fuse.blown().is_some() {
            return Ok(());
        }
        let result = self.inner.truncate(offset);
        self.fuse.watch("truncating a log file", result)
    }

    /// A file system may have no room to set aside in advance, or not know how: the write itself will tell.
    fn allocate(&mut self, offset: usize, size: usize) -> Result<()> {
        self.fuse.refuse()?;
        self.inner.allocate(offset, size)
    }
}
