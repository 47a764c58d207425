"""Layer importance, pruning, distillation and tuning: from a teacher to a student."""
