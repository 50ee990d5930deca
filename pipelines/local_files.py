"""Files of this machine that appear whole or not at all, also after a crash."""

import contextlib
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp-"
_TEMPORARY_NAME = re.compile(re.escape(TEMPORARY) + "[0-9a-f]{16}")
_CHUNK_BYTES = 1 << 20


def put_local(path: str, source: IO[bytes], *, replace: bool) -> bool:
    """Write `source` beside `path`, flush it to the disk, then rename (or, if not `replace`, link) it into place.

    Return False where something was there that may not be replaced. Raises OSError; no temporary file stays.
    """
    folder = os.path.dirname(path)
    _make_folder(folder)
    temporary = os.path.join(folder, TEMPORARY + secrets.token_hex(8))
    try:
        # Not tempfile: its 0600 would make published objects unreadable to others; 0666 obeys the umask.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "wb") as out:
            shutil.copyfileobj(source, out, _CHUNK_BYTES)
            out.flush()
            os.fsync(descriptor)
        (os.replace if replace else os.link)(temporary, path)
    except FileExistsError:
        if replace:
            raise
        return False
    except OSError as error:
        if error.filename is None:  # as of a full disk: of what, the system does not say
            raise OSError(error.errno, error.strerror, path) from error
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(folder)
    return True


def sweep_local(root: str) -> None:
    """Remove the temporary files below a folder."""
    for folder, _, names in os.walk(root):
        for name in filter(_TEMPORARY_NAME.fullmatch, names):
            with contextlib.suppress(OSError):  # what cannot be removed is never listed, and harms nobody
                os.unlink(os.path.join(folder, name))


def _make_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        _make_folder(os.path.dirname(folder))
        os.makedirs(folder, exist_ok=True)
        _sync_folder(os.path.dirname(folder))


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
