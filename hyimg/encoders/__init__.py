"""Text to conditions: the prompt template, the Qwen tokenizer and language model, the quoted-text rule, byT5.

`hyimg.encoders.text` joins them into what a prompt means to the DiT.
"""
