"""tensorlm: long-context pretraining with tensorized attention."""

__version__ = "0.1.0"
