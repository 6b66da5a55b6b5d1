"""Recipes that come with the project: YAML files that hold only what differs from the defaults."""

from sft_core.own_packages import let_users_first

let_users_first()
