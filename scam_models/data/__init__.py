"""Images with label maps: folders, data sets, checks, and a procedural data set."""

from .check import Problem, check, open_checked
from .configurations import PRESETS, DataConfiguration, merging_table, preset
from .dataset import LabelledImages, Sample
from .synthesis import FigureSeeds, make_data, read_identities

__all__ = [
    "PRESETS",
    "DataConfiguration",
    "FigureSeeds",
    "LabelledImages",
    "Problem",
    "Sample",
    "check",
    "make_data",
    "merging_table",
    "open_checked",
    "preset",
    "read_identities",
]
