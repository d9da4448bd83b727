"""Data: sets that need no download, simulators that know the truth, readers for tables.

`datasets()` lists names, `load(name)` gives one of them and `read(source)` a file or a data frame; the answer
is always a `Dataset`.  Texts are a `Corpus`: `read_corpus(path)`, `from_texts(texts)`, and `load_corpus()`, which needs
no download.  What does not fit in memory stays on disk: `store_corpus`, `open_corpus`, `open_table`.  Nothing here touches
a global random state.
"""

from importlib import import_module
from typing import Any

_LAZY = {"Dataset": ".dataset", "datasets": ".library", "load": ".library", "read": ".readers"}
_LAZY |= {"Corpus": ".text"}
_LAZY |= {name: ".corpus_readers" for name in ("fetch_corpus", "from_texts", "load_corpus", "read_corpus")}
_LAZY |= {name: ".stored" for name in ("open_corpus", "store_corpus")}
_LAZY["open_table"] = ".mapped"

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
