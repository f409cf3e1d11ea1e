"""hyimg: LoRA training and rendering for HunyuanImage-2.1.

The stages are importable functions (`hyimg.stages.train.train` and so on); `hyimg.cli` is the command line.
Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
