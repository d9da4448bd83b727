"""The two packages point one way: neither needs the other to be read, and importing them is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize(("package", "other"), [("zoo", "inference"), ("inference", "zoo")])
def test_packages_do_not_import_each_other(package, other):
    """Only the command line joins the two."""
    for path in (ROOT / package).rglob("*.py"):
        if "cli" not in path.parts and path.name != "__main__.py":
            assert other not in set(imports(path)), path


@pytest.mark.parametrize("package", ["zoo", "inference"])
def test_importing_a_package_does_not_import_torch(package):
    code = f"import sys, {package}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_submodule_does_not_hide_the_function_of_its_name():
    """`from inference import compare` loads inference/fit.py: `inference.fit` must stay the function."""
    code = (
        "import inference.fit, inference.compare\n"
        "from inference import fit, compare\n"
        "print(callable(fit), callable(compare))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


@pytest.mark.parametrize("package", ["inference", "zoo"])
def test_the_namesake_on_pypi_is_named(package, tmp_path):
    """An unrelated distribution `inference` overwrites our files: importing must say so."""
    metadata = tmp_path / "inference-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: inference\nVersion: 9.9\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import {package}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip uninstall inference" in done.stderr and "9.9" in done.stderr
