"""The command line: which command, its options as text, its errors as sentences and exit codes. No torch."""
