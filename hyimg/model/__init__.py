"""The networks, DiT and VAE, and how they are built from a checkpoint. Nothing is imported here."""
