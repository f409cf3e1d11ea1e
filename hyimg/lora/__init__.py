"""LoRA: the adapter and the network of adapters, the patterns that plan it, and its file formats.

`formats`, `pieces`, `contents`, `terms`, `compression`, `rewriting`, `writer`, `file`, `consumers`, `patterns`, `plan`
and `inspection` work without torch.
"""
