"""`python -m sft_cli.module NAME ARGUMENTS`: run a module of ours as a program, whatever lies in the current folder.

Given to `python -m` itself, `tasks.automations` would be looked for in the user's own `tasks` first.
"""

import runpy
import sys

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
