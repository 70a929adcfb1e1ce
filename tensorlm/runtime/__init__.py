"""The ground: processes, files, errors and exit codes. Imports nothing else of tensorlm."""
