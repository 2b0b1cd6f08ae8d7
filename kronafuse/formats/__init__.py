"""Adapter files: `save`, `load`, and the record they exchange."""

from .adapter_file import AdapterFile
from .kronafuse import load, save

__all__ = ["AdapterFile", "load", "save"]
