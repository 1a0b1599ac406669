"""Studies, figures, theory and the benchmark."""
