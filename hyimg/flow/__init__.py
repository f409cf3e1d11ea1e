"""The maths of flow matching as functions of tensors: noise levels, targets, losses, guidance and samplers."""
