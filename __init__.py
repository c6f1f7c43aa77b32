"""Marks the repository root as the package that its folders' relative imports climb to.

Tools that follow imports by path see only the real folders, never the links under ``src/ardd``;
with this marker ``from ..core import options`` in ``passes/`` leads them to ``core/``. Nothing
imports it, and it is not shipped: the package is ``src/ardd``.
"""
