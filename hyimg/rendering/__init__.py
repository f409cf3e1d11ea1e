"""Rendering: prompts, what is rendered, the renderer, image files and contact sheets. Nothing is imported here.

`prompts` needs no torch.
"""
