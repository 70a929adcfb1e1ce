"""The filler that says nothing, the same in passkey and in RULER's tasks."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
