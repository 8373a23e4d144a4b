"""Training of SCAM. Needs the extra ``scam``: Lightning and TensorBoard."""

from .ablations import ABLATIONS, without
from .configuration import TrainingConfiguration, training_preset
from .module import ScamTraining
from .run import train

__all__ = ["ABLATIONS", "ScamTraining", "TrainingConfiguration", "train", "training_preset", "without"]
