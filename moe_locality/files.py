"""Files that appear whole or not at all."""

import os
import tempfile
from pathlib import Path


def replace_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file whole or not at all: a new file in the same folder, fsync, rename.

    The folder is made if absent; what stood there before stays where anything fails.

    Raises:
        OSError: the folder cannot be made or written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
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
