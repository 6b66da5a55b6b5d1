"""The `sft` command: the front door over flows, tasks and the core. Imports lazily, so that `--help` is quick."""
