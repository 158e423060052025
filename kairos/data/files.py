"""Files that appear whole or not at all, and what went wrong with one in words."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from kairos.errors import KairosError, MachineError, UserError

LOCK = ".lock"
"""In a folder in which one process works at a time."""

# The disk or its quota is at its end, or it fails: not something that the user typed.
_MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_IN_RUST = re.compile(r"\(os error (\d+)\)")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`: a reader sees the old file or the whole new one, never a part.

    Raises UserError where the folder cannot be written to, MachineError where the disk is full.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden file beside `path` that takes its place at the end, and is removed on any failure, Ctrl-C
    included. Raises as `write_atomically`."""
    path = Path(path)
    with explained(path):
        _refuse_folder(path)
        handle, name = tempfile.mkstemp(prefix=".kairos-", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _finish(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder in `folder` whose files, and those of its folders, take their places there at the end;
    on any failure none of them does. What else is in `folder` stays, but for shards of weights that would be
    read in place of the new ones. Raises as `write_atomically`."""
    folder = Path(folder)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".kairos-", suffix=".part", dir=folder) as name:
            yield Path(name)
            files = [file for file in Path(name).rglob("*") if file.is_file()]
            for file in files:
                _finish(file)
            for home in {(folder / file.relative_to(name)).parent for file in files}:
                if home.exists() and home.stat().st_dev != folder.stat().st_dev:
                    raise UserError(
                        f"cannot write {home}: it is on another disk than {folder}; choose another"
                    )
            for file in files:
                place = folder / file.relative_to(name)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
            _remove_shards({folder / file.relative_to(name) for file in files})


def _remove_shards(made: set[Path]) -> None:
    """Of weights that were there under the names of those just `made`, the files that are not among these."""
    for file in made:
        if file.suffix == ".safetensors":
            name = re.sub(r"-\d+-of-\d+$", "", file.stem)
            there = file.parent.glob(f"{name}-*-of-*.safetensors")
            for before in {*there, file.with_name(f"{name}.safetensors.index.json")} - made:
                before.unlink(missing_ok=True)


def _finish(file: Path) -> None:
    """Have it on the disk, and for all whom the umask allows: temporary files are their maker's alone."""
    with file.open("r+b") as handle:
        os.fsync(handle.fileno())
    file.chmod(0o666 & ~_umask())


def prepare_folder(folder: str | os.PathLike[str]) -> None:
    """Make `folder` where it is missing and try that a file can be written there, before work is spent on it.

    Raises UserError where it cannot, MachineError where the disk is full.
    """
    folder = Path(folder)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".kairos-", dir=folder) as file:
            file.write(b"\0")


def prepare_file(path: str | os.PathLike[str]) -> None:
    """`prepare_folder` for the folder of `path`, and that `path` can be the name of a file in it."""
    path = Path(path)
    prepare_folder(path.parent)
    with explained(path):
        _refuse_folder(path)


def lock(folder: Path, busy: str) -> IO[str]:
    """Be the one process that works in `folder`, until the file that this returns is closed.

    Raises UserError, `busy`, where another one is. Without locks, on Windows and some network file systems,
    nobody is refused.
    """
    path = folder / LOCK
    with explained(path):
        file = path.open("a")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(busy) from None
    except (ImportError, OSError):
        pass
    return file


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file in it")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about writing `path` into one clear line, those too that libraries
    in Rust (safetensors, tokenizers) raise as their own."""
    try:
        yield
    except OSError as error:
        raise _failure(path, error) from error
    except Exception as error:
        said = _IN_RUST.search(str(error))
        if said is None or isinstance(error, KairosError):
            raise
        number = int(said[1])
        windows = os.name == "nt"  # there it is the system's own number, which Python translates
        told = OSError(0, "", None, number) if windows else OSError(number, os.strerror(number))
        raise _failure(path, told) from error


def _failure(path: Path, error: OSError) -> KairosError:
    reason = (error.strerror or str(error)).lower()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(f"cannot write {path}: {reason}; free some space or choose another disk")
    if error.errno in _MACHINE_ERRNOS:
        return MachineError(f"cannot write {path}: {reason}")
    fix = "a shorter name" if error.errno == errno.ENAMETOOLONG else "a folder that you may write to"
    return UserError(f"cannot write {path}: {reason}; choose {fix}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
