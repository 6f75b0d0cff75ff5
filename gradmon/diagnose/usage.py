"""What the commands' helps explain alike. Without torch, as the command line is."""

from __future__ import annotations

MODULE_FACTORY = """\
MODULE:FACTORY  your script's name without .py, and the function or class in it that makes the unwrapped model, called
                without arguments: `train:make_model`. Run the command in the script's directory. The training must
                stand under `if __name__ == '__main__':`, as the script is imported. Where the class needs arguments,
                write `def make_model(): return Net(cfg)` and name that.
"""
