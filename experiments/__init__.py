"""Studies, figures and benchmarks: what a reader of the method never has to open."""
