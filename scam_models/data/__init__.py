"""Images with label maps: folders, data sets, checks."""

from .check import Problem, check, open_checked
from .configurations import PRESETS, DataConfiguration, merging_table, preset
from .dataset import LabelledImages, Sample

__all__ = [
    "PRESETS",
    "DataConfiguration",
    "LabelledImages",
    "Problem",
    "Sample",
    "check",
    "merging_table",
    "open_checked",
    "preset",
]
