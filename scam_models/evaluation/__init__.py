"""The metrics of the paper, with features from networks whose weights are in files."""

from .evaluate import Evaluation, evaluate, frechet_distance, subject_pairs
from .features import FeatureExtractor, InceptionFeatures, RandomFeatures, ReidentificationFeatures

__all__ = [
    "Evaluation",
    "FeatureExtractor",
    "InceptionFeatures",
    "RandomFeatures",
    "ReidentificationFeatures",
    "evaluate",
    "frechet_distance",
    "subject_pairs",
]
