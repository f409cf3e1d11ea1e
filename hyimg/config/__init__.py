"""Every option of every command, declared once: name, type, default, bounds, help.

`option.py` is how one is declared, the topic modules (`models.py`, `network.py`, ...) hold the frozen groups,
`commands.py` says which groups a command takes, `load.py` turns flags and a TOML run file into them. No torch.
"""
