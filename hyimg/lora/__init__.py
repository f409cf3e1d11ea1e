"""LoRA: adapter kinds, the network of adapters, who gets one, and merging into a model. `files` is about LoRA files.

`patterns`, `rank_plan` and `inspection` need no torch.
"""
