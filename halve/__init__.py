"""The ground that compress, export, serve, benchmarks and pipeline share."""
