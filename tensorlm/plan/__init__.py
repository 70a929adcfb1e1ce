"""Memory and time of a run, predicted from formulas before anything is built."""
