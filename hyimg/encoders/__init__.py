"""Prompts to embeddings: the prompt template, Qwen's tokenizer and language model, the quoted-text rule, byT5.

`hyimg.encoders.text` combines them.
"""
