"""The ground that compress, export, serve, benchmarks and pipeline share."""

import os

# onnxruntime's official builds report the names and hashes of models to their makers, unless told not to before
# they are imported. What users translate with stays with them; ORT_DISABLE_TELEMETRY=0 in the environment is heard.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
