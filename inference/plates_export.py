"""Plate diagrams as text for other tools: Graphviz's DOT, and Mermaid for pages that draw it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .plates_fold import fold_loops
from .plates_graph import Graph, Node, graph, plate_letters
from .plates_symbols import symbol, with_symbols
from .provenance import relations


@with_symbols
def to_graphviz(story: Any, *args: Any, **kwargs: Any) -> str:
    """The diagram in the DOT language: plates are clusters, observed sites filled, deterministic ones dashed.

    Parameters
    ----------
    story
        A Pyro program, or an object with a `model` method.
    *args, **kwargs
        Passed to the story.

    Returns
    -------
    str
        For ``dot -Tsvg``.

    Notes
    -----
    Clusters nest and cannot cross: where plates cross, the inner one is drawn once inside the outer one and once outside.
    """
    drawn = _read(story, args, kwargs)
    lines = ["digraph story {", "  compound=true;", '  node [fontname="Times", penwidth=1.2];']
    lines += _clusters(drawn, drawn.tree, 1, dot=True)
    lines += [f"  {drawn.ids[a]} -> {drawn.ids[b]}{_arrow(drawn, b)};" for a, b in drawn.graph.edges]
    return "\n".join([*lines, "}", ""])


@with_symbols
def to_mermaid(story: Any, *args: Any, **kwargs: Any) -> str:
    """The diagram as a Mermaid flowchart; arguments and limits as for `to_graphviz`."""
    drawn = _read(story, args, kwargs)
    lines = ["flowchart TB"]
    lines += _clusters(drawn, drawn.tree, 1, dot=False)
    for a, b in drawn.graph.edges:
        line = "---" if drawn.graph.nodes[b].kind == "factor" else "-->"
        lines.append(f"  {drawn.ids[a]} {line} {drawn.ids[b]}")
    for kind, style in _CLASSES.items():
        members = [drawn.ids[n.name] for n in drawn.graph.nodes.values() if n.kind == kind]
        if members:
            lines += [f"  classDef {kind} {style}", f"  class {','.join(members)} {kind}"]
    return "\n".join([*lines, ""])


_CLASSES = {
    "latent": "fill:#ffffff,stroke:#1d2329,color:#1d2329",
    "observed": "fill:#d4dade,stroke:#1d2329,color:#1d2329",
    "deterministic": "fill:#ffffff,stroke:#1d2329,color:#1d2329,stroke-dasharray:4 3",
}
_DOT = {
    "latent": "shape=ellipse",
    "observed": 'shape=ellipse, style=filled, fillcolor="#d4dade"',
    "deterministic": "shape=ellipse, style=dashed",
    "factor": "shape=square, style=filled, fillcolor=black, width=0.12, height=0.12",
    "dots": "shape=plaintext",
}


@dataclass
class _Box:
    """A plate with what is in it; the outermost has no name."""

    plate: str = ""
    nodes: list[Node] = field(default_factory=list)
    boxes: dict[str, "_Box"] = field(default_factory=dict)


@dataclass(frozen=True)
class _Drawn:
    graph: Graph
    ids: dict[str, str]
    labels: dict[str, str]
    captions: dict[str, str]
    tree: _Box


def _read(story: Any, args: tuple, kwargs: dict[str, Any]) -> _Drawn:
    sites = fold_loops(relations(story, *args, **kwargs))
    diagram = graph(sites)
    letters = plate_letters(diagram, sites)
    tree, labels = _Box(), {}
    for node in diagram.nodes.values():
        box = tree
        for plate in node.plates:
            box = box.boxes.setdefault(plate, _Box(plate))
        box.nodes.append(node)
        indices = "".join(letters[p].index for p in node.plates)
        plain = node.kind in ("module", "dots")
        labels[node.name] = node.name if plain else symbol(node.name, [indices] if indices else [], math_text=False)
        if node.kind == "dots":
            labels[node.name] = "…"
    captions = {p.name: p.caption(letters[p.name].size, math_text=False) for p in diagram.plates.values()}
    ids = {name: f"n{i}" for i, name in enumerate(diagram.nodes)}
    return _Drawn(diagram, ids, labels, captions, tree)


def _clusters(drawn: _Drawn, box: _Box, depth: int, dot: bool, path: str = "") -> Iterator[str]:
    pad = "  " * depth
    for node in box.nodes:
        name, label = drawn.ids[node.name], drawn.labels[node.name].replace('"', "'")
        if dot:
            look = _DOT.get(node.kind, "shape=plaintext")
            shown = "" if node.kind == "factor" else label
            yield f'{pad}{name} [label="{shown}", {look}];'
        else:
            left, right = ("((", "))") if node.kind in _CLASSES else ("[", "]")
            yield f'{pad}{name}{left}"{label}"{right}'
    for k, inner in enumerate(box.boxes.values()):
        inside = f"{path}_{k}"
        caption = drawn.captions[inner.plate].replace('"', "'")
        if dot:
            yield f"{pad}subgraph cluster{inside} {{"
            yield f'{pad}  label="{caption}"; labeljust=r; labelloc=b; style=rounded; color="#8b959c";'
        else:
            yield f'{pad}subgraph p{inside}["{caption}"]'
        yield from _clusters(drawn, inner, depth + 1, dot, inside)
        yield f"{pad}{'}' if dot else 'end'}"


def _arrow(drawn: _Drawn, child: str) -> str:
    return " [dir=none]" if drawn.graph.nodes[child].kind == "factor" else ""
