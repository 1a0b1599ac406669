"""The paper tasks: insecure code, bad medical advice, political lean; see `python -m paper -h`."""
