"""The self-contained demo: a small data set and a tiny base model, both made from a seed."""

from sft_core.own_packages import let_users_first

let_users_first()
