"""What the sinks that write to files share: names for what a disk does, and whether a file is where it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from spillway.sinks.base import Result, sink_down

_REASONS = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EIO: "io_error",
    errno.EROFS: "read_only",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
}


def disk_failed(error: OSError) -> Result:
    code = error.errno or 0
    return sink_down(_REASONS.get(code) or errno.errorcode.get(code, "os_error").lower(), str(error))


def is_at(path: Path, fd_stat: os.stat_result) -> bool:
    """False when the file that is open has been moved or deleted: what is written to it is lost to its readers."""
    try:
        return os.path.samestat(path.stat(), fd_stat)
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Makes the names in it durable: a file that is fsynced may still lose its name."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
