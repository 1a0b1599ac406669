"""Studies, figures and benchmarks: what a reader of the method never has to open."""

import os

# All figures are files. A notebook names a backend of its own here, which need not be installed,
# and matplotlib reads the name as soon as it is imported.
os.environ["MPLBACKEND"] = "agg"
