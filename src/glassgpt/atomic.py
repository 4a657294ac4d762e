# Written by tools/tangle.py from book/23_runs_that_survive.ipynb: change it there.
"""Files written whole or not at all: under another name, flushed, then renamed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """Wait until the disk has the bytes of a file, or the names in a folder.

    Raises OSError. Windows and some file systems of networks flush no folder.

    Book: 23_runs_that_survive.html#write-flush-rename
    """
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(number)
    except OSError as error:
        if not folder or error.errno not in (errno.EBADF, errno.EINVAL):
            raise
    finally:
        os.close(number)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield another name, for a file or a folder to write; then flush and rename it.

    Missing folders above it are made, and a link stays a link. Raises OSError where the
    disk is full or can't be written, and where a folder, a device or a pipe has the
    name; what is old stays.

    Book: 23_runs_that_survive.html#write-flush-rename
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is a folder, a device or a pipe: name a file")
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        for part in (*partial.glob("*"), partial):  # what a folder holds, then itself
            flush(part)
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        if error.filename and partial.name not in str(error.filename):
            raise  # about another file, which was to be read
        raise OSError(f"{path} could not be written: {error}") from error
    finally:  # it would fill a full disk; Ctrl-C, too, leaves nothing
        shutil.rmtree(partial, ignore_errors=True)
        if partial.is_file():
            partial.unlink()


def write_file(path: str | Path, content: bytes) -> None:
    """Write all of a file or nothing. Raises OSError, as `atomic_write`.

    Book: 23_runs_that_survive.html#write-flush-rename
    """
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def write_json(path: str | Path, content: Any) -> None:
    """The same for what JSON can say.

    Book: 23_runs_that_survive.html#write-flush-rename
    """
    write_file(path, json.dumps(content, indent=1).encode())


def refuse_other(path: str | Path, begins: bytes) -> None:
    """Raise FileExistsError for a file that begins otherwise: it isn't ours.

    Book: 23_runs_that_survive.html#write-flush-rename
    """
    if os.path.isfile(path):
        with open(path, "rb") as file:
            if file.read(len(begins)) not in (begins, b""):
                raise FileExistsError(f"{path} is another file: choose a new name")
