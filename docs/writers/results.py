"""Pages made from what was recorded: benchmarks from their JSON files, correctness from the tests themselves."""

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any


def write(source: Path, root: Path) -> None:
    """`source`/benchmarks.md and `source`/correctness.md."""
    (source / "benchmarks.md").write_text(benchmarks(root), encoding="utf-8")
    (source / "correctness.md").write_text(correctness(root), encoding="utf-8")


def benchmarks(root: Path) -> str:
    """benchmarks/README.md with its tables made anew from the JSON files."""
    table = _script(root / "benchmarks" / "_table.py")
    text = (root / "benchmarks" / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(table.BEGIN)
    after = rest.partition(table.END)[2]
    tables = "\n\n".join(table.table(result) for result in table.results())
    return f"{before}{tables}{after}".replace("\n```\n", "\n```console\n", 1)


def _script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def correctness(root: Path) -> str:
    """Every test that says in a sentence which error it catches, file by file."""
    lines = [
        "# Correctness",
        "",
        "What the tests hold, in their own words; `make test` runs them, `make test-slow` those marked slow.",
        "",
    ]
    total = 0
    for path in sorted((root / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        if not tests:
            continue
        total += len(tests)
        about = (ast.get_docstring(tree) or path.stem).split("\n\n")[0].replace("\n", " ")
        lines += [f"## {path.stem.removeprefix('test_').replace('_', ' ').capitalize()}", "", about, ""]
        lines += [f"- {sentence(test)}" for test in tests]
        lines.append("")
    lines.insert(4, f"{total} tests, many of them over every story.\n")
    return "\n".join(lines)


def sentence(test: ast.FunctionDef) -> str:
    """A test's name as words, and its docstring."""
    name = test.name.removeprefix("test_").replace("_", " ")
    slow = any("slow" in ast.dump(mark) for mark in test.decorator_list)
    told = (ast.get_docstring(test) or "").split("\n\n")[0].replace("\n", " ")
    text = f"**{name[:1].upper() + name[1:]}**" + (f": {told}" if told else "")
    return text + (" *(slow)*" if slow else "")
