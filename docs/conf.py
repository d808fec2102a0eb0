"""How the documentation is built: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import fedloom

project = "fedloom"
author = "the fedloom authors"
release = version = fedloom.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "settings_page",
    "keys_page",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
napoleon_numpy_docstring = False
autodoc_default_options = {"members": True, "undoc-members": True, "exclude-members": "__init__"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
default_role = "code"
exclude_patterns = ["_build", "_ext", "_static"]

html_theme = "furo"
html_title = f"fedloom {version}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
