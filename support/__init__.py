"""What every entry point shares: options, errors, whole files, progress, processes."""
