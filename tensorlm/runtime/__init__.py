"""Processes, files, errors and exit codes. Imports no other part of tensorlm."""
