"""Adapter files: `save`, `load`, and the record they exchange; `unet_finetune`, a layout that needs a spec."""

from . import unet_finetune
from .adapter_file import AdapterFile
from .kronafuse import load, save

__all__ = ["AdapterFile", "load", "save", "unet_finetune"]
