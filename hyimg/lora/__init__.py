"""LoRA: the adapter and the network of adapters, the patterns that plan it, and its file formats.

`formats`, `contents`, `rewriting`, `writer`, `file`, `patterns`, `plan` and `inspection` work without torch.
"""
