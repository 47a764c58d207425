"""Tuning a pruned model with adapters, and teaching its teacher."""

from compress.teach import run_teach

__all__ = ["run_teach"]
