"""Putting a function in the place of one of MindSpore's or mindone's."""

import sys


def replace_everywhere(original, substitute):
    """Rebind every name in a mindspore or mindone module that stands for ``original``, imported by value or not."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] in ("mindspore", "mindone"):
            for name, value in list(vars(module).items()):
                if value is original:
                    setattr(module, name, substitute)
