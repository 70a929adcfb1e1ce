"""The commands that `tensorlm NAME` and the files of launcher/ run."""
