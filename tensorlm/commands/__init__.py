"""The commands: what `tensorlm NAME` and the files of launcher/ run."""
