"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from moe_locality.errors import ConfigError


def replace_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file like ``replace_file``; the folder is made if absent."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return replace_file(path, lambda file: file.write(text.encode("utf-8")))


def write_text(path: str | os.PathLike[str], text: str, *, what: str) -> Path:
    """Write a text file like ``replace_text``; an error says what to do.

    Raises:
        ConfigError: the folder cannot be made or written; ``what`` names the file in the message.
    """
    try:
        return replace_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"cannot write the {what} {path}: {error.strerror or error}: give a path in a "
            "directory that exists or can be made, and that you may write"
        ) from error


def replace_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> Path:
    """Write a file whole or not at all: a new file in the same folder, fsync, rename.

    What stood there before stays where anything fails.

    Raises:
        OSError: the folder is absent or cannot be written. Whatever ``write`` raises goes through.
    """
    target = Path(path)
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
    return target
