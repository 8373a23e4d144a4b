"""Images with label maps: folders, data sets, checks."""

from .configurations import PRESETS, DataConfiguration, merging_table, preset
from .dataset import LabelledImages, Sample

__all__ = ["PRESETS", "DataConfiguration", "LabelledImages", "Sample", "merging_table", "preset"]
