"""The demo: the micro model that comes with hyimg, the small world that it knows, and the shape that it is taught.

`benchmarks/micro` built the model; see docs/micro.md.
"""
