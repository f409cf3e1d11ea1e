"""What is kept between runs: atomic writes, content hashes, the index, the latent and text stores.

The stores hold tensors by key, independent of models and datasets; `hyimg.data.caching` connects them to samples.
"""
