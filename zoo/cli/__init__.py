"""What the `zoo` command needs besides the two packages: stories by name or file, arguments, errors.

Nothing here knows of `inference`; `zoo/__main__.py` joins the two.
"""
