"""The dataset: its file, images, captions, buckets, samples, and the batches that training reads.

Start reading at `dataset_file` and `scan`; `caching` lists the entries that a cache needs.
"""
