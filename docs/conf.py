"""The site: sphinx-build -W -c docs . site

The source folder is the repository, so that every relative link works on a code host and in the site.
"""

project = "fastvit-train"
extensions = ["myst_parser"]
include_patterns = ["docs/index.rst", "*.md", "docs/*.md", "bench/*.md", "kernels/*.md", "bench/results/*/*.md"]
root_doc = "docs/index"
html_theme = "furo"
html_extra_path = ["site_root"]  # an index.html that leads to root_doc
html_title = project
html_show_copyright = False
html_copy_source = False
suppress_warnings = ["toc.no_title"]  # the tables of results have none
myst_heading_anchors = 3
highlight_language = "none"  # what a run prints; blocks of commands and examples name their language
