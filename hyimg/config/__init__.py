"""Every option of every command, declared once: name, type, default, bounds, help.

`option.py` says how options are declared, the topic modules (`models.py`, `training.py`, ...) hold the frozen groups,
`commands.py` and `tools.py` say which groups a command takes, `load.py` makes them from flags and a TOML run file, and
`values.py` checks every value. No torch.
"""
