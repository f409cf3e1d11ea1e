"""Model files: reading and writing safetensors, architectures, tensor names, and the formats of other tools.

Nothing is imported here. No module of this package needs torch at import.
"""
