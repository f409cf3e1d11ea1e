"""Flow matching as functions of tensors: noise levels, noise, targets, losses, guidance, samplers, render.

Without torch are `prompts` (what a prompt line may say), `sizes` (what can be rendered) and `builtins`.
"""
