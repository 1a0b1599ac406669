"""The method on a real checkpoint: its rows, its fine-tunes, its stages."""
