"""Small files that no reader ever sees half written."""

import os
from pathlib import Path


def write_whole(path: Path, content: str) -> None:
    """Puts `content` at `path`, in UTF-8 and on the disk itself; where that fails, what stood there stands.

    For one writer at a time: what a killed one leaves beside it, `.NAME.part`, is taken up by the next. Raises OSError.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
