"""The log density and its gradient as machine code: the captured graph, written in C and built by the system's compiler.

The graph is broken down into simple operations, `codegen` writes them as loops, and the library is kept in a cache
(`compiled_cache.py`). Data are inputs, not part of the code: the same story on other data of the same shape is not built
again. A program is trusted only after it agrees with the graph it came from, which agreed with the story.

What this file uses of torch's tracing is private to torch; nothing else in the package does.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from . import compiled_cache
from .codegen import ALIGNMENT, NotTranslated, translate
from .recorder import PureGraph

if TYPE_CHECKING:
    from .capture import ValueAndGrad

#: Where the C that is not generated lies.
NATIVE = Path(__file__).with_name("native")
#: Seconds that the compiler may take.
PATIENCE = 120.0
#: Operations beyond which a graph is not translated: the compiler's time grows with them.
LARGEST = 12_000
#: Ulp by which an argument is moved to see what rounding does, how many times that two orders of summing may lie apart, and
#: how far at most, relative to the largest entry.
ULPS, ROUNDING, COARSEST = 4, 100.0, 1e-5
OPTIONS = (
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-fPIC",
    "-shared",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
)
#: Vectorised mathematics of the system, best first; the first that builds is taken.
VECTORS = (("-DVECTOR_MATH=2", "-lmvec"), ("-DVECTOR_MATH=1", "-lmvec"), ())


class NotCompiled(RuntimeError):
    """There is no machine code for a function; the text is the reason."""


@dataclass
class Compiled:
    """Value and gradient at a vector, as machine code.

    Attributes
    ----------
    dim
        Length of the vector.
    address
        Of a C function (position, inputs, arena, value, gradient) that allocates nothing and is safe in threads, each with
        an arena of its own.
    inputs
        Addresses of the constants.
    arena_bytes
        Scratch memory that one call needs.
    fresh
        Whether it was built now rather than found in the cache.
    """

    dim: int
    address: int
    inputs: Any
    arena_bytes: int
    fresh: bool
    kept: list[Any] = field(default_factory=list, repr=False)  # what must live as long as the addresses

    def arena(self) -> NDArray[np.uint8]:
        """Scratch memory for one thread, aligned."""
        raw = np.zeros(self.arena_bytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + self.arena_bytes + 1]

    def __call__(self, flat: NDArray) -> tuple[float, NDArray]:
        """(dim,) -> value and gradient (dim,), in float64."""
        values, gradients = self.many(flat[None])
        return float(values[0]), gradients[0]

    def many(self, flats: NDArray) -> tuple[NDArray, NDArray]:
        """(C, dim) -> values (C,) and gradients (C, dim), one after the other in the memory of one."""
        flats = np.ascontiguousarray(flats, np.float64)
        values, gradients, arena = np.zeros(len(flats)), np.zeros_like(flats), self.arena()
        call = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5)(self.address)
        for i in range(len(flats)):
            ends = (values[i : i + 1].ctypes.data, gradients[i].ctypes.data)
            call(flats[i].ctypes.data, ctypes.addressof(self.inputs), arena.ctypes.data, *ends)
        return values, gradients


def graph_of(potential: ValueAndGrad) -> PureGraph:
    """The graph of value and gradient.

    Raises
    ------
    NotCompiled
        There is none, or it lives on another device than the processor.
    """
    graph = potential.single.call
    if potential.mode != "graph" or not isinstance(graph, PureGraph):
        raise NotCompiled(potential.reason or "there is no graph")
    if any(t.device.type != "cpu" for t in (potential.points[0], *graph.constants)):
        raise NotCompiled(f"machine code is built for the processor, and the data are on {potential.points[0].device}")
    count = len(graph.module.graph.nodes)
    if count > LARGEST:
        raise NotCompiled(f"the story has {count} operations, more than {LARGEST}: building takes too long")
    return graph


def find(potential: ValueAndGrad) -> Compiled | None:
    """The machine code of a potential from the cache; None where it has to be built.

    Raises
    ------
    NotCompiled
        There cannot be any, or it disagrees with the graph.
    """
    graph = graph_of(potential)
    module, constants = graph.module, graph.constants
    found = compiled_cache.find(key_of(module, potential.points[0], constants))
    return None if found is None else checked(potential, load(potential, constants, *found, fresh=False))


def build(potential: ValueAndGrad) -> Compiled:
    """The machine code of a potential, from the cache or made now.

    Raises
    ------
    NotCompiled
        An operation has no translation, there is no C compiler, it fails, or the result disagrees with the graph.
    """
    ready = find(potential)
    if ready is not None:
        return ready
    graph = graph_of(potential)
    module, constants = graph.module, graph.constants
    example = (potential.points[0], *constants)
    compiler()

    def make(path: Path) -> dict[str, Any]:
        try:
            source, arena = translate(simple(module, example), example)
        except NotTranslated as error:
            raise NotCompiled(f"{error} has no translation to C") from None
        except Exception as error:  # tracing may fail on anybody's program, in any way
            raise NotCompiled(f"the graph cannot be broken down: {type(error).__name__}: {str(error)[:200]}") from None
        build_library(source, path)
        return {"arena": arena}

    found = compiled_cache.keep(key_of(module, example[0], constants), make)
    return checked(potential, load(potential, constants, *found, fresh=True))


def load(potential: ValueAndGrad, constants: list[Tensor], path: Path, facts: dict[str, Any], fresh: bool) -> Compiled:
    """A library with the constants of a potential."""
    try:
        library = ctypes.CDLL(str(path))
        address = ctypes.cast(library.potential, ctypes.c_void_p).value
    except (OSError, AttributeError) as error:
        raise NotCompiled(f"the library cannot be loaded: {error}") from None
    inputs = (ctypes.c_void_p * max(1, len(constants)))(*[c.data_ptr() for c in constants])
    dim = potential.points[0].numel()
    return Compiled(dim, address or 0, inputs, int(facts["arena"]), fresh, [library, constants])


def checked(potential: ValueAndGrad, code: Compiled) -> Compiled:
    """Machine code that agrees with its graph at several points, near ones and far ones."""
    noise = np.random.default_rng(0)
    points = [p.double().numpy() for p in potential.points]
    points += [p + 0.1 * noise.standard_normal(p.shape) for p in points]
    for point in points:
        wanted, found = potential.numpy(point), code(point)
        finite, here = (bool(np.isfinite(value) and np.isfinite(slope).all()) for value, slope in (wanted, found))
        if finite != here or (finite and not same(potential, point, wanted, found)):
            raise NotCompiled("the machine code disagrees with the graph")
    return code


def same(potential: ValueAndGrad, point: NDArray, wanted: tuple[Any, Any], found: tuple[Any, Any]) -> bool:
    """Whether two values and gradients are equal up to rounding.

    The order of sums may matter more than in other functions: the factor of a covariance of a smooth function loses as many
    digits as that is near to singular.  How much rounding does to a function is seen when its argument is moved by some ulp.
    """
    from .capture import close

    kind = potential.points[0].dtype
    pairs = [[np.atleast_1d(np.asarray(v, np.float64)) for v in pair] for pair in zip(wanted, found, strict=True)]
    if all(close(*(torch.from_numpy(v).to(kind) for v in pair)) for pair in pairs):
        return True
    signs = np.where(np.arange(len(point)) % 2, 1.0, -1.0)
    moved = potential.numpy(point * (1.0 + ULPS * torch.finfo(kind).eps * signs))
    for (a, b), c in zip(pairs, moved, strict=True):
        apart = np.abs(a - b).max()
        if not (apart <= ROUNDING * np.abs(a - c).max() and apart <= COARSEST * np.abs(a).max()):
            if not close(torch.from_numpy(a).to(kind), torch.from_numpy(b).to(kind)):
                return False
    return True


def key_of(module: fx.GraphModule, position: Tensor, constants: list[Tensor]) -> str:
    """Hash of what the machine code depends on: never the numbers in the data."""
    layouts = [f"{t.dtype} {tuple(t.shape)} {t.stride()}" for t in (position, *constants)]
    tools = (torch.__version__, *OPTIONS, toolchain(), compiled_cache.machine())
    return compiled_cache.key_of(module.code, *layouts, sources(), *tools)


@functools.lru_cache(maxsize=1)
def sources() -> str:
    """Hash of the files that translate."""
    here = Path(__file__).parent
    files = [here / "compiled.py", here / "recorder.py", *here.glob("codegen/*.py"), *here.glob("native/*")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(files) if f.is_file())).hexdigest()


# -- torch's tracing ---------------------------------------------------------------------------------------------------


def simple(module: fx.GraphModule, example: tuple[Tensor, ...]) -> fx.GraphModule:
    """The same graph in torch's small set of operations."""
    from torch._decomp import core_aten_decompositions, decomposition_table
    from torch.fx.experimental.proxy_tensor import make_fx

    aten = torch.ops.aten
    table: dict[Any, Any] = dict(core_aten_decompositions())
    for operation in (aten._softmax, aten._log_softmax, aten._softmax_backward_data, aten._log_softmax_backward_data):
        table[operation.default] = decomposition_table[operation.default]
    before = torch.get_default_dtype()
    torch.set_default_dtype(example[0].dtype)  # what a number without a type becomes
    try:
        with torch.no_grad():
            # Shapes are enough: tracing with numbers would keep a copy of every table of a large story.
            traced = make_fx(lambda *args: module.forward(*args), decomposition_table=table, tracing_mode="fake")(
                *example
            )
    finally:
        torch.set_default_dtype(before)
    traced.graph.eliminate_dead_code()
    return traced


# -- the C compiler ----------------------------------------------------------------------------------------------------


def compiler() -> str:
    """Path of the system's C compiler: `$CC`, cc, gcc or clang.

    Raises
    ------
    NotCompiled
        There is none.
    """
    for name in (os.environ.get("CC", "").split(" ")[0], "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise NotCompiled(
        "there is no C compiler (cc, gcc or clang); install one, or name it in the environment variable CC"
    )


def toolchain() -> str:
    """Which compiler this is, as it says itself; empty without one."""
    try:
        return _version(compiler())
    except NotCompiled:
        return ""


@functools.lru_cache(maxsize=8)
def _version(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    return f"{path} {done.stdout.splitlines()[0] if done.stdout else ''}"


def build_library(source: str, path: Path) -> None:
    """C text to a shared library at `path`.

    Raises
    ------
    NotCompiled
        The compiler fails or takes too long; the text has its first complaint.
    """
    with tempfile.TemporaryDirectory(prefix="pyro-model-zoo-") as place:
        text = Path(place) / "program.c"
        text.write_text(source)
        for vectors in VECTORS:
            flags = [v for v in vectors if v.startswith("-D")]
            libraries = [v for v in vectors if v.startswith("-l")]
            command = [compiler(), *OPTIONS, *flags, f"-I{NATIVE}", str(text), "-o", str(path), *libraries, "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NotCompiled(f"the C compiler did not finish: {type(error).__name__}") from None
            if done.returncode == 0 and loads(path):
                return
    complaint = next((line for line in done.stderr.splitlines() if "error" in line), "the library does not load")
    raise NotCompiled(f"the C compiler fails: {complaint[:200]}")


def loads(path: Path) -> bool:
    """Whether all that a library needs is on this system."""
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True


@functools.lru_cache(maxsize=4)
def sampler(name: str = "nuts") -> ctypes.CDLL:
    """A sampler's library, `native/{name}.c`, built at its first use on this machine.

    Raises
    ------
    NotCompiled
        It cannot be built.
    """
    key = compiled_cache.key_of(name, sources(), *OPTIONS, toolchain(), compiled_cache.machine())

    def make(path: Path) -> dict[str, Any]:
        build_library((NATIVE / f"{name}.c").read_text(), path)
        return {}

    path, _ = compiled_cache.find(key) or compiled_cache.keep(key, make)
    return ctypes.CDLL(str(path))
