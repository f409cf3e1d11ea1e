"""A micro model that really learns: the small world that it knows, how it is trained, and how it is judged.

`python -m hyimg.micro build DIR` makes its four files from nothing; see docs/micro.md.
"""
