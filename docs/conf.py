"""Sphinx configuration."""

from importlib.metadata import version as installed_version

project = "usermetadata"
version = release = installed_version("usermetadata")
copyright = "the usermetadata contributors"  # noqa: A001 - Sphinx's name for it

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "_static", "examples"]
html_theme = "furo"
html_title = "usermetadata"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autoclass_content = "class"
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
