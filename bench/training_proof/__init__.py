"""Whether training does what SCAM promises, on the procedural data set: ``python -m bench.training_proof``."""
