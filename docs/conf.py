"""Settings of the site; `make docs` assembles its pages in docs/_build/source and runs Sphinx there."""

import os
import sys
from pathlib import Path

HERE = Path(os.environ["DOCS_ROOT"]) if "DOCS_ROOT" in os.environ else Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import zoo  # noqa: E402

project = "pyro-model-zoo"
author = "The pyro-model-zoo authors"
project_copyright = "The pyro-model-zoo authors"
release = version = zoo.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "writers.mathml"]
exclude_patterns: list[str] = []
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
myst_update_mathjax = False
myst_links_external_new_tab = False
nb_execution_mode = "off"  # `writers.notebooks` runs the tutorials, once for each version of the code
nb_output_stderr = "remove"  # progress bars and notes of libraries name files of the machine that built the site
nb_ipywidgets_js: dict[str, dict[str, str]] = {}

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
viewcode_line_numbers = True

html_theme = "furo"
html_title = "pyro-model-zoo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f6f8b", "color-brand-content": "#1f6f8b"},
    "dark_css_variables": {"color-brand-primary": "#7fbcd2", "color-brand-content": "#7fbcd2"},
    "navigation_with_keys": True,
}
default_role = "code"
highlight_language = "text"
pygments_style = "friendly"
pygments_dark_style = "github-dark"
