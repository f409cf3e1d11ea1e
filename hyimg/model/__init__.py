"""The networks: DiT and VAE, their layers, the names that checkpoints give to weights, and loading.

Nothing is imported here; `safetensors_file`, `architecture`, `keys` and `header_check` need no torch.
"""
