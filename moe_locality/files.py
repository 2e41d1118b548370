"""Files that appear whole or not at all."""

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from moe_locality.errors import ConfigError


def replace_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file like ``replace_file``; the folder is made if absent."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return replace_file(path, lambda file: file.write(text.encode("utf-8")))


def dump_rows(value: Any, indent: int = 0) -> str:
    """JSON text: objects and lists of containers over several lines, lists of scalars on one."""
    pad, end = " " * (indent + 1), " " * indent
    if isinstance(value, dict) and value:
        items = (
            f"{pad}{json.dumps(key)}: {dump_rows(value[key], indent + 1)}" for key in sorted(value)
        )
        return "{\n" + ",\n".join(items) + f"\n{end}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        items = (f"{pad}{dump_rows(item, indent + 1)}" for item in value)
        return "[\n" + ",\n".join(items) + f"\n{end}]"
    return json.dumps(value, allow_nan=False)


def write_text(path: str | os.PathLike[str], text: str, *, what: str) -> Path:
    """Write a text file like ``replace_text``; ConfigError, which says ``what``: it cannot be."""
    try:
        return replace_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"cannot write the {what} {path}: {error.strerror or error}: give a path in a "
            "directory that exists or can be made, and that you may write"
        ) from error


def replace_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> Path:
    """Write a file whole or not at all: a new file in the same folder, fsync, rename.

    What stood there before stays where anything fails. A link stays; what it names is replaced.
    OSError: the folder is absent or cannot be written, or a device or pipe stands there. Whatever
    ``write`` raises goes through."""
    target = Path(os.path.realpath(path))
    if is_special(target):  # a rename would put a file in its place: /dev/null is gone then
        raise OSError(errno.EINVAL, "it is a device or a pipe")
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes private files; this one is to be shared
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return Path(path)


def is_special(path: Path) -> bool:
    """Whether something stands there that is neither a file nor a folder."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_is_new(folder: Path) -> None:
    """Raise ConfigError unless the folder is absent or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"found {folder} in use, expected a new or empty folder: choose another one, or remove "
            "it"
        )


def replace_folder(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Make a folder whole or not at all: ``write`` fills a new one beside it, which is renamed.
    ConfigError: the path is in use, or cannot be written; whatever else ``write`` raises goes
    through. Nothing is left behind."""
    out = Path(path)
    check_is_new(out)
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write(temporary)
        if out.exists():
            out.rmdir()  # empty, as checked
        temporary.rename(out)
    except OSError as error:
        raise ConfigError(
            f"cannot write {out}: {error.strerror or error}: nothing was left behind; choose "
            "a folder that can be written, with enough room"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there where something failed
    return out
