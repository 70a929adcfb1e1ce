"""The noise sentences of the passkey task and of RULER's tasks."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
