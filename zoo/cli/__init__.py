"""What the `zoo` command needs besides the two packages: stories by name or file, arguments, errors.

With `zoo/__main__.py` it is the one place that knows both stories and inference.
"""
