"""Machine code that was built once: kept in the user's cache folder under the hash of everything that it depends on.

An entry is a JSON file named by that hash; it names a library by the hash of its content, so that two processes that
build the same thing at once cannot mix their files up. Files appear whole (written beside, then renamed), their content
is checked before use, and the oldest leave when the folder has grown too large. Nothing is unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Environment variable that moves the folder.
VARIABLE = "PYRO_MODEL_ZOO_CACHE"
#: Bytes that the folder may hold.
LIMIT = 256 * 1024 * 1024


def folder() -> Path:
    """`$PYRO_MODEL_ZOO_CACHE`, else `pyro-model-zoo` in `$XDG_CACHE_HOME` or `~/.cache`; made where it is missing.

    A folder that cannot be written, or that belongs to somebody else, is not used: its libraries would be run. Then it is
    a folder of this process alone.
    """
    chosen = os.environ.get(VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(chosen) if chosen else Path(base) / "pyro-model-zoo"
    with suppress(OSError):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(path, os.W_OK | os.X_OK) and (not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()):
            return path
    return Path(_own().name)


@functools.lru_cache(maxsize=1)
def _own() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pyro-model-zoo-")  # removed when the process ends


def key_of(*parts: str) -> str:
    """Hash of texts; where one ends and the next begins matters."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def machine() -> str:
    """What machine code depends on: system, architecture and the processor's instructions."""
    flags = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), flags)
    return f"{platform.system()} {platform.machine()} {flags}"


def find(key: str) -> tuple[Path, dict[str, Any]] | None:
    """The library of an entry and the facts noted with it; None where there is none, or a damaged one."""
    root = folder()
    try:
        entry = json.loads((root / f"{key}.json").read_text())
        library = root / entry["library"]
        if hashlib.sha256(library.read_bytes()).hexdigest() != entry["sha256"]:
            return None
        os.utime(library)
        os.utime(root / f"{key}.json")
        return library, entry["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Build a library and note it.

    Parameters
    ----------
    key
        Of the entry.
    build
        Writes the library to the path that it is given, and returns the facts to note (what JSON can say).
    """
    root = folder()
    made = temporary(root, ".so")
    try:
        facts = build(made)
        content = hashlib.sha256(made.read_bytes()).hexdigest()
        library = root / f"{content}.so"
        os.replace(made, library)
    finally:
        made.unlink(missing_ok=True)
    note = temporary(root, ".json")
    note.write_text(json.dumps({"library": library.name, "sha256": content, "facts": facts}))
    os.replace(note, root / f"{key}.json")
    sweep(root)
    return library, facts


def temporary(root: Path, suffix: str) -> Path:
    """A new empty file beside the entries, named unlike any of them."""
    handle, name = tempfile.mkstemp(prefix="building-", suffix=suffix, dir=root)
    os.close(handle)
    return Path(name)


def sweep(root: Path, limit: int = LIMIT) -> None:
    """Remove what was used longest ago until the rest fits; what a run that died has left goes after an hour."""
    files = []
    for path in root.iterdir():
        with suppress(OSError):
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in files)
    for used, size, path in sorted(files):
        stale = path.name.startswith("building-") and used < time.time() - 3600
        if stale or (total > limit and not path.name.startswith("building-")):
            with suppress(OSError):
                path.unlink()
                total -= size
