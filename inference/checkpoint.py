"""Answers on disk: one safetensors file with a JSON card, checksummed, written beside the old one and renamed.

Nothing is pickled, so nothing in a file can run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor

from .data import take_rows
from .lazy_rows import has_lazy

if TYPE_CHECKING:
    from .posterior import Posterior
    from .problem import Problem

FORMAT = "pyro-model-zoo posterior 2"
#: Rows that are saved of tables that are kept elsewhere.
KEPT_ROWS = 1000


class CheckpointError(ValueError):
    """A file is no posterior of ours, is damaged, or belongs to another story; the text names file and check."""


def save(posterior: Posterior, path: str | Path) -> Path:
    """See `Posterior.save`.

    Raises
    ------
    OSError
        The folder is missing or cannot be written; an old file of that name is kept.
    """
    from safetensors.torch import save as to_bytes

    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; make it first")
    tensors = gather(posterior)
    card = describe(posterior, tensors)
    text = json.dumps(card, sort_keys=True)
    payload = to_bytes(tensors, metadata={"card": text, "sha256": checksum(tensors, text)})
    write_atomically(path, payload)
    return path


def write_atomically(path: Path, payload: bytes) -> None:
    """Temporary file in the same folder, flushed to the disk, then renamed over the target.

    Raises
    ------
    OSError
        The folder cannot be written or the disk is full, with the path; or the target is no regular file, such as a device.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"cannot write {path}: it is no regular file")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # as any other new file; mkstemp's own are private
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}; an old file there is untouched") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def gather(posterior: Posterior) -> dict[str, Tensor]:
    """All tensors of an answer under prefixed names."""
    tensors = {f"draws/{n}": v[:1] if n in repeated(posterior) else v for n, v in posterior.draws.items()}
    tensors |= {f"data/{n}": v for n, v in kept_data(posterior).items() if isinstance(v, Tensor)}
    tensors |= {f"stats/{n}": torch.from_numpy(np.ascontiguousarray(v)) for n, v in posterior.sample_stats.items()}
    for group, value in posterior.extra.items():
        if isinstance(value, dict):
            tensors |= {f"extra/{group}/{n}": v for n, v in value.items() if isinstance(v, Tensor)}
    return {n: v.detach().cpu().contiguous().clone() for n, v in tensors.items()}


def kept_data(posterior: Posterior) -> dict[str, Any]:
    """Arguments that are saved: all, or the first rows of tables that are kept elsewhere, such as a corpus on disk."""
    kwargs = posterior.problem.kwargs
    if not has_lazy(kwargs):
        return kwargs
    return take_rows(kwargs, posterior.structure.row_arguments, slice(0, KEPT_ROWS))


def repeated(posterior: Posterior) -> dict[str, int]:
    """How often a learned point stands among the draws, one number in memory: it is written once."""
    return {n: len(v) for n, v in posterior.draws.items() if v.ndim > 1 and len(v) > 1 and v.stride(0) == 0}


def describe(posterior: Posterior, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The card: everything but tensors."""
    problem = posterior.problem
    return {
        "format": FORMAT,
        "story": story_card(problem.story, problem.structure),
        "kind": posterior.kind,
        "method": posterior.method.name,
        "options": options_of(posterior.method),
        "chains": posterior.chains,
        "repeated": repeated(posterior),
        "order": list(posterior.draws),
        "converged": posterior.converged,
        "seed": posterior.seed,
        "dtype": str(problem.dtype),
        "device": str(problem.device),
        "want": problem.want,
        "arguments": {n: v for n, v in problem.kwargs.items() if not isinstance(v, Tensor)},
        "elsewhere": posterior.structure.num_rows if has_lazy(problem.kwargs) else 0,
        "history": plain(posterior.history),
        "diagnostics": plain(posterior.diagnostics),
        "warnings": posterior.warnings,
        "timings": plain(posterior.timings),
        "why": posterior.why(),
        "cross_check": plain(posterior.cross_check.card()) if posterior.cross_check else None,
        "data_sha256": fingerprint({n: v for n, v in tensors.items() if n.startswith("data/")}),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What computes here."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "pyro": pyro.__version__}


def other_versions(saved: dict[str, str]) -> list[str]:
    """A note where a file was written under other versions."""
    here = versions()
    other = [f"{n} {v} (here {here.get(n, 'none')})" for n, v in saved.items() if here.get(n) != v]
    return [f"saved under {', '.join(other)}: last digits of what is computed anew may differ"] if other else []


def other_rows(count: int) -> list[str]:
    """A note where the rows of the fit were too many to be saved."""
    if not count:
        return []
    return [
        f"the {count:,} rows of the fit were not saved: what asks for no data is answered for the first {KEPT_ROWS:,}"
    ]


def options_of(method: Any) -> dict[str, Any]:
    """A method's options that JSON can say; the others (starts, callbacks, files) belong to the run, not to the answer."""
    options = {f.name: getattr(method, f.name) for f in fields(method) if f.compare and f.init}
    return {n: v for n, v in options.items() if v is None or isinstance(v, (bool, int, float, str))}


def with_options(method: Any, options: dict[str, Any]) -> Any:
    """The method as it was saved, as far as its options are still known and valid here."""
    known = {f.name for f in fields(method)}
    try:
        return replace(method, **{n: v for n, v in options.items() if n in known})
    except (TypeError, ValueError):
        return method


def story_card(story: Any, structure: Any) -> dict[str, Any]:
    """What must agree for an answer to belong to a story."""
    model = getattr(story, "model", None)
    name = type(story).__name__ if model is not None else getattr(story, "__qualname__", type(story).__name__)
    rows = structure.num_rows
    sites = {
        s.name: [s.kind, s.family, ["rows" if n == rows and s.local else n for n in s.shape], list(s.plates)]
        for s in structure.sites
    }
    settings = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(story)) if model is not None else ""  # an address is no setting
    return {"name": name, "settings": settings, "sites": sites}


def plain(value: Any) -> Any:
    """JSON's own types; numbers that JSON lacks become words."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | Tensor):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": repr(value)}
    return value if isinstance(value, str | int | float | bool | type(None)) else repr(value)


def revive(value: Any) -> Any:
    """Inverse of `plain` for numbers."""
    if isinstance(value, dict):
        return float(value["number"]) if set(value) == {"number"} else {k: revive(v) for k, v in value.items()}
    return [revive(v) for v in value] if isinstance(value, list) else value


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def checksum(tensors: dict[str, Tensor], card: str) -> str:
    """Over tensors and card together."""
    return hashlib.sha256((fingerprint(tensors) + card).encode()).hexdigest()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and card of a file, every check passed."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file in it")
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file; nothing was loaded from it")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # aligned, and apart from the file
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error}); nothing was loaded from it") from None
    if "card" not in metadata or "sha256" not in metadata:
        raise CheckpointError(f"{path} has no card: it was not written by Posterior.save")
    if checksum(tensors, metadata["card"]) != metadata["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 does not match; use a backup")
    card = json.loads(metadata["card"])
    if card.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {card.get('format')!r}; this version reads {FORMAT!r}")
    return tensors, card


def load(path: str | Path, story: Any, *, guide: Any = None) -> Posterior:
    """An answer from a file, and the story that it answers.

    Parameters
    ----------
    path
        Written by `Posterior.save`.
    story
        The same story as at the fit: files hold numbers, not programs.
    guide
        The same guide as at the fit, where it was not the story's own.

    Raises
    ------
    CheckpointError
        The file is damaged, foreign, of another format, or of another story; differences are listed.
    FileNotFoundError
        There is no such file.
    """
    from .choose import Choice
    from .crosscheck import CrossCheck
    from .methods import METHODS
    from .posterior import Posterior
    from .problem import prepare

    path = Path(path)
    tensors, card = read(path)
    data = {n.removeprefix("data/"): v for n, v in tensors.items() if n.startswith("data/")}
    try:
        problem = prepare(story, {**data, **card["arguments"]}, guide=guide, seed=card["seed"], want=card["want"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} answers the story {card['story']['name']!r} {card['story']['settings']}; the one given cannot take its "
            f"data: {error}"
        ) from error
    check_story(
        path, card, {**card, "story": story_card(problem.story, problem.structure), "dtype": str(problem.dtype)}
    )
    extra: dict[str, Any] = {}
    for name, value in tensors.items():
        if name.startswith("extra/"):
            _, group, key = name.split("/", 2)
            extra.setdefault(group, {})[key] = value
    method = METHODS.get(card["method"])
    if method is None:
        raise CheckpointError(f"{path}: method {card['method']!r} is unknown here; known are {list(METHODS)}")
    method = with_options(method, card["options"])
    draws = {n.removeprefix("draws/"): v for n, v in tensors.items() if n.startswith("draws/")}
    draws = {n: draws[n] for n in [*card.get("order", []), *draws] if n in draws}  # files sort by name
    draws = {n: v.expand(card.get("repeated", {}).get(n, len(v)), *v.shape[1:]) for n, v in draws.items()}
    if "networks" in extra:
        write_networks(path, problem, extra["networks"])
    with problem.scope(card["seed"]):
        return Posterior(
            kind=card["kind"],
            method=method,
            problem=problem,
            draws=draws,
            chains=card["chains"],
            history=revive(card["history"]),
            diagnostics=revive(card["diagnostics"]),
            warnings=card["warnings"] + other_versions(card["versions"]) + other_rows(card.get("elsewhere", 0)),
            timings=revive(card["timings"]),
            sample_stats={n.removeprefix("stats/"): v.numpy() for n, v in tensors.items() if n.startswith("stats/")},
            converged=card["converged"],
            choice=Choice(method, card["why"].splitlines()[0].partition(": ")[2]),
            extra=extra,
            cross_check=CrossCheck(**revive(told)) if (told := card.get("cross_check")) else None,
        )


def write_networks(path: Path, problem: Problem, weights: dict[str, Tensor]) -> None:
    """Give the story's networks, a copy of the user's, the weights that they had when the fit ended."""
    from .methods.networks import Networks

    networks = Networks(problem.story, problem.model, problem.guide)
    shapes = {n: tuple(p.shape) for n, p in networks.weights.items()}
    if shapes != {n: tuple(w.shape) for n, w in weights.items()}:
        raise CheckpointError(
            f"{path} holds other networks than the story given: {sorted(weights)} and {sorted(shapes)}"
        )
    networks.write(weights)


def check_story(path: Path, saved_card: dict[str, Any], given_card: dict[str, Any]) -> None:
    """Refuse another story, other settings, other sites or another precision, listing every difference."""
    saved, given = saved_card["story"], given_card["story"]
    differences = []
    if saved_card["dtype"] != given_card["dtype"]:
        differences.append(f"dtype: saved {saved_card['dtype']}, given {given_card['dtype']}")
    for key in ("name", "settings"):
        if saved[key] != given[key]:
            differences.append(f"{key}: saved {saved[key]!r}, given {given[key]!r}")
    for site in sorted({*saved["sites"], *given["sites"]}):
        a, b = saved["sites"].get(site), given["sites"].get(site)
        if a != b:
            differences.append(f"site {site}: saved {a}, given {b}")
    if differences:
        raise CheckpointError(f"{path} answers another story:\n  " + "\n  ".join(differences))
