"""The Typer edge: options to flags, errors to stderr and exit codes. No torch, no work of its own."""
