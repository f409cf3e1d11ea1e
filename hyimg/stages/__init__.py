"""One module a command, named as the command: each a function that a program may call too.

Stages meet only on disk and never import each other; `hyimg.pipeline` chains them.
"""
