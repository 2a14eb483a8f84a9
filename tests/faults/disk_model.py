"""What a disk has of the files in some folders, beside the real files, and what a power cut leaves of them.

A model after SQLite's crash tests and LazyFS: file contents and folder entries are on the disk for sure only once
fsync or fdatasync of that very file or folder has returned. What was written since may be there or not, by pages of
4 KiB, by sectors of 512 bytes within a page, in any order; so may each new, changed or removed name. A file that was
never synced may be empty, or show blocks of other files where a file system does not zero them. A failed sync writes
any part of what it should, and leaves the pages clean: a later sync writes only what was changed after it (Rebello et
al., ATC 2020).
"""

import contextlib
import errno
import os
import stat
from pathlib import Path

PAGE = 4096
SECTOR = 512


class File:
    """One inode."""

    def __init__(self, path):
        self.descriptor = os.open(path, os.O_RDONLY)  # its content outlives its name
        self.durable = b""
        self.clean = b""
        """What the kernel believes to be on the disk."""
        self.was_synced = False

    def content(self):
        return os.pread(self.descriptor, 1 << 30, 0)

    def dirty_pages(self, content):
        clean = self.clean
        if content == clean:
            return []
        return [at for at in range(0, len(content), PAGE) if content[at : at + PAGE] != clean[at : at + PAGE]]

    def persist(self, at, data):
        grown = self.durable.ljust(at + len(data), b"\0")
        self.durable = grown[:at] + data + grown[at + len(data) :]


class Folder:
    def __init__(self):
        self.names = {}
        """name -> inode, as it is."""
        self.durable = {}
        self.pending = []
        """Changes since the last sync: each {name: inode or None}, kept or lost as one."""
        self.is_clean = False
        """A sync has failed and nothing was changed since."""


class Disk:
    """The model.

    Args:
        rng: Of the trial.
        folders: Whose entries are watched, and the files in them.
        has_garbage: Whether blocks that were never written may show what deleted files had in them.
    """

    def __init__(self, rng, *folders, has_garbage=False):
        self.rng = rng
        self.has_garbage = has_garbage
        self.folders = {Path(folder): Folder() for folder in folders}
        self.files = {}
        self.fail_in = None
        """After so many syncs one fails."""
        self.num_failed = 0
        self.garbage = {}
        """Offset -> pages that were there in deleted files."""

    # -- what happens

    @contextlib.contextmanager
    def watching(self):
        """Stand in for the kernel's syncs, and see what is cut off."""
        real = os.fsync, os.fdatasync, os.ftruncate

        def truncate(descriptor, size):
            real[2](descriptor, size)
            self.look()
            file = self.files.get(os.fstat(descriptor).st_ino)
            if file is not None and size < len(file.clean):
                file.clean = file.clean[: size - size % PAGE]  # what is written there again is dirty again

        os.fsync = os.fdatasync = self._sync
        os.ftruncate = truncate
        try:
            yield self
        finally:
            os.fsync, os.fdatasync, os.ftruncate = real

    def look(self):
        """See which names have come and gone."""
        for path, folder in self.folders.items():
            try:
                with os.scandir(path) as entries:
                    names = {entry.name: entry.inode() for entry in entries}
            except FileNotFoundError:
                names = {}
            if names == folder.names:
                continue
            gone = {name: inode for name, inode in folder.names.items() if names.get(name) != inode}
            for name, inode in names.items():
                if folder.names.get(name) == inode:
                    continue
                if inode not in self.files and not (path / name).is_dir():
                    self.files[inode] = File(path / name)
                change = {name: inode}
                for old in [old for old, its in gone.items() if its == inode]:  # renamed
                    change[old] = None
                    del gone[old]
                gone.pop(name, None)  # replaced
                folder.pending.append(change)
            folder.pending += [{name: None} for name in gone]
            for inode in gone.values():
                if inode in self.files:
                    self.discard(self.files[inode].content())
            folder.names = names
            folder.is_clean = False

    def discard(self, content):
        """Blocks with this content are free."""
        if self.has_garbage:
            for at in range(0, len(content), PAGE):
                self.garbage.setdefault(at, []).append(content[at : at + PAGE])

    def _sync(self, descriptor):
        self.look()
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.fail_in = None
                self.num_failed += 1
                self._fail(descriptor)
                raise OSError(errno.EIO, "the disk did not take it")
        folder = self._folder(descriptor)
        if folder is not None:
            if not folder.is_clean:
                folder.durable, folder.pending = dict(folder.names), []
            return
        file = self.files.get(os.fstat(descriptor).st_ino)
        if file is None:
            return
        content = file.content()
        file.durable = file.durable[: len(content)]
        for at in file.dirty_pages(content):
            file.persist(at, content[at : at + PAGE])
        file.clean, file.was_synced = content, True

    def _fail(self, descriptor):
        folder = self._folder(descriptor)
        if folder is not None:
            folder.is_clean = True
            return
        file = self.files.get(os.fstat(descriptor).st_ino)
        if file is not None:
            content = file.content()
            for at in file.dirty_pages(content):
                if self.rng.random() < 0.5:
                    file.persist(at, content[at : at + PAGE])
            file.clean = content

    def _folder(self, descriptor):
        info = os.fstat(descriptor)
        if not stat.S_ISDIR(info.st_mode):
            return None
        return next((folder for path, folder in self.folders.items() if path.stat().st_ino == info.st_ino), None)

    def write_back(self):
        """The kernel writes some of what is dirty, when it likes."""
        for file in self.files.values():
            content = file.content()
            for at in file.dirty_pages(content):
                if self.rng.random() < 0.3:
                    self._tear(file, at, content)

    def _tear(self, file, at, content):
        """Persist a page, or some of its sectors."""
        if self.rng.random() < 0.7:
            file.persist(at, content[at : at + PAGE])
            return
        for sector in range(at, min(at + PAGE, len(content)), SECTOR):
            if self.rng.random() < 0.5:
                file.persist(sector, content[sector : sector + SECTOR])

    # -- the cut

    def cut(self, path, target):
        """Make in `target` what a power cut leaves of a folder."""
        self.look()
        rng = self.rng
        folder = self.folders[Path(path)]
        keeps = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        names = dict(folder.durable)
        pending = folder.pending[:]
        rng.shuffle(pending)
        for change in pending:
            if rng.random() < keeps:
                names.update(change)
        target.mkdir()
        for name, inode in names.items():
            if inode is not None and inode in self.files:
                (target / name).write_bytes(self._what_is_left(self.files[inode]))

    def _what_is_left(self, file):
        rng = self.rng
        content = file.content()
        keeps = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        if not file.was_synced and rng.random() < 0.1:
            return b""
        for at in file.dirty_pages(content):
            if rng.random() < keeps:
                self._tear(file, at, content)
            elif not file.was_synced and not any(file.durable[at : at + PAGE]) and rng.random() < 0.7:
                for page in self.garbage.get(at, ())[:1]:
                    file.persist(at, page[: len(content) - at])
        return file.durable.ljust(len(content), b"\0") if rng.random() < 0.8 else file.durable

    def close(self):
        for file in self.files.values():
            os.close(file.descriptor)
        self.files.clear()
