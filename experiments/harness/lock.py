"""A lock on a folder, so that one process at a time writes to a run."""

import os
import platform
import sys
import warnings
import weakref
from pathlib import Path

from .settings import StudyError

FILE = ".lock"


class FolderLock:
    """A lock on a folder that this object holds until `release`.

    The lock is on the open file FILE of the folder. The system releases it when the process ends,
    however it ends, so a killed run never blocks the next one. The file stays: its content names
    the last process that had the lock, and is not the lock itself.

    Raises:
        StudyError: another process, or another object of this one, holds the lock.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._close = weakref.finalize(self, os.close, file)
        try:
            free = _lock(file)
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be locked ({error}): make sure that no other run writes to it",
                stacklevel=2,
            )
            return
        if not free:
            holder = path.read_text(errors="replace").strip()[:200] or "unknown"
            self.release()
            raise StudyError(
                f"another run writes to {folder} ({holder}): wait until it has ended, or choose "
                "another --out"
            )
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())

    def release(self) -> None:
        """Release the lock."""
        self._close()


def _lock(file: int) -> bool:
    """Lock an open file without waiting; return whether it was free.

    Raises:
        OSError: the file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        # Other processes cannot read a locked byte on Windows, so it is one behind the content.
        os.lseek(file, 1 << 20, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(file, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
