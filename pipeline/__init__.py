"""The command line and the runs: the only part that knows all the others."""
