"""Measurements: quality, latency, memory, size, serving, and the report made of them."""
