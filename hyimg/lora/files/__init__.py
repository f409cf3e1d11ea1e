"""LoRA files: the formats of other tools, reading, converting, merging, compressing and checking them.

Converting a file needs no torch; `updates` and `check` do.
"""
