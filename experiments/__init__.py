"""Studies, figures, theory and the benchmark."""

import os

os.environ["MPLBACKEND"] = "agg"  # all figures are files; a notebook's own may not be installed
