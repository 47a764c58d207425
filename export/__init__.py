"""Export: adapters merged into students, students packaged for their runtimes, packages run."""
