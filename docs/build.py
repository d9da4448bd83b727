"""Build the site: assemble all pages in docs/_build/source, then run Sphinx over them.

python docs/build.py [--skip-tutorials]
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = HERE / "_build"
TYPED = ("index.md", "guides", "static")


def assemble(source: Path, tutorials: bool) -> None:
    """Typed pages as they are, written ones beside them; what is gone from docs is gone from the site."""
    from writers import api, gallery, notebooks, results

    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    shutil.copy(HERE / "conf.py", source)
    for name in TYPED:
        if (HERE / name).is_dir():
            shutil.copytree(HERE / name, source / name)
        else:
            shutil.copy(HERE / name, source)
    gallery.write(source, ROOT)
    notebooks.write(source, ROOT, BUILD / "executed", run=tutorials)
    results.write(source, ROOT)
    api.write(source)


def main() -> int:
    """The exit code: Sphinx's warnings are errors, and so is a page that asks elsewhere, weighs too much or leads nowhere."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--skip-tutorials", action="store_true", help="show the tutorials without running them")
    options = parser.parse_args()
    os.environ["DOCS_ROOT"] = str(HERE)
    sys.path.insert(0, str(ROOT))
    assemble(BUILD / "source", tutorials=not options.skip_tutorials)
    from sphinx.cmd.build import main as sphinx

    shutil.rmtree(BUILD / "html", ignore_errors=True)
    words = ["-b", "html", "-q", "-W", "--keep-going", "-d", BUILD / "doctrees", BUILD / "source", BUILD / "html"]
    failed = sphinx([str(word) for word in words])
    if failed:
        return failed
    from writers.check import faults

    found = faults(BUILD / "html")
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    if not found:
        print(f"open {(BUILD / 'html' / 'index.html').relative_to(ROOT)}")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
