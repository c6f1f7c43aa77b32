"""The version, and what identifies this very code in cache keys."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Final

VERSION: Final = "0.1.0"


@functools.cache
def source_hash() -> str:
    """Returns a hash of ardd's own sources.

    Torch's caches know custom ops and passes by name only: without this in their keys, a changed
    pass would be given the graphs of the old one.
    """
    digest = hashlib.sha256(VERSION.encode())
    root = Path(__file__).parent.parent
    for part in ("core", "runtime", "passes", "backends"):
        files = (root / part).rglob("*")
        for path in sorted(file for file in files if file.suffix in (".py", ".cpp")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
