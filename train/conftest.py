"""Loaded before any test is collected, also of other folders: these may import what imports Triton."""

import interpreted  # noqa: F401
