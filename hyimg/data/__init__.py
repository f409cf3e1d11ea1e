"""The dataset: its file, images, captions, buckets, samples, and the batches that training reads.

A stage starts at `hyimg.data.dataset_file` and `hyimg.data.samples`, and goes on with `hyimg.data.plan`.
"""
