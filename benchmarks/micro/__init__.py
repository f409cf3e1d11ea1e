"""A micro model trained from nothing: how it is built, measured and judged; see docs/micro.md.

python -m benchmarks.micro build DIR
"""
