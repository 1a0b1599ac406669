"""What every entry point shares: options, files, progress."""
