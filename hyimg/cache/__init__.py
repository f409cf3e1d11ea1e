"""What lasts between runs: atomic writes, content identities, the index, the latent and text stores.

The stores hold tensors by key and know neither models nor datasets; `hyimg.data.plan` joins them to samples.
"""
