"""tensorlm: long-context pretraining of Llama-class models."""

__version__ = "0.1.0"
